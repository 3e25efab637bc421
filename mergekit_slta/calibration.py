"""The orchestrator: recipe -> rows -> runner -> Gram matrices -> solve -> alphas.

Scope: the order of the steps, and how many rows they take. Everything is computed in canonical order (experts sorted by
name), so that the order of the recipe's models does not move a digit; the file then follows the recipe.
"""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_slta.alphas import Alphas
from mergekit_slta.assembly import assemble, layout_of
from mergekit_slta.batches import BATCH_TOKENS, PADDING
from mergekit_slta.distributed import ALONE, Ranks
from mergekit_slta.gathering import canonical_rows, gather, warn_of_distance
from mergekit_slta.gram import Statistics
from mergekit_slta.identity import fingerprint, statistics_identity
from mergekit_slta.passes import gather_fisher, gather_slopes
from mergekit_slta.preflight import Job, prepare
from mergekit_slta.recipe import Recipe, load_config, read_recipe
from mergekit_slta.records import Records
from mergekit_slta.walk import HEAD_ELEMENTS

LOG = logging.getLogger(__name__)
FIRST_ROWS = 3
"""Rows of each task with which a `tolerance` begins; the paper's Table 11 finds these almost enough."""


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
    layout = layout_of(used_rows(job, statistics))
    return assemble(statistics, layout, importance=importance, balance=settings.balance, ridge=settings.ridge)


def gather_statistics(job: Job, records: Records | None = None, ranks: Ranks = ALONE) -> Statistics:
    """The Gram matrices, or slopes, of a job's rows; with a `tolerance`, of as many as it takes.

    Args:
        job: the recipe, prepared.
        records: finished steps of an earlier run of the same job, and where this one keeps its own.
        ranks: processes that share the rows.

    Raises:
        DataError: an expert without rows.
        ModelError, RunError: NaN or Inf in weights or features, memory runs out, or another process is gone.
    """
    if ranks.is_first:
        warn_of_distance(job)
    if job.recipe.settings.objective == "joint":
        statistics = gather_slopes(job, records=records, ranks=ranks)
    elif job.recipe.settings.objective == "fisher":
        statistics = gather_fisher(job, records=records, ranks=ranks)
    elif not job.recipe.settings.tolerance:
        statistics = gather(job, *canonical_rows(job), records=records, ranks=ranks)
    else:
        statistics = _gather_until(job, records, ranks)
    statistics.metadata = statistics_metadata(used_rows(job, statistics))
    return statistics


def _gather_until(job: Job, records: Records | None, ranks: Ranks) -> Statistics:
    """Few rows first, then as many again, until the largest standard error of an alpha is within the tolerance."""
    every = max(len(drawn.rows) for drawn in job.rows if drawn is not None)
    parts: list[Statistics] = []
    start, stop = 0, min(FIRST_ROWS, every)
    while True:
        rows = canonical_rows(job, start, stop)
        parts.append(gather(job, *rows, records=records, ranks=ranks, label=f"{stop} rows/"))
        statistics = Statistics.join(parts)
        alphas = solve_job(job, statistics)
        if ranks.agree(meets_tolerance(job, alphas, statistics)):
            error = _largest_error(alphas)
            LOG.info("%d rows of each task: the largest standard error is %.3g", stop, error)
            if error > job.recipe.settings.tolerance:
                LOG.warning(
                    "all %d rows of each task leave a standard error of %.3g, above the `tolerance` %g: "
                    "raise `num_samples`, or add a `ridge`", stop, error, job.recipe.settings.tolerance,
                )  # fmt: skip
            return statistics
        start, stop = stop, min(2 * stop, every)


def meets_tolerance(job: Job, alphas: Alphas, statistics: Statistics) -> bool:
    """Whether the job asks for no more rows than the statistics hold: the weights are known well enough, or there are
    no more rows."""
    tolerance = job.recipe.settings.tolerance
    if not tolerance or _largest_error(alphas) <= tolerance:
        return True
    every = max(len(drawn.rows) for drawn in job.rows if drawn is not None)
    return int(torch.bincount(statistics.row_task).max()) >= every


def _largest_error(alphas: Alphas) -> float:
    return max(error for entry in alphas.submodules for error in entry.stderr or (math.inf,))


def used_rows(job: Job, statistics: Statistics) -> Job:
    """The job with only those rows that statistics were taken from: with a `tolerance`, the first of each task."""
    counts = torch.bincount(statistics.row_task, minlength=statistics.num_models).tolist()
    by_model = dict(zip(job.plan.models[1:], counts, strict=True))
    rows = tuple(
        drawn and replace(drawn, rows=drawn.rows[: by_model[task.model]])
        for task, drawn in zip(job.recipe.tasks, job.rows, strict=True)
    )
    return replace(job, rows=rows)


def statistics_metadata(job: Job) -> dict[str, str]:
    """What statistics need to be solved again without the models: their fingerprint and the alphas file's layout."""
    return {"fingerprint": statistics_fingerprint(job), "layout": json.dumps(layout_of(job), sort_keys=True)}


def statistics_fingerprint(job: Job) -> str:
    """Of everything that statistics depend on."""
    return fingerprint(statistics_identity(job.identity))


def work_fingerprint(job: Job) -> str:
    """Of unfinished work: what is computed, and by what; other versions or devices round otherwise."""
    versions = {package: version(package) for package in ("mergekit-slta", "mergekit", "transformers", "torch")}
    plan = {"device": job.device.type, "batches": f"{BATCH_TOKENS} {PADDING} {HEAD_ELEMENTS}"}
    return fingerprint({"statistics": statistics_fingerprint(job), **versions, **plan})


def statistics_match(job: Job, statistics: Statistics) -> bool:
    """Whether saved statistics are what this job would gather."""
    return statistics.metadata.get("fingerprint") == statistics_fingerprint(job)
