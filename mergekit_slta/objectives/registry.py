"""What an objective does: gather statistics, solve them, and estimate what that costs.

Scope: the form of an objective, and finding one by its name. Its keys and defaults are its row in `recipe.objectives`,
which names the file that defines `OBJECTIVE`. That file is loaded when it is first used, and imports what only
gathering needs inside of its functions: saved statistics are solved without mergekit or transformers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
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
        entries: one for every submodule of the layout, in its order.
        ridge: the ridge that was chosen, where the solve chooses one.
    """

    entries: tuple[SubmoduleAlphas, ...]
    ridge: float | None = None


@dataclass(frozen=True)
class Objective:
    """One objective.

    Attributes:
        gather: (job, finished work and where more is kept, processes that share the rows) -> statistics, without
            metadata. Raises DataError, ModelError, RunError.
        solve: (statistics, their layout) -> weights, by the layout's solve settings. Raises AlphasError.
        estimate: what gathering will cost, from headers and rows alone.
    """

    gather: Callable[[Job, ResumeStore | None, Ranks], Statistics]
    solve: Callable[[Statistics, Layout], Solved]
    estimate: Callable[[Job], Costs]


def estimate(job: Job) -> Costs:
    """What a job will cost, from headers and rows alone."""
    return objective(job.recipe.settings.objective).estimate(job)


def objective(name: str) -> Objective:
    """Find an objective.

    Raises:
        AlphasError: no objective has that name (a file may name any).
    """
    if name not in OBJECTIVES:
        raise AlphasError(
            f"the objective is {show(name)}, and this release knows {listing(OBJECTIVES)}: calibrate again",
            code="unknown-objective",
        )
    return importlib.import_module(OBJECTIVES[name].module).OBJECTIVE
