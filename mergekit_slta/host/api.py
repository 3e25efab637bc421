"""`merge` and `check` for Python and for the commands of the same names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_slta.calibration.calibrate import checked_options
from mergekit_slta.calibration.recorded_day import recorded_day
from mergekit_slta.calibration.reuse import check_before_reading
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.inside import output_path
from mergekit_slta.files.names import ALPHAS_NAME
from mergekit_slta.files.targets import check_alphas_target
from mergekit_slta.host.method import register
from mergekit_slta.host.wrap import wrap_run_merge
from mergekit_slta.job.forecast import forecast
from mergekit_slta.job.job import Job
from mergekit_slta.job.preflight import prepare
from mergekit_slta.objectives.costs import Costs
from mergekit_slta.objectives.registry import estimate
from mergekit_slta.recipe.load import as_config, load_config
from mergekit_slta.recipe.read import read_recipe
from mergekit_slta.recipe.recipe import Recipe
from mergekit_slta.reporting.plan_numbers import numbers_of_job


def merge(
    recipe: MergeConfiguration | Mapping[str, Any] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: MergeOptions | None = None,
    *,
    verify: bool = False,
    overwrite: bool = False,
) -> Alphas:
    """Calibrate a recipe and merge it into a folder, as `mergekit-yaml RECIPE OUT` does.

    Args:
        recipe: a recipe file's path, its content as a mapping, or mergekit's configuration.
        out: folder for the merged model. The results of an earlier run with the same recipe are used.
        options: mergekit's options (device, caches, ...); by default mergekit's own defaults, on the CPU, quiet.
        verify: measure the residual of each merged submodule beside the predicted one.
        overwrite: replace weights in `out` that no merge of this package wrote.

    Returns:
        The alphas of the merge, which are also in `out/slta_alphas.json`.

    Raises:
        SltaError: the recipe, the data, the models or the folder are refused, or the run failed. `out` then holds what
            it held before.

    Examples:
        >>> alphas = mergekit_slta.merge("recipe.yml", "merged")
        >>> alphas
        Alphas(6 submodules, attn_mlp, models/math, models/words, base models/base)
    """
    import mergekit.merge

    options = checked_options(options)
    config, source = load_config(recipe) if isinstance(recipe, (str, os.PathLike)) else (as_config(recipe), None)
    read_recipe(config)
    register()
    wrap_run_merge(mergekit.merge)
    run_merge: Any = mergekit.merge.run_merge
    run_merge(config, str(out), options, config_source=source, verify_residuals=verify, overwrite=overwrite)
    return Alphas.load(Path(out) / ALPHAS_NAME)


def check(
    recipe: Recipe | MergeConfiguration | Mapping[str, Any] | str | os.PathLike[str],
    options: MergeOptions | None = None,
) -> dict[str, Any]:
    """Check a recipe, its models and its data, and estimate what a merge takes. No weights are read.

    Args:
        recipe: a recipe file's path, its content as a mapping or as mergekit's configuration, or a `Recipe`.
        options: mergekit's options; its device is planned for, and may be on another machine.

    Returns:
        The plan and its cost, as `mergekit-slta check --json` prints it: models, rows, sizes in bytes, operations, and
        the seconds of each phase (None if the device is not here).

    Raises:
        SltaError: what a merge would refuse.

    Examples:
        >>> plan = mergekit_slta.check("recipe.yml")
        >>> plan["objective"], plan["submodules"]
        ('features', 6)
    """
    job = check_job(recipe, checked_options(options))
    costs, seconds = costs_of(job)
    return numbers_of_job(job, costs, seconds)


def check_job(recipe: Any, options: MergeOptions) -> Job:
    """Check all that a merge of a recipe, given as in `check`, would check before it reads weights.

    Raises:
        SltaError: what a merge would refuse.
    """
    read = recipe if isinstance(recipe, Recipe) else read_recipe(as_config(recipe))
    named = output_path(read.settings.alphas, ALPHAS_NAME) if read.settings.alphas else None
    if named:
        check_alphas_target(named)
    places = [named] if named else []
    job = prepare(read, options, need_rows=not (named and named.exists()), day=recorded_day(places), plan_only=True)
    check_before_reading(job, Path.cwd(), places, named=named is not None)
    return job


def costs_of(job: Job) -> tuple[Costs, dict[str, float] | None]:
    """The estimated costs of a job, and the seconds of each phase if its device is here."""
    costs = estimate(job)
    return costs, forecast(job, costs.phases)
