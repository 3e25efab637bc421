"""Around mergekit's `run_merge`: the pre-pass before it, OUT kept clean through it.

Scope: decides whether alphas are reused, solved again or computed; where they are written; and what happens to files
of an earlier merge. Runs on the main thread, before OUT exists.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_slta.calibration.calibrate import (
    gather_statistics,
    solve_job,
    statistics_fingerprint,
    statistics_match,
    statistics_metadata,
    work_fingerprint,
)
from mergekit_slta.calibration.verify import is_verified, verify
from mergekit_slta.checkpoints.plan import forget_loaders
from mergekit_slta.errors import AlphasError, ModelError, OutputError, RecipeError, RunError, SltaError, show
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.atomic import write_text_atomically
from mergekit_slta.files.identity import describe, differences
from mergekit_slta.files.output_folder import (
    ALPHAS_NAME,
    STATISTICS_NAME,
    calibrating,
    check_output,
    forget_calibration,
    free_bytes,
    pending,
    staged,
)
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.files.targets import check_target, save_results, write_results
from mergekit_slta.host.method import ActiveMerge, active
from mergekit_slta.job.preflight import Job, prepare
from mergekit_slta.objectives.costs import estimate
from mergekit_slta.recipe.read import read_recipe
from mergekit_slta.reporting.report import add_section
from mergekit_slta.runtime.distributed import ALONE, Ranks
from mergekit_slta.runtime.resume import ResumeStore

LOG = logging.getLogger(__name__)


def run(
    original: Callable[..., Any],
    merge_config: MergeConfiguration,
    out_path: str,
    options: MergeOptions,
    config_source: str | None = None,
    *,
    verify_residuals: bool = False,
) -> Any:
    """mergekit's `run_merge`, with the pre-pass before it and the model card's section behind it.

    Args:
        original: mergekit's own function.
        merge_config, out_path, options, config_source: as mergekit's; the configuration is not changed.
        verify_residuals: measure the residual that remains in each merged submodule; see `verification.py`.

    Raises:
        SltaError: the recipe, the data, the models or the output folder are refused, or the run failed. Where it
            failed, OUT is left without weights of this run, and with those that it held before.
    """
    try:
        return _run(original, merge_config, out_path, options, config_source, verify_residuals)
    except SltaError as error:
        if options.verbosity:
            LOG.exception("the merge was refused or failed")
        raise error
    except (click.ClickException, click.exceptions.Exit):
        raise
    except Exception as error:
        if options.verbosity:
            LOG.exception("the merge failed")
        raise RunError(f"the merge failed ({type(error).__name__}): {show(error)}; -v shows where") from error


def _run(
    original: Callable[..., Any],
    merge_config: MergeConfiguration,
    out_path: str,
    options: MergeOptions,
    config_source: str | None,
    verify_residuals: bool,
) -> Any:
    recipe = read_recipe(merge_config)
    out = Path(out_path)
    check_output(out, [model.model.path for model in recipe.models])
    named = recipe.settings.alphas
    path = Path(named).absolute() if named else out.absolute() / ALPHAS_NAME
    check_target(path, out)
    job = prepare(recipe, options, need_rows=not (named and path.exists()))
    places = [path] if named else [path, calibrating(out) / ALPHAS_NAME, pending(out) / ALPHAS_NAME]
    check_disk_space(job, out, places)
    own = places[0] if named else places[1]
    with resumable(job, own) as records:
        alphas, statistics = reuse_or_calibrate(
            job, places, must_match=named is not None, verified=verify_residuals, records=records
        )
        if statistics is not None:
            write = write_results if named else save_results
            write(alphas, statistics, own)

    config = recipe.config.model_copy(deep=True)
    config.parameters = {**(config.parameters or {}), "alphas": str(path)}
    columns = {task.model: alphas.models.index(recipe.label(task.model)) for task in recipe.tasks}
    merge = ActiveMerge(alphas, columns, keep_precision=config.out_dtype is not None)
    try:
        with staged(out) as folder, active(str(path), merge):
            alphas.save(folder / ALPHAS_NAME)  # what OUT is merged with stays with it
            kept = statistics or _statistics_at(job, path)
            if kept is not None:
                kept.save(folder / STATISTICS_NAME)
            result = original(config, str(folder), options, config_source or merge_config.to_yaml())
            _untie_config(job, folder)
            if options.write_model_card:
                add_section(folder)
        forget_calibration(out)
        return result
    finally:
        forget_loaders(recipe.models)


def _untie_config(job: Job, out: Path) -> None:
    """Where an expert has an output projection of its own, so has the merged model: a tied base's config would make
    transformers drop it."""
    path = out / "config.json"
    if job.plan.is_tied or not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if job.base_is_tied:
        config["tie_word_embeddings"] = False
        write_text_atomically(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
        _say(job, "The base's embeddings are tied and an expert's are not: the merged model is written untied")


@contextmanager
def resumable(job: Job, path: Path) -> Iterator[ResumeStore]:
    """ResumeStore of a calibration whose alphas go to `path`, for the next run if this one does not get to its end."""
    with ResumeStore(path.with_name(f".{path.name}.partial"), work_fingerprint(job)) as records:
        yield records
        records.remove()  # what they were kept for has been written


def reuse_or_calibrate(
    job: Job,
    places: Sequence[Path],
    *,
    must_match: bool,
    verified: bool = False,
    records: ResumeStore | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Alphas, Statistics | None]:
    """Alphas of a job: those at hand if they fit, else from the statistics beside them, else from a calibration.

    Args:
        job: what is to be merged.
        places: the alphas file; behind it, where else one may have been left.
        must_match: a file that exists and does not fit is an error (the recipe named it), not a reason to calibrate.
        verified: with measured residuals. New ones under `inputs: merged` always have them.
        records: of unfinished work.
        ranks: processes that share a calibration.

    Returns:
        The alphas, and the statistics where they have to be written.

    Raises:
        AlphasError: the file is no alphas file, or is for something else and `must_match`.
        DataError: residuals have to be measured, and an expert has no rows.
        RecipeError: residuals are asked for, and the objective has none.
    """
    objective = job.recipe.settings.objective
    if verified and objective != "features":
        raise RecipeError(
            f"--verify compares the base's features, and `objective: {objective}` has none: drop --verify"
        )

    def gather() -> Statistics:
        if records is not None:
            records.open()
            if records.finished:
                _say(job, f"Going on where an earlier run stopped: {len(records.finished)} steps are done")
        ranks.broadcast(True)  # the others wait in `help_calibrate`
        try:
            return gather_statistics(job, records, ranks)
        except ModelError:  # a second run would end there, too
            if records is not None:
                records.remove()
            raise

    alphas, statistics = _reuse_or_calibrate(job, places, gather, must_match=must_match)
    fresh = statistics is not None and job.recipe.settings.inputs == "merged"
    wanted = (verified or fresh) and not is_verified(alphas)
    if wanted and statistics is None:
        statistics = _statistics_at(job, places[0]) or gather()
    ranks.broadcast(False)
    if wanted and statistics is not None:
        alphas = verify(job, alphas, statistics)
    return alphas, statistics


def help_calibrate(job: Job, ranks: Ranks, mark: str) -> None:
    """What processes other than the first do: their share of every calibration that the first one starts.

    Args:
        job: as this process sees it.
        ranks: all processes.
        mark: the fingerprint of the job as the first process sees it.

    Raises:
        SltaError: their share failed, they see another job, or another process is gone.
    """
    if statistics_fingerprint(job) != mark:
        raise RunError(
            f"process {ranks.rank} sees other models or data than the first one: give all the same files and versions"
        )
    while ranks.broadcast(None):
        gather_statistics(job, None, ranks)


def _reuse_or_calibrate(
    job: Job, places: Sequence[Path], gather: Callable[[], Statistics], *, must_match: bool
) -> tuple[Alphas, Statistics | None]:
    for place, path in enumerate(places):
        alphas = load_matching(job, path, must_match=must_match)
        if alphas is not None:
            _say(job, f"Reusing the alphas in {show(path)}")
            return alphas, None if place == 0 else _statistics_at(job, path)
    for path in places:
        statistics = _statistics_at(job, path)
        if statistics is not None:
            _say(job, f"Solving again from the statistics in {show(path.with_name(STATISTICS_NAME))}")
            statistics.metadata = statistics_metadata(job)  # the weighing that is solved for now
            return solve_job(job, statistics), statistics
    statistics = gather()
    return solve_job(job, statistics), statistics


def _statistics_at(job: Job, alphas: Path) -> Statistics | None:
    """The statistics beside an alphas file, where there are any and they are what the job would gather."""
    beside = alphas.with_name(STATISTICS_NAME)
    if not beside.is_file():
        return None
    try:
        statistics = Statistics.load(beside)
    except AlphasError as error:
        LOG.warning("%s; they are gathered anew", error.message)
        return None
    return statistics if statistics_match(job, statistics) else None


def load_matching(job: Job, path: Path, *, must_match: bool) -> Alphas | None:
    """The alphas at `path` if they fit the job; None where there is no file, or one that does not and need not fit.

    Raises:
        AlphasError: see `reuse_or_calibrate`.
    """
    if not path.exists():
        return None
    try:
        alphas = Alphas.load(path)
        unlike = differences(job.identity, alphas.identity)
        if not unlike:
            return alphas
        reason = f"is for another merge (other {describe(unlike)})"
    except AlphasError as error:
        if must_match or path.name != ALPHAS_NAME:
            raise
        reason = f"cannot be used ({error.message})"  # our own file, damaged: computed anew
    if must_match:
        raise AlphasError(f"the alphas file {show(path)} {reason}: calibrate again, or mend the recipe")
    _say(job, f"{show(path)} {reason}: computing it anew")
    return None


def _say(job: Job, text: str) -> None:
    if not job.options.quiet:
        click.echo(text, err=True)


def check_disk_space(job: Job, out: Path, places: Sequence[Path] = ()) -> None:
    """Refuse a disk that the merged model does not fit on.

    Args:
        job: what is to be merged.
        out: a path on the disk.
        places: where alphas may have been left. If there are any, no room for a calibration's features is asked for.

    Raises:
        OutputError: with both figures.
    """
    costs = estimate(job)
    calibrated = any(path.exists() or path.with_name(STATISTICS_NAME).exists() for path in places)
    needed = costs.written_bytes + (0 if calibrated else costs.scratch_bytes)
    free = free_bytes(out)
    if needed > free:
        raise OutputError(
            f"{show(out)} needs {needed / 2**30:.1f} GiB and its disk has {free / 2**30:.1f} GiB left: "
            "free some, or choose another folder"
        )


def calibrate_to(job: Job, path: Path, *, verified: bool = False, ranks: Ranks = ALONE) -> tuple[Alphas, bool]:
    """The `calibrate` command: alphas of a job in `path`. Returns them, and whether they were there already.

    Raises:
        OutputError, AlphasError: see `check_target` and `reuse_or_calibrate`.
    """
    check_target(path)
    with resumable(job, path) as records:
        alphas, statistics = reuse_or_calibrate(
            job, [path], must_match=False, verified=verified, records=records, ranks=ranks
        )
        if statistics is not None:
            write_results(alphas, statistics, path)
    return alphas, statistics is None
