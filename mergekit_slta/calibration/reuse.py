"""Get the alphas for a merge: reuse a file that fits, solve saved statistics again, or calibrate.

Scope: the choice among the three, where unfinished work is kept, and the check for free disk space.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mergekit_slta.calibration.assemble import warn_of_quality
from mergekit_slta.calibration.calibrate import (
    gather_statistics,
    solve_job,
    statistics_fingerprint,
    statistics_match,
    with_settings_of,
    work_fingerprint,
)
from mergekit_slta.calibration.evaluate import evaluate
from mergekit_slta.calibration.routing import is_routing_wanted, measure_routing
from mergekit_slta.calibration.verify import is_verified, verify
from mergekit_slta.checkpoints.hub import check_room
from mergekit_slta.errors import AlphasError, ModelError, OutputError, RecipeError, RunError, show
from mergekit_slta.files.alphas_file import Alphas, describe_far
from mergekit_slta.files.identity import describe, differences
from mergekit_slta.files.inside import statistics_of
from mergekit_slta.files.json_file import OTHER_VERSION
from mergekit_slta.files.names import ALPHAS_NAME, direction_folder, resume_folder
from mergekit_slta.files.output_folder import free_bytes
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.files.targets import check_alphas_target, write_results
from mergekit_slta.job.direction import with_direction
from mergekit_slta.job.identity import ROW_SETTINGS
from mergekit_slta.job.job import Job
from mergekit_slta.objectives.registry import estimate
from mergekit_slta.runtime.distributed import ALONE, Ranks
from mergekit_slta.runtime.interruption import interruptible
from mergekit_slta.runtime.resume import ResumeStore

LOG = logging.getLogger(__name__)


@contextmanager
def resumable(job: Job, path: Path) -> Iterator[ResumeStore]:
    """Keep the finished parts of a calibration that writes `path`, until its results are written.

    Raises:
        InterruptionError: Ctrl-C in a command.
    """

    def how() -> str:
        if resume.finished:
            count = len(resume.finished)
            kept = f"{count} finished parts are" if count > 1 else "1 finished part is"
            return f"{kept} kept; run the same command again, and it goes on"
        if direction_folder(path).is_dir():
            return "the finished part of the direction is kept; run the same command again, and it goes on"
        if job.recipe.settings.granularity == "model":
            return "a calibration with `granularity: model` starts over; run the same command again"
        return "nothing is finished yet; run the same command again, and it starts over"

    with ResumeStore(resume_folder(path), work_fingerprint(job), job.day) as resume, interruptible(how):
        yield resume
        resume.remove()  # the results have been written


def reuse_or_calibrate(
    job: Job,
    places: Sequence[Path],
    *,
    must_match: bool,
    verified: bool = False,
    resume: ResumeStore | None = None,
    directions: Path | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Alphas, Statistics | None]:
    """Get the alphas of a job: from a file that fits, else from the statistics beside a file, else from a calibration.

    Args:
        job: what is to be merged.
        places: the alphas file, then other paths where an earlier run may have left one.
        must_match: raise an error if the file exists and does not fit (because the recipe names it).
        verified: measure the residuals, too. A new calibration with `inputs: merged` always does.
        resume: unfinished work.
        directions: folder for the tensors of a closed form, which stay there.
        ranks: processes that share a calibration.

    Returns:
        The alphas, and the statistics if they have to be written.

    Raises:
        AlphasError: the file is not an alphas file; or it is for another job, and `must_match` is set.
        DataError: residuals have to be measured, and an expert has no rows.
        RecipeError: `verified` is set, and the objective has no residuals to measure.
    """
    settings = job.recipe.settings
    if verified and not settings.own.measures_residuals:
        raise RecipeError(
            f"--verify compares the base's features, which `objective: {settings.objective}` does not use: "
            "drop --verify",
            code="conflicting-keys",
        )

    def lock() -> None:
        if resume is not None:
            resume.lock()

    stack = ExitStack()
    ready: list[Job] = []

    def job_with_direction(ranks: Ranks = ALONE) -> Job:
        if not ready:
            ready.append(stack.enter_context(with_direction(job, directions, ranks)))
        return ready[0]

    def gather() -> Statistics:
        if resume is not None:
            resume.open()
            if resume.finished:
                job.say(f"Resuming an earlier run: {len(resume.finished)} parts of the calibration are done")
        ranks.broadcast(True)  # the others wait in `help_calibrate`
        try:
            return gather_statistics(job_with_direction(ranks) if settings.own.needs_rows else job, resume, ranks)
        except ModelError:  # a second run would fail at the same place
            if resume is not None:
                resume.remove()
            raise

    with stack:
        alphas, statistics = _reuse_or_calibrate(job, places, lock, gather, must_match=must_match)
        fresh = statistics is not None and settings.own.inputs_are_merged
        wanted = (verified or fresh) and not is_verified(alphas)
        if wanted and statistics is None:
            lock()
            statistics = statistics_beside(job, places[0]) or gather()
        ranks.broadcast(False)
        if wanted and statistics is not None:
            alphas = verify(job_with_direction(), alphas, statistics)
        if settings.evaluate and alphas.evaluation is None and None not in job.rows:
            measured = job_with_direction() if job.held_out_examples() else job
            alphas = evaluate(measured, alphas)
        if is_routing_wanted(job, alphas):
            alphas = measure_routing(job_with_direction(), alphas)
    warn_of_quality(alphas)
    return alphas, statistics


def _reuse_or_calibrate(
    job: Job, places: Sequence[Path], lock: Callable[[], None], gather: Callable[[], Statistics], *, must_match: bool
) -> tuple[Alphas, Statistics | None]:
    before = _versions(places)
    found = _reuse(job, places, must_match=must_match)
    if found is None:
        lock()  # from here on this run writes the file
        if _versions(places) != before:  # another run has written them meanwhile
            found = _reuse(job, places, must_match=must_match)
    if found is not None:
        return found
    for path in places:
        statistics = statistics_beside(job, path)
        if statistics is not None:
            job.say(f"Solving again from the statistics in {show(statistics_of(path))}")
            return _warned(solve_job(job, statistics)), with_settings_of(job, statistics)
    statistics = gather()
    return solve_job(job, statistics), statistics


def _reuse(job: Job, places: Sequence[Path], *, must_match: bool) -> tuple[Alphas, Statistics | None] | None:
    for place, path in enumerate(places):
        alphas = load_matching(job, path, must_match=must_match)
        if alphas is not None:
            job.say(f"Reusing the alphas in {show(path)}")
            return _warned(alphas), None if place == 0 else statistics_beside(job, path)
    return None


def _warned(alphas: Alphas) -> Alphas:
    """Repeat the warning of the calibration that the alphas are from."""
    for line in describe_far(alphas.calibration):
        LOG.warning("%s", line)
    return alphas


def _versions(paths: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Inode and modification time of each file, to detect a replaced file; None for a missing file."""
    stats = [path.stat() if path.exists() else None for path in paths]
    return [None if stat is None else (stat.st_ino, stat.st_mtime_ns) for stat in stats]


