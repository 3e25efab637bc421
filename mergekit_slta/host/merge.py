"""Run the pre-pass before mergekit's `run_merge`, and move a finished merge to the output folder OUT.

Scope: the work before and after mergekit's own merge.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_slta.calibration.recorded_day import recorded_day
from mergekit_slta.calibration.reuse import (
    check_before_reading,
    check_disk_space,
    is_calibrated,
    resumable,
    reuse_or_calibrate,
    statistics_beside,
)
from mergekit_slta.errors import RunError, SltaError, listing, show
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.inside import output_path
from mergekit_slta.files.merge_record import Took, record_sources, record_took
from mergekit_slta.files.names import ALPHAS_NAME, ROWS_FOLDER, STATISTICS_NAME, direction_folder
from mergekit_slta.files.output_folder import (
    calibrating,
    check_output,
    forget_calibration,
    keep_rows,
    pending,
    staged,
)
from mergekit_slta.files.statistics_file import Statistics, is_statistics_file
from mergekit_slta.files.targets import check_alphas_target, save_results, write_results
from mergekit_slta.generation.store import rows_of
from mergekit_slta.host.finish import finish_output
from mergekit_slta.host.method import ActiveMerge, active, register
from mergekit_slta.host.sources import sources_of
from mergekit_slta.job.direction import StoredDirection
from mergekit_slta.job.job import Job
from mergekit_slta.job.preflight import prepare
from mergekit_slta.libraries.mergekit import forget_loaders
from mergekit_slta.libraries.mergekit_plan import defined
from mergekit_slta.libraries.transformers import without_dtype_warning
from mergekit_slta.recipe.read import check_content, read_recipe
from mergekit_slta.reporting.report import add_section
from mergekit_slta.reporting.terminal import describe_merge
from mergekit_slta.runtime.interruption import before_calibration, interruptible
from mergekit_slta.runtime.screen import print_parts
from mergekit_slta.runtime.warnings_log import collected_warnings

LOG = logging.getLogger(__name__)
_MERGES = itertools.count(1)
"""Numbers the merges of this process, because two merges that run at once may name the same alphas file."""


def run(
    original: Callable[..., Any],
    merge_config: MergeConfiguration,
    out_path: str,
    options: MergeOptions,
    config_source: str | None = None,
    *args: Any,
    verify_residuals: bool = False,
    overwrite: bool = False,
    **kwargs: Any,
) -> Any:
    """Run the pre-pass, then mergekit's `run_merge`; then add the section to the model card.

    Args:
        original: mergekit's own function.
        merge_config, out_path, options, config_source: as in mergekit's function; the configuration is not changed.
        args, kwargs: further arguments, passed to mergekit's function.
        verify_residuals: measure the residual of each merged submodule; see `calibration.verify`.
        overwrite: replace weights of another origin in OUT; see `files.output_folder`.

    Returns:
        What mergekit's function returns.

    Raises:
        SltaError: the recipe, the data, the models or the output folder are refused, or the run failed or was
            interrupted. OUT then holds the weights that it held before, and none of this run.
    """

    def merge_into(folder: Path, config: MergeConfiguration) -> Any:
        return original(config, str(folder), options, config_source or merge_config.to_yaml(), *args, **kwargs)

    try:
        with collected_warnings() as warnings, without_dtype_warning():
            return _run(
                merge_into, merge_config, out_path, options, config_source, verify_residuals, overwrite, warnings
            )
    except SltaError as error:
        if options.verbosity:
            LOG.exception("the merge was refused or failed")
        raise error
    except (click.ClickException, click.exceptions.Exit):
        raise
    except Exception as error:
        if options.verbosity:
            LOG.exception("the merge failed")
        raise RunError(
            f"the merge failed ({type(error).__name__}): {show(error)}; -v shows where", code="merge-failed"
        ) from error


def merge_recipe(content: dict[str, Any], out: Path) -> None:
    """Merge a recipe that is given by its content, quietly and without a model card.

    Raises:
        SltaError: see `run`.
    """
    import mergekit.merge

    from mergekit_slta.host.wrap import wrap_run_merge

    register()
    wrap_run_merge(mergekit.merge)
    options = MergeOptions(write_model_card=False, quiet=True)
    mergekit.merge.run_merge(MergeConfiguration.model_validate(content), str(out), options)


def _run(
    merge_into: Callable[[Path, MergeConfiguration], Any],
    merge_config: MergeConfiguration,
    out_path: str,
    options: MergeOptions,
    config_source: str | None,
    verify_residuals: bool,
    overwrite: bool,
    warnings: Sequence[str],
) -> Any:
    _check_source(config_source)
    recipe = stated = read_recipe(merge_config)
    out = Path(out_path)
    inputs = [path.path for model in recipe.models for path in (model.model, model.lora) if path is not None]
    replaced = check_output(out, inputs, overwrite=overwrite)
    named = recipe.settings.alphas
    path = output_path(named, ALPHAS_NAME) if named else out.absolute() / ALPHAS_NAME
    check_alphas_target(path, out)
    places = [path] if named else [path, calibrating(out) / ALPHAS_NAME, pending(out) / ALPHAS_NAME]
    rows_in = [folder / ROWS_FOLDER for folder in (out, path.parent, calibrating(out))]
    with interruptible(before_calibration):
        job = prepare(
            recipe,
            options,
            need_rows=not (named and path.exists()),
            day=recorded_day(places),
            rows_in=rows_in,
            is_calibrated=partial(is_calibrated, places=places, verified=verify_residuals),
            before_reading=lambda planned: check_before_reading(planned, out, places, named=named is not None),
        )
    recipe = job.recipe
    check_disk_space(job, out, places)
    own = places[0] if named else places[1]
    with resumable(job, own) as resume:
        alphas, statistics = reuse_or_calibrate(
            job, places, must_match=named is not None, verified=verify_residuals, resume=resume,
            directions=direction_folder(own),
        )  # fmt: skip
        if statistics is not None:
            write = write_results if named else save_results
            write(alphas, statistics, own)

    config = recipe.config.model_copy(deep=True)
    config.chat_template = job.chat_template
    key = f"{path}#{next(_MERGES)}"
    config.parameters = {**(config.parameters or {}), "alphas": key}
    columns = {model: alphas.models.index(recipe.label(model)) for model in recipe.models[1:]}
    direction = StoredDirection(alphas, direction_folder(own))
    rule = recipe.settings.uncalibrated
    merge = ActiveMerge(alphas, columns, config.out_dtype is not None, direction.read, rule)
    try:
        with (
            interruptible(lambda: "the weights of the experts are kept; run the same command again, and it merges"),
            staged(out, overwrite=overwrite) as folder,
            active(key, merge),
            defined(key, job.plan.definition),
        ):
            alphas.of_merge(rule).save(folder / ALPHAS_NAME)  # OUT keeps the alphas of its merge
            keep_rows(out, folder, {name: path for _, name, path in rows_of(alphas, rows_in)})
            _keep_statistics(statistics or statistics_beside(job, path), alphas, path, folder)
            with job.clock.phase("merge"):
                result = merge_into(folder, config)
                finish_output(job, folder)
            took = _took(job)
            record_took(folder, took)
            record_sources(folder, sources_of(stated, options))
            if options.write_model_card:
                add_section(folder)
        direction.remove()
        forget_calibration(out)
        if replaced:
            job.say(f"Replaced weights of another origin in {show(out)}: {listing(replaced)}")
        if not options.quiet:
            _say_end(alphas, out, took, warnings, is_evaluated=recipe.settings.evaluate)
        return result
    finally:
        forget_loaders(recipe.models)


def _say_end(alphas: Alphas, out: Path, took: Took, warnings: Sequence[str], *, is_evaluated: bool) -> None:
    """Print what a merge has made. A failure is logged: the merge is complete."""
    try:
        print_parts(*describe_merge(alphas, out, took, warnings, is_evaluated=is_evaluated), err=True)
    except Exception as error:
        LOG.warning("%s is complete, and what it holds cannot be printed (%s)", show(out), show(error))


def _took(job: Job) -> Took:
    """What the job has taken so far."""
    peak = torch.cuda.max_memory_allocated(job.device) if job.device.type == "cuda" else None
    seconds = {phase: round(taken, 3) for phase, taken in job.clock.seconds.items()}
    return Took(seconds, str(job.device), torch.get_num_threads(), peak)


def _keep_statistics(statistics: Statistics | None, alphas: Alphas, path: Path, folder: Path) -> None:
    """Save the statistics of a merge beside its alphas.

    Args:
        statistics: those that are the job's, if there are any.
        alphas, path: the alphas and their file. If `solve` made it, its statistics are kept even if they also hold
            other models or rows than the job's.
        folder: where they are saved.
    """
    if statistics is not None:
        statistics.save(folder / STATISTICS_NAME)
    elif alphas.solved_from is not None:
        source = path.with_name(alphas.solved_from)
        if is_statistics_file(source):
            shutil.copyfile(source, folder / STATISTICS_NAME)


def _check_source(source: str | None) -> None:
    """Refuse keys that mergekit ignores, if the recipe's text is given.

    Raises:
        RecipeError: see `check_content`.
    """
    try:
        content = yaml.safe_load(source or "")
    except yaml.YAMLError:  # the caller passed some other text; only the configuration is used
        return
    if isinstance(content, dict):
        check_content(content)
