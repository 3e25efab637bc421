"""The interface of an objective (gather statistics, solve them, estimate costs), and its lookup by name.

Scope: to add an objective, add a row to `recipe.objectives` (its keys and defaults), and the file that the row names,
which defines `OBJECTIVE`. That file is imported at the first use. Imports that only gathering needs must be inside its
functions, because saved statistics are solved without mergekit or transformers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mergekit_slta.errors import AlphasError, listing, show
from mergekit_slta.files.alphas_file import SubmoduleAlphas
from mergekit_slta.files.layout import Layout
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.recipe.objectives import OBJECTIVES

if TYPE_CHECKING:
    from mergekit_slta.job.job import Job
    from mergekit_slta.objectives.costs import Costs
    from mergekit_slta.runtime.distributed import Ranks
    from mergekit_slta.runtime.resume import ResumeStore


@dataclass(frozen=True)
class Solved:
    """Weights of all submodules.

    Attributes:
        entries: one per submodule of the layout, in its order.
        ridge: the ridge, if the solve chose it; else None.
    """

    entries: tuple[SubmoduleAlphas, ...]
    ridge: float | None = None


@dataclass(frozen=True)
class Objective:
    """One objective.

    Attributes:
        gather: (job, store of finished work or None, processes that share the rows) -> statistics, without metadata.
            Raises DataError, ModelError, RunError.
        solve: (statistics, their layout) -> weights, with the layout's solve settings. Raises AlphasError.
        estimate: job -> costs of gathering, from headers and rows only.
    """

    gather: Callable[[Job, ResumeStore | None, Ranks], Statistics]
    solve: Callable[[Statistics, Layout], Solved]
    estimate: Callable[[Job], Costs]


def estimate(job: Job) -> Costs:
    """Estimate the costs of a job, from headers and rows only."""
    from mergekit_slta.objectives.phases import writing_phase

    costs = objective(job.recipe.settings.objective).estimate(job)
    return replace(costs, phases=(*writing_phase(job), *costs.phases))


def objective(name: str) -> Objective:
    """Find an objective by its name.

    Raises:
        AlphasError: there is no such objective (the name may come from a file).
    """
    if name not in OBJECTIVES:
        raise AlphasError(
            f"the objective is {show(name)}, and this release knows {listing(OBJECTIVES)}: calibrate again",
            code="unknown-objective",
        )
    return importlib.import_module(OBJECTIVES[name].module).OBJECTIVE