def help_calibrate(job: Job, ranks: Ranks, fingerprint: str) -> None:
    """Compute this process's share of every calibration that the first process starts.

    Args:
        job: the job, as this process has prepared it.
        ranks: all processes.
        fingerprint: fingerprint of the job's statistics in the first process.

    Raises:
        SltaError: the share failed, this process has prepared another job, or another process has ended.
    """
    if statistics_fingerprint(job) != fingerprint:
        raise RunError(
            f"process {ranks.rank} sees other models or data than the first one: give all the same files and versions",
            code="processes-differ",
        )
    with ExitStack() as stack:
        while ranks.broadcast(None):
            if job.recipe.settings.own.needs_rows:
                job = stack.enter_context(with_direction(job, None, ranks))
            gather_statistics(job, None, ranks)


def statistics_beside(job: Job, alphas: Path) -> Statistics | None:
    """Load the statistics beside an alphas file; None if there are none or they are not the job's."""
    beside = statistics_of(alphas)
    if not beside.is_file():
        return None
    try:
        statistics = Statistics.load(beside)
    except AlphasError as error:
        LOG.warning("%s; they are gathered anew", error.message)
        return None
    return statistics if statistics_match(job, statistics) else None


def load_matching(job: Job, path: Path, *, must_match: bool) -> Alphas | None:
    """Load the alphas at `path` if they fit the job; None if there is no file, or it does not fit and need not.

    Raises:
        AlphasError: see `reuse_or_calibrate`.
    """
    if not path.exists():
        return None
    try:
        alphas = Alphas.load(path)
        unread = [job.recipe.label(model) for model in job.plan.unread]
        unlike = differences(job.identity, alphas.identity, (alphas.base_model, *alphas.models), unread)
        unlike += _other_row_settings(job, alphas)
        if not unlike:
            return alphas
        reason = f"is for another merge (other {describe(sorted(unlike))})"
    except AlphasError as error:
        if must_match or (path.name != ALPHAS_NAME and error.code != OTHER_VERSION):
            raise
        reason = f"cannot be used ({error.message})"  # this package's own file, damaged
    if must_match:
        raise AlphasError(
            f"the alphas file {show(path)} {reason}: calibrate again, or correct the recipe",
            code="alphas-of-another-merge",
        )
    job.say(f"{show(path)} {reason}: computing it anew")
    return None


