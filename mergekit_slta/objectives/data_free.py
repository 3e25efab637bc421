"""`objective: data_free`: a closed form of the experts alone, with weight 1. No row is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mergekit_slta.files.evaluation import SEARCH, PointName, SearchRecord
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.objectives.registry import Objective
from mergekit_slta.objectives.solving import choose_point

if TYPE_CHECKING:
    from mergekit_slta.job.job import Job
    from mergekit_slta.objectives.costs import Costs
    from mergekit_slta.runtime.distributed import Ranks
    from mergekit_slta.runtime.resume import ResumeStore


def _gather(job: Job, resume: ResumeStore | None, ranks: Ranks) -> Statistics:
    """One point that was not measured."""
    alpha = torch.tensor([[float(label == job.recipe.closed_form) for label in job.labels]], dtype=torch.float64)
    name = PointName(name=job.recipe.closed_form or "")
    return Statistics(
        torch.zeros(0, dtype=torch.int64), len(job.labels),
        {part.name: alpha.clone() for part in job.submodules}, form="point",
        divergences=torch.zeros((0, 1), dtype=torch.float64), losses=torch.zeros((0, 2), dtype=torch.float64),
        tokens=torch.zeros(0, dtype=torch.int64), metadata={SEARCH: SearchRecord(points=(name,)).model_dump_json()},
    )  # fmt: skip


def _estimate(job: Job) -> Costs:
    from mergekit_slta.objectives.costs import estimate_merge

    return estimate_merge(job)


OBJECTIVE = Objective(_gather, choose_point, _estimate)
