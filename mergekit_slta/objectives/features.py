"""`objective: features`, the paper's: keep each expert's features on the rows of its own task (Eq. 11, 33)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_slta.files.layout import Layout
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.objectives.registry import Objective, Solved
from mergekit_slta.objectives.solving import solve_submodule

if TYPE_CHECKING:
    from mergekit_slta.job.job import Job
    from mergekit_slta.objectives.costs import Costs
    from mergekit_slta.runtime.distributed import Ranks
    from mergekit_slta.runtime.resume import ResumeStore


def _gather(job: Job, resume: ResumeStore | None, ranks: Ranks) -> Statistics:
    from mergekit_slta.objectives.feature_pass import gather_grams

    with job.clock.phase("features"):
        return gather_grams(job, resume=resume, ranks=ranks)


def _solve(statistics: Statistics, layout: Layout) -> Solved:
    return Solved(tuple(solve_submodule(submodule, statistics, layout) for submodule in layout.submodules))


def _estimate(job: Job) -> Costs:
    from mergekit_slta.objectives.costs import estimate_features

    return estimate_features(job)


OBJECTIVE = Objective(_gather, _solve, _estimate)