def is_calibrated(job: Job, places: Sequence[Path], *, verified: bool) -> bool:
    """Whether a file holds the alphas of a job, so that `reuse_or_calibrate` needs no rows; says nothing."""
    for path in places:
        with suppress(AlphasError):
            alphas = load_matching(job, path, must_match=True)
            if alphas is not None:
                return is_verified(alphas) or not verified
    return False


def _other_row_settings(job: Job, alphas: Alphas) -> list[str]:
    """Row settings that a recipe without datasets states and that differ from those in the file."""
    if None not in job.rows:
        return []
    settings = job.recipe.settings
    stated = [key for key in ROW_SETTINGS if key in settings.stated]
    return [key for key in stated if alphas.calibration.get(key) != getattr(settings, key)]


def check_disk_space(job: Job, out: Path, places: Sequence[Path] = ()) -> None:
    """Check that the merged model, and the activations of a calibration, fit on the disk.

    Args:
        job: what is to be merged.
        out: a path on the disk.
        places: paths where alphas may exist. If one exists, no space is needed for activations.

    Raises:
        OutputError: there is too little space; the message gives the needed and the free bytes.
    """
    costs = estimate(job)
    calibrated = any(path.exists() or statistics_of(path).exists() for path in places)
    needed = costs.written_bytes + (0 if calibrated else costs.scratch_bytes)
    free = free_bytes(out)
    if needed > free:
        raise OutputError(
            f"{show(out)} needs {needed / 2**30:.1f} GiB and its disk has {free / 2**30:.1f} GiB left: "
            "free some, or choose another folder",
            code="disk-full",
        )
    check_room(job.plan.downloads, out, needed)


def check_before_reading(job: Job, out: Path, places: Sequence[Path], *, named: bool) -> None:
    """Check what needs no weights and no more than the recipe, before weights are downloaded.

    Args:
        job: the job; its weights may be on the Hub.
        out: a path on the output's disk.
        places: the alphas file, then other paths where an earlier run may have left one.
        named: whether the recipe names the alphas file.

    Raises:
        OutputError: there is too little space on a disk.
        AlphasError: the named alphas file is for another merge. Weights that are not there are not compared.
    """
    check_disk_space(job, out, places)
    if named:
        load_matching(job, places[0], must_match=True)


def calibrate_to(job: Job, path: Path, *, verified: bool = False, ranks: Ranks = ALONE) -> tuple[Alphas, bool]:
    """Calibrate a job and write its alphas to `path`; returns them, and whether `path` already held them.

    Raises:
        OutputError, AlphasError: see `check_alphas_target` and `reuse_or_calibrate`.
    """
    check_alphas_target(path)
    with resumable(job, path) as resume:
        alphas, statistics = reuse_or_calibrate(
            job,
            [path],
            must_match=False,
            verified=verified,
            resume=resume,
            directions=direction_folder(path),
            ranks=ranks,
        )
        if statistics is not None:
            write_results(alphas, statistics, path)
    return alphas, statistics is None
