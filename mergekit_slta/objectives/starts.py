"""The starting points of the search of `objective: joint`: merged models that need no step.

Scope: which points there are, their alphas, and where these mean nothing. `joint_search` measures them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mergekit_slta.job.job import Job
from mergekit_slta.job.layout import layout_of
from mergekit_slta.models.submodules import Submodule, partition
from mergekit_slta.objectives.feature_pass import gather_grams
from mergekit_slta.objectives.merging import Point
from mergekit_slta.objectives.solving import solve_submodule
from mergekit_slta.recipe.settings import ObjectiveSettings
from mergekit_slta.runtime.distributed import Ranks
from mergekit_slta.runtime.resume import ResumeStore


def starting_points(job: Job, features: Point) -> dict[str, Point]:
    """The base, the average of the experts, the weights of `features`, and every direction alone, by name.

    Args:
        job: the recipe, prepared.
        features: from `features_point`.
    """
    labels, count = job.labels, len(job.experts)
    is_expert = torch.arange(len(labels)) < count
    constant = {"base": 0.0 * is_expert, "average": is_expert / count}
    points = {name: {part.name: alpha.double() for part in job.submodules} for name, alpha in constant.items()}
    points["features"] = dict(features)
    for direction in job.directions:
        alone = torch.tensor([float(label == direction.model) for label in labels], dtype=torch.float64)
        name = f"direction {direction.model}" if direction.model in points else direction.model
        points[name] = {part.name: alone for part in job.submodules}
    # A closed form that only averages the experts has no weight of its own there (see `Job.averaged`).
    averages = torch.cat([is_expert[:-1] / count, torch.zeros(1)]).double()
    return {
        name: {
            part: alpha * (torch.arange(len(labels)) < len(labels) - 1) + alpha[-1] * averages
            if part in job.averaged else alpha
            for part, alpha in point.items()
        }
        for name, point in points.items()
    }  # fmt: skip


def features_point(job: Job, resume: ResumeStore | None, ranks: Ranks) -> tuple[Point, dict[str, Tensor]]:
    """The alphas of `features` from the first step's rows. Single matrices and heads get the weights of their block.

    Returns:
        The alphas, and submodule -> [K] bool, whether each model changes it, or its block.
    """
    coarse = job.recipe.settings.granularity
    granularity = coarse if coarse in ("model", "layer") else "attn_mlp"
    first = {(example.task, example.row.number) for example in job.examples(0)}
    tasks = {model: place for place, model in enumerate(job.experts)}
    rows = tuple(
        None if drawn is None else
        replace(drawn, rows=tuple(row for row in drawn.rows if (tasks[task.model], row.number) in first))
        for task, drawn in zip(job.recipe.tasks, job.rows, strict=True)
    )  # fmt: skip
    settings = job.recipe.settings.model_copy(update={"own": ObjectiveSettings(), "granularity": granularity})
    submodules = partition(job.plan.tensors, job.skeleton.anatomy, granularity, tied=job.plan.is_tied)
    blocks = replace(
        job, recipe=job.recipe.model_copy(update={"settings": settings}), rows=rows, submodules=tuple(submodules)
    )
    with job.clock.phase("features"):
        statistics = gather_grams(blocks, resume=resume, ranks=ranks, with_losses=False)
    layout = layout_of(blocks)
    ridgeless = layout.model_copy(update={"solve": layout.solve.model_copy(update={"ridge": 0.0})})
    of_tensor: dict[str, tuple[Tensor, Tensor]] = {}
    for submodule in layout.submodules:
        entry = solve_submodule(submodule, statistics, ridgeless)
        columns = [entry.alpha[layout.models.index(name)] for name in layout.canonical]
        changed = torch.tensor([name not in entry.unchanged for name in layout.canonical])
        of_tensor |= dict.fromkeys(submodule.tensors, (torch.tensor(columns, dtype=torch.float64), changed))
    none = torch.zeros(len(job.labels), dtype=torch.float64), torch.ones(len(job.labels), dtype=torch.bool)
    found = {  # the head of a tied model has no tensors
        part.name: of_tensor[job.plan.tensors[part.tensors[0]].names[0]] if part.tensors else none
        for part in job.submodules
    }
    return {name: alpha for name, (alpha, _) in found.items()}, {name: changed for name, (_, changed) in found.items()}


def equal_models(job: Job, changed: Mapping[str, Tensor]) -> Iterator[tuple[str, list[int]]]:
    """Find where models have the base's weights, or none of their own.

    Args:
        job: the recipe, prepared.
        changed: submodule -> [K] bool, where a model is known to differ from the base.

    Yields:
        (submodule, indices of the models in canonical order).
    """
    checkpoints = job.checkpoints()

    def is_equal(submodule: Submodule, place: int) -> bool:
        if submodule.name in job.averaged and place == len(job.labels) - 1:
            return True
        pairs = (checkpoints.raw(tensor, [0, place + 1]) for tensor in submodule.tensors)
        return all(base.shape == other.shape and bool((base == other).all()) for base, other in pairs)

    for submodule in job.submodules:
        unknown = (~changed[submodule.name]).nonzero().flatten().tolist() if submodule.name in changed else []
        if submodule.tensors and (places := [place for place in unknown if is_equal(submodule, place)]):
            yield submodule.name, places
