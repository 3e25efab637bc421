"""`objective: joint`: solve the weights of all submodules together from derivatives of the loss, then make Gauss-Newton
steps at the merged model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.objectives.registry import Objective
from mergekit_slta.objectives.solving import solve_together

if TYPE_CHECKING:
    from mergekit_slta.job.job import Job
    from mergekit_slta.objectives.costs import Costs
    from mergekit_slta.runtime.distributed import Ranks
    from mergekit_slta.runtime.resume import ResumeStore


def _gather(job: Job, resume: ResumeStore | None, ranks: Ranks) -> Statistics:
    from mergekit_slta.objectives.gradient_passes import gather_derivatives

    return gather_derivatives(job, resume=resume, ranks=ranks)


def _estimate(job: Job) -> Costs:
    from mergekit_slta.objectives.costs import estimate_gradients

    return estimate_gradients(job)


OBJECTIVE = Objective(_gather, solve_together, _estimate)
