"""The pre-pass: recipe -> rows -> statistics -> solve -> alphas.

Scope: the order of this work, and the fingerprints that tie statistics and unfinished work to a job.
"""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_slta.calibration.assemble import assemble, warn_of_quality
from mergekit_slta.calibration.evaluate import evaluate
from mergekit_slta.data.batches import BATCH_TOKENS, GRADIENT_TOKENS, PADDING
from mergekit_slta.errors import RecipeError
from mergekit_slta.files.alphas_file import Alphas, describe_far
from mergekit_slta.files.identity import hash_identity
from mergekit_slta.files.layout import KEY, Layout
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.job.direction import with_direction
from mergekit_slta.job.identity import statistics_identity
from mergekit_slta.job.job import Job
from mergekit_slta.job.layout import layout_of, library_versions
from mergekit_slta.job.preflight import prepare
from mergekit_slta.objectives.registry import objective
from mergekit_slta.recipe.load import as_config
from mergekit_slta.recipe.read import read_recipe
from mergekit_slta.recipe.recipe import Recipe
from mergekit_slta.recipe.settings import SELF
from mergekit_slta.runner.state import HEAD_ELEMENTS
from mergekit_slta.runtime.distributed import ALONE, Ranks
from mergekit_slta.runtime.resume import ResumeStore

LOG = logging.getLogger(__name__)
MAX_RELATIVE_DISTANCE = 0.7
"""An expert is suspicious above this ratio of Frobenius norms: the task vector of a layer over the base's layer. Two
models trained from scratch have about 1.4; full fine-tuning rarely exceeds 0.1."""


def calibrate(
    recipe: Recipe | MergeConfiguration | dict[str, Any] | str | os.PathLike[str],
    options: MergeOptions | None = None,
) -> Alphas:
    """Compute the alphas of a recipe; writes nothing.

    Args:
        recipe: a recipe file's path, its content as a mapping or as mergekit's configuration, or a `Recipe`.
        options: mergekit's options (device, caches, ...); by default mergekit's own defaults, on the CPU.

    Raises:
        SltaError: the recipe, the data or the models are wrong; the message is one line.

    Examples:
        >>> alphas = mergekit_slta.calibrate("recipe.yml")
        >>> alphas["model.layers.0.mlp"]
        SubmoduleAlphas('model.layers.0.mlp', alpha=(...))
    """
    options = checked_options(options)
    read = recipe if isinstance(recipe, Recipe) else read_recipe(as_config(recipe))
    with TemporaryDirectory() as folder:
        job = prepare(read, options, for_merge=False, rows_in=[Path(folder)])
    with with_direction(job) if job.recipe.settings.needs_rows else nullcontext(job) as ready:
        alphas = evaluate(ready, solve_job(ready, gather_statistics(ready)))
    warn_of_quality(alphas)
    return alphas


def checked_options(options: object) -> MergeOptions:
    """The options that a caller gives; mergekit's own defaults, quiet, if there are none.

    Raises:
        RecipeError: they are no `MergeOptions`.
    """
    if options is None:
        return MergeOptions(quiet=True)
    if isinstance(options, MergeOptions):
        return options
    raise RecipeError(
        f"`options` is of type {type(options).__name__}: it must be a `MergeOptions` of mergekit", code="invalid-value"
    )


def solve_job(job: Job, statistics: Statistics) -> Alphas:
    """Solve every submodule of a job from its statistics, in the recipe's order of models."""
    return assemble(statistics, _layout(job, statistics))


def gather_statistics(job: Job, resume: ResumeStore | None = None, ranks: Ranks = ALONE) -> Statistics:
    """Compute the statistics from which the job's objective is solved.

    Args:
        job: the recipe, prepared.
        resume: finished work of an earlier run of the same job; this run adds to it.
        ranks: processes that share the rows.

    Raises:
        DataError: an expert without rows.
        ModelError, RunError: NaN or Inf in weights or features, out of memory, or another process has ended.
    """
    if job.recipe.settings.needs_rows:
        job.check_rows()
    far = far_from_base(job) if ranks.is_first else {}
    for line in describe_far({"far_from_base": far}):
        LOG.warning("%s", line)
    statistics = objective(job.recipe.settings.objective).gather(job, resume, ranks)
    products = job.layer_products if job.recipe.settings.needs_rows else None
    layout = layout_of(job).model_copy(update={"far_from_base": far, "products": products})
    statistics.metadata |= {"fingerprint": statistics_fingerprint(job), KEY: layout.to_metadata()}
    return statistics


def with_settings_of(job: Job, statistics: Statistics) -> Statistics:
    """Saved statistics of a job with the settings of its solve in place of those that they were gathered with."""
    metadata = {"fingerprint": statistics_fingerprint(job), KEY: _layout(job, statistics).to_metadata()}
    return replace(statistics, metadata=statistics.metadata | metadata)


def _layout(job: Job, statistics: Statistics) -> Layout:
    """The layout of a job, with what was found when its statistics were gathered."""
    if KEY not in statistics.metadata:
        return layout_of(job)
    found = Layout.of(statistics)
    return layout_of(job).model_copy(update={"far_from_base": found.far_from_base, "products": found.products})


def statistics_fingerprint(job: Job) -> str:
    """Hash of everything that a job's statistics depend on."""
    return hash_identity(statistics_identity(job.recipe, job.identity))


def work_fingerprint(job: Job) -> str:
    """Hash of the statistics' fingerprint, the library versions and the device; the last two change the rounding."""
    plan = {
        "device": job.device.type,
        "batches": f"{BATCH_TOKENS} {GRADIENT_TOKENS} {PADDING} {HEAD_ELEMENTS}",
        "products": str(job.skeleton.products),
        "written": " ".join(drawn.sha256 for drawn in job.rows if drawn is not None and drawn.dataset == SELF),
    }
    return hash_identity({"statistics": statistics_fingerprint(job), **library_versions(), **plan})


def statistics_match(job: Job, statistics: Statistics) -> bool:
    """Whether saved statistics equal those that this job would compute."""
    return statistics.metadata.get("fingerprint") == statistics_fingerprint(job)


def far_from_base(job: Job) -> dict[str, float]:
    """Find experts that were probably not fine-tuned from the base: their middle layer is far from the base's.

    Returns:
        model -> ratio of Frobenius norms, its task vector of that layer over the base's layer, if it is above
        `MAX_RELATIVE_DISTANCE`.

    Raises:
        ModelError: a tensor of that layer is missing, or holds NaN or Inf.
    """
    prefix = f"{job.skeleton.layers_path}.{job.skeleton.num_layers // 2}."
    checkpoints = job.checkpoints()

    def squared_norms(name: str) -> Tensor:
        """Squared norms of the base's tensor and of every model's task vector, float64."""
        base, *experts = (weights[name] for weights in checkpoints.load([name], range(1 + len(models))))
        parts = [base, *(expert - base for expert in experts)]
        return torch.tensor([float(part.float().square().sum()) for part in parts], dtype=torch.float64)

    models = job.plan.models[1:]
    squares = torch.zeros(1 + len(models), dtype=torch.float64)
    for name in job.plan.tensors:
        if name.startswith(prefix) and len(job.skeleton.shapes.get(name, ())) > 1:
            squares += squared_norms(name)
    shares = (squares[1:] / max(float(squares[0]), 1e-30)).sqrt().tolist()
    found = {job.recipe.label(model): share for model, share in zip(models, shares, strict=True)}
    return {name: share for name, share in found.items() if share > MAX_RELATIVE_DISTANCE}
