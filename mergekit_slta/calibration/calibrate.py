"""The orchestrator: recipe -> rows -> runner -> Gram matrices -> solve -> alphas.

Scope: the order of the steps. Everything is computed in canonical order (experts sorted by
name), so that the order of the recipe's models does not move a digit; the file then follows the recipe.
"""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from typing import Any

import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_slta.data.batches import BATCH_TOKENS, PADDING
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.identity import hash_identity, statistics_identity
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.job.preflight import Job, prepare
from mergekit_slta.job.solve import assemble, layout_of
from mergekit_slta.objectives.features import canonical_rows, gather, warn_of_distance
from mergekit_slta.objectives.gradient_passes import gather_slopes
from mergekit_slta.recipe.read import Recipe, load_config, read_recipe
from mergekit_slta.runner.state import HEAD_ELEMENTS
from mergekit_slta.runtime.distributed import ALONE, Ranks
from mergekit_slta.runtime.resume import ResumeStore


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


def gather_statistics(job: Job, records: ResumeStore | None = None, ranks: Ranks = ALONE) -> Statistics:
    """The Gram matrices, or slopes, of a job's rows.

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
    else:
        statistics = gather(job, *canonical_rows(job), records=records, ranks=ranks)
    statistics.metadata = statistics_metadata(job)
    return statistics


def statistics_metadata(job: Job) -> dict[str, str]:
    """What statistics need to be solved again without the models: their fingerprint and the alphas file's layout."""
    return {"fingerprint": statistics_fingerprint(job), "layout": json.dumps(layout_of(job), sort_keys=True)}


def statistics_fingerprint(job: Job) -> str:
    """Of everything that statistics depend on."""
    return hash_identity(statistics_identity(job.identity))


def work_fingerprint(job: Job) -> str:
    """Of unfinished work: what is computed, and by what; other versions or devices round otherwise."""
    versions = {package: version(package) for package in ("mergekit-slta", "mergekit", "transformers", "torch")}
    plan = {"device": job.device.type, "batches": f"{BATCH_TOKENS} {PADDING} {HEAD_ELEMENTS}"}
    return hash_identity({"statistics": statistics_fingerprint(job), **versions, **plan})


def statistics_match(job: Job, statistics: Statistics) -> bool:
    """Whether saved statistics are what this job would gather."""
    return statistics.metadata.get("fingerprint") == statistics_fingerprint(job)
