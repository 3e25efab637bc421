"""The orchestrator: recipe -> rows -> runner -> Gram matrices -> solve -> alphas.

Scope: the order of the steps, and the files that they leave. Everything is computed in canonical order (experts sorted
by name), so that the order of the recipe's models does not move a digit; the file then follows the recipe.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import psutil
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from tqdm import tqdm

from mergekit_slta.alphas import Alphas, pieces_of
from mergekit_slta.assembly import assemble, layout_of, solve_submodule
from mergekit_slta.batches import plan_batches
from mergekit_slta.checkpoints import Checkpoints, Weights
from mergekit_slta.errors import RunError, show
from mergekit_slta.gram import Statistics
from mergekit_slta.identity import fingerprint, statistics_identity
from mergekit_slta.method import combine
from mergekit_slta.preflight import Job, check_rows, prepare
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
    names = [job.recipe.names[task.model] for task in job.recipe.tasks]
    check_rows(job.rows, names)
    experts = job.plan.models[1:]  # canonical order
    by_model = {task.model: drawn for task, drawn in zip(job.recipe.tasks, job.rows, strict=True)}
    tokens: list[Sequence[int]] = []
    row_task: list[int] = []
    for index, model in enumerate(experts):
        for row in by_model[model].rows:  # type: ignore[union-attr] - check_rows
            tokens.append(row.ids)
            row_task.append(index)
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
    try:
        with tqdm(total=len(job.submodules), desc="Calibrating", disable=job.options.quiet) as bar:
            current = None
            for evaluation in stream(walk, job.submodules):
                if evaluation.submodule is not current:
                    current = _announce(bar, evaluation.submodule, current)
                _accumulate(statistics, walk, evaluation, [job.recipe.names[model] for model in experts])
                del evaluation  # or this step's weights would live through the loading of the next
            bar.update(current is not None)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(error, job) from error
    except RuntimeError as error:
        if "not enough memory" in str(error) or "can't allocate memory" in str(error):  # torch's CPU allocator
            raise _out_of_memory(error, job) from error
        raise
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
    columns = [layout["models"].index(name) for name in layout["canonical"]]

    def merge(step: Sequence[Submodule], weights: Sequence[Weights]) -> Weights:
        entries = [
            solve_submodule(
                by_name[submodule.name], statistics, layout, importance=importance, balance=settings.balance,
                ridge=settings.ridge, objectives=[submodule.name],
            )
            for submodule in step
        ]  # fmt: skip
        merged = {}
        for tensor, pieces in pieces_of(entries).items():
            if tensor not in weights[0]:  # a tied projection's copy, which is not read here
                continue
            ordered = [piece._replace(alpha=tuple(piece.alpha[column] for column in columns)) for piece in pieces]
            base, *experts = (own[tensor] for own in weights)
            merged[tensor] = combine(base, experts, ordered, 1.0, base.dtype)
        return merged

    return merge


def _announce(bar: tqdm, submodule: Submodule, previous: Submodule | None) -> Submodule:
    bar.update(previous is not None)
    bar.set_description(f"Calibrating {submodule.name}", refresh=False)
    bar.set_postfix_str(f"memory {psutil.Process().memory_info().rss / 2**30:.1f} GiB")
    return submodule


def _accumulate(statistics: Statistics, walk: Walk, evaluation: Evaluation, names: Sequence[str]) -> None:
    points = [walk.model(number) for number in range(1, walk.num_models)]
    deltas = torch.stack([evaluation.at(point) - evaluation.base for point in points])  # [T, N, d]
    statistics.add(evaluation.submodule.name, evaluation.rows, deltas, evaluation.lengths)
    diagonal = statistics.grams[evaluation.submodule.name][list(evaluation.rows)].diagonal(dim1=1, dim2=2)  # [rows, T]
    if not torch.isfinite(diagonal).all():
        model = names[int((~torch.isfinite(diagonal)).any(0).nonzero()[0])]
        raise RunError(
            f"the features of {show(model)} behind {show(evaluation.submodule.name)} hold NaN or Inf: "
            "use `compute_dtype: float32`, or check that expert"
        )


def _out_of_memory(error: BaseException, job: Job) -> RunError:
    return RunError(
        f"out of memory on {job.device} ({show(error, 120)}): lower `max_seq_length` "
        f"({job.recipe.settings.max_seq_length}) or `num_samples` ({job.recipe.settings.num_samples}), "
        "or choose another --device"
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
