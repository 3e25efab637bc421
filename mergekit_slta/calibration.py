"""The orchestrator: recipe -> rows -> runner -> Gram matrices -> solve -> alphas.

Scope: the order of the steps, and the files that they leave. Everything is computed in canonical order (experts sorted
by name), so that the order of the recipe's models does not move a digit; the file then follows the recipe.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_slta.alphas import Alphas, Piece, pieces_of
from mergekit_slta.assembly import assemble, layout_of, solve_submodule
from mergekit_slta.batches import plan_batches
from mergekit_slta.checkpoints import Checkpoints, Weights
from mergekit_slta.errors import RunError, show
from mergekit_slta.gram import Statistics
from mergekit_slta.identity import fingerprint, statistics_identity
from mergekit_slta.method import combine
from mergekit_slta.preflight import Job, check_rows, prepare
from mergekit_slta.progress import Progress, advice_on_memory
from mergekit_slta.recipe import Recipe, load_config, read_recipe
from mergekit_slta.stream import stream
from mergekit_slta.submodules import Submodule
from mergekit_slta.walk import Evaluation, Merge, Walk

LOG = logging.getLogger(__name__)


def calibrate(
    recipe: Recipe | MergeConfiguration | dict[str, Any] | str | os.PathLike[str],
    options: MergeOptions | None = None,
) -> Alphas:
    """Compute the alphas of a recipe; writes nothing.

    Args:
        recipe: a recipe file's path, its content as a mapping or as mergekit's configuration, or a `Recipe`.
        options: mergekit's options (device, caches, ...); the CPU and its defaults otherwise.

    Raises:
        SltaError: whatever is wrong with the recipe, the data or the models, in one line.
    """
    if isinstance(recipe, (str, os.PathLike)):
        recipe = load_config(recipe)[0]
    if isinstance(recipe, dict):
        recipe = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(recipe)))
    if isinstance(recipe, MergeConfiguration):
        recipe = read_recipe(recipe)
    job = prepare(recipe, options or MergeOptions(quiet=True), for_merge=False)
    return solve_job(job, gather_statistics(job))


def solve_job(job: Job, statistics: Statistics) -> Alphas:
    """Solve every submodule of a job from its statistics, in the recipe's order of models."""
    settings = job.recipe.settings
    importance = [task.importance for task in job.recipe.tasks]
    return assemble(statistics, layout_of(job), importance=importance, balance=settings.balance, ridge=settings.ridge)


@torch.inference_mode()
def gather_statistics(job: Job) -> Statistics:
    """Feed the rows through the base, every expert's submodules beside it, and keep the Gram matrices.

    Raises:
        DataError: an expert without rows.
        ModelError, RunError: NaN or Inf in weights or features, or memory runs out.
    """
    tokens, row_task = canonical_rows(job)
    experts = job.plan.models[1:]
    statistics = Statistics(
        row_task=torch.tensor(row_task, dtype=torch.int64, device="cpu"),
        num_models=len(experts),
        metadata=statistics_metadata(job),
    )
    checkpoints = Checkpoints(job.plan, job.recipe.names, job.device, job.dtype, job.tokenizer)
    alone = job.recipe.settings.granularity == "linear"  # single matrices take rows one by one: see the runner
    batches = plan_batches(tokens, max_tokens=0) if alone else plan_batches(tokens)
    merge = _merge_as_solved(job, statistics) if job.recipe.settings.inputs == "merged" else None
    walk = Walk(job.skeleton, checkpoints, batches, merge=merge, merged_inputs=merge is not None)
    walk.pack_tokens *= not alone
    names = [job.recipe.names[model] for model in experts]
    num_steps = len({submodule.step for submodule in job.submodules})
    with advice_on_memory(job), Progress("Calibrating", num_steps, quiet=job.options.quiet) as progress:
        walk.announce = progress.announce
        for evaluation in stream(walk, job.submodules):
            progress.at(evaluation.submodule.step)
            _accumulate(statistics, walk, evaluation, names)
            del evaluation  # or this step's weights would live through the loading of the next
    return statistics


