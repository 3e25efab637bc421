"""`objective: features`, the paper's: keep what every expert changes of the features of its own task (Eq. 11, 33)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_slta.files.alphas_file import SubmoduleAlphas
from mergekit_slta.files.layout import Layout, LayoutSubmodule
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.maths.closed_form import solve_closed_form
from mergekit_slta.objectives.entries import make_entry, select
from mergekit_slta.objectives.registry import Objective, Solved

if TYPE_CHECKING:
    from mergekit_slta.job.job import Job
    from mergekit_slta.objectives.costs import Costs
    from mergekit_slta.runtime.distributed import Ranks
    from mergekit_slta.runtime.resume import ResumeStore


def _gather(job: Job, resume: ResumeStore | None, ranks: Ranks) -> Statistics:
    from mergekit_slta.objectives.feature_pass import gather_grams

    return gather_grams(job, resume=resume, ranks=ranks)


def _solve(statistics: Statistics, layout: Layout) -> Solved:
    return Solved(tuple(solve_submodule(submodule, statistics, layout) for submodule in layout.submodules))


def solve_submodule(
    submodule: LayoutSubmodule, statistics: Statistics, layout: Layout, objectives: Sequence[str] | None = None
) -> SubmoduleAlphas:
    """Solve one submodule by itself (Eq. 12).

    Args:
        submodule: of the layout.
        statistics: Gram matrices.
        layout: of the statistics; its solve settings are used.
        objectives: names of the Gram matrices to use, where the submodule's own are not all there yet.

    Raises:
        AlphasError: the statistics lack one of them.
    """
    solution = solve_closed_form(
        select(statistics, objectives or submodule.objectives),
        statistics.row_task,
        importance=layout.importance,
        balance=layout.solve.balance,
        ridge=layout.solve.ridge or 0.0,
    )
    return make_entry(layout, submodule, solution)


def _estimate(job: Job) -> Costs:
    from mergekit_slta.objectives.costs import estimate_features

    return estimate_features(job)


OBJECTIVE = Objective(_gather, _solve, _estimate)
