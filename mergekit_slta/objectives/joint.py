"""`objective: joint`: all submodules' weights solved together from derivatives of the loss, then Gauss-Newton steps at
the merged model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_slta.files.layout import Layout
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.maths.closed_form import Solution
from mergekit_slta.maths.gauss_newton import gauss_newton_step
from mergekit_slta.maths.joint import solve_joint
from mergekit_slta.objectives.entries import make_entry, select
from mergekit_slta.objectives.registry import Objective, Solved

if TYPE_CHECKING:
    from mergekit_slta.job.job import Job
    from mergekit_slta.objectives.costs import Costs
    from mergekit_slta.runtime.distributed import Ranks
    from mergekit_slta.runtime.resume import ResumeStore


def _gather(job: Job, resume: ResumeStore | None, ranks: Ranks) -> Statistics:
    from mergekit_slta.objectives.gradient_passes import gather_derivatives

    return gather_derivatives(job, resume=resume, ranks=ranks)


def solve_together(statistics: Statistics, layout: Layout, *, with_evidence: bool = True) -> Solved:
    """Solve every submodule's weights in one system, whose rank, condition and residual every entry has.

    The derivatives of a tied table at both ends of the model add up under its own name, so no submodule has two
    objectives here.

    Args:
        statistics: derivatives at the experts, or at a merged model.
        layout: of the statistics; its solve settings are used.
        with_evidence: also compute standard errors, condition, rank and residual.

    Raises:
        AlphasError: the statistics lack a submodule.
    """
    slopes = {submodule.name: select(statistics, [submodule.name])[0] for submodule in layout.submodules}
    how: dict[str, Any] = {
        "importance": layout.importance,
        "balance": layout.solve.balance,
        "ridge": layout.solve.ridge,
        "with_evidence": with_evidence,
    }
    at_merged_model = statistics.divergences is not None
    if at_merged_model:
        how |= {"divergences": statistics.divergences, "row_step": statistics.row_step}
        found = gauss_newton_step(slopes, statistics.row_task, statistics.point, **how)
    else:
        found = solve_joint(slopes, statistics.row_task, **how)
    entries = []
    for submodule in layout.submodules:
        name = submodule.name
        solution = Solution(
            alpha=tuple(found.alpha[name].tolist()),
            stderr=None if found.stderr is None else tuple(found.stderr[name].tolist()),
            condition=found.condition,
            rank=found.rank,
            residual=found.residual,
            unchanged=tuple(found.unchanged[name].tolist()),
            flags=("unchanged",) * bool(found.unchanged[name].any()),
        )
        entries.append(make_entry(layout, submodule, solution, flag_extreme=not at_merged_model))
    return Solved(tuple(entries), found.ridge)


def _estimate(job: Job) -> Costs:
    from mergekit_slta.objectives.costs import estimate_gradients

    return estimate_gradients(job)


OBJECTIVE = Objective(_gather, solve_together, _estimate)