def _merge_as_solved(job: Job, statistics: Statistics) -> Merge:
    """`inputs: merged` (A.5.3): behind each step the rows move on through what it has just been merged to.

    `lambda` acts at merge time and is taken as 1 here. A tied table moves the rows by the embedding's objective alone:
    the head's is not known yet; the file's alpha is solved for both. Heads of one attention block, and matrices of one
    layer, see what the base makes of the merged features before that block or layer.
    """
    layout = layout_of(job)
    by_name = {submodule["name"]: submodule for submodule in layout["submodules"]}
    settings = job.recipe.settings
    importance = [task.importance for task in job.recipe.tasks]

    def solved(step: Sequence[Submodule]) -> Mapping[str, Sequence[Piece]]:
        return pieces_of(
            [
                solve_submodule(
                    by_name[submodule.name], statistics, layout, importance=importance, balance=settings.balance,
                    ridge=settings.ridge, objectives=[submodule.name],
                )
                for submodule in step
            ]
        )  # fmt: skip

    return merge_with(job, layout["models"], solved)


def merge_with(
    job: Job, models: Sequence[str], pieces: Callable[[Sequence[Submodule]], Mapping[str, Sequence[Piece]]]
) -> Merge:
    """Make a walk's merged tensors, as the merge method will make them but for the recipe's `lambda`.

    Args:
        job: whose models are merged.
        models: the order of the pieces' alphas.
        pieces: submodules of a step -> the slices of (at least) their tensors, with their alphas.
    """
    columns = [models.index(job.recipe.label(model)) for model in job.plan.models[1:]]

    def merge(step: Sequence[Submodule], weights: Sequence[Weights]) -> Weights:
        known = pieces(step)
        merged = {}
        for tensor in weights[0]:
            tied = job.plan.is_tied and tensor == job.skeleton.head_weight
            own = known[job.skeleton.embedding_weight if tied else tensor]
            ordered = [piece._replace(alpha=tuple(piece.alpha[column] for column in columns)) for piece in own]
            base, *experts = (given[tensor] for given in weights)
            merged[tensor] = combine(base, experts, ordered, 1.0, base.dtype)
        return merged

    return merge


def canonical_rows(job: Job) -> tuple[list[Sequence[int]], list[int]]:
    """The calibration rows' tokens and tasks, in the canonical order of the experts.

    Raises:
        DataError: an expert without rows.
    """
    check_rows(job.rows, [job.recipe.names[task.model] for task in job.recipe.tasks])
    by_model = {task.model: drawn for task, drawn in zip(job.recipe.tasks, job.rows, strict=True)}
    tokens: list[Sequence[int]] = []
    row_task: list[int] = []
    for index, model in enumerate(job.plan.models[1:]):
        for row in by_model[model].rows:  # type: ignore[union-attr] - check_rows
            tokens.append(row.ids)
            row_task.append(index)
    return tokens, row_task


def _accumulate(statistics: Statistics, walk: Walk, evaluation: Evaluation, names: Sequence[str]) -> None:
    points = [walk.model(number) for number in range(1, walk.num_models)]
    base = evaluation.base
    outputs = [evaluation.at(point) for point in points]  # T x [N, d]
    statistics.add(evaluation.submodule.name, evaluation.rows, outputs, evaluation.lengths, base)
    diagonal = statistics.grams[evaluation.submodule.name][list(evaluation.rows)].diagonal(dim1=1, dim2=2)  # [rows, T]
    if not torch.isfinite(diagonal).all():
        model = names[int((~torch.isfinite(diagonal)).any(0).nonzero()[0])]
        raise RunError(
            f"the features of {show(model)} behind {show(evaluation.submodule.name)} hold NaN or Inf: "
            "use `compute_dtype: float32`, or check that expert"
        )


def statistics_metadata(job: Job) -> dict[str, str]:
    """What statistics need to be solved again without the models: their fingerprint and the alphas file's layout."""
    return {
        "fingerprint": fingerprint(statistics_identity(job.identity)),
        "layout": json.dumps(layout_of(job), sort_keys=True),
    }


def statistics_match(job: Job, statistics: Statistics) -> bool:
    """Whether saved statistics are what this job would gather."""
    return statistics.metadata.get("fingerprint") == fingerprint(statistics_identity(job.identity))
