"""`objective: joint`: the weights of all submodules together. Gauss-Newton steps at the merged model, from the best of
some starting points; with `steps: 0` one solve from derivatives at the experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_slta.files.layout import Layout
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.objectives.registry import Objective, Solved
from mergekit_slta.objectives.solving import choose_point, solve_together

if TYPE_CHECKING:
    from mergekit_slta.job.job import Job
    from mergekit_slta.objectives.costs import Costs
    from mergekit_slta.runtime.distributed import Ranks
    from mergekit_slta.runtime.resume import ResumeStore


def _gather(job: Job, resume: ResumeStore | None, ranks: Ranks) -> Statistics:
    from mergekit_slta.objectives.joint_search import gather_at_experts, search
    from mergekit_slta.recipe.objectives import JointSettings

    own = job.recipe.settings.own
    return (search if isinstance(own, JointSettings) and own.max_steps else gather_at_experts)(job, resume, ranks)


def _solve(statistics: Statistics, layout: Layout) -> Solved:
    return (choose_point if statistics.form == "point" else solve_together)(statistics, layout)


def _estimate(job: Job) -> Costs:
    from mergekit_slta.objectives.costs import estimate_gradients

    return estimate_gradients(job)


OBJECTIVE = Objective(_gather, _solve, _estimate)
