"""Solve statistics into entries of the alphas file: one submodule at a time, or all together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mergekit_slta.errors import AlphasError, show
from mergekit_slta.files.alphas_file import SubmoduleAlphas, finite_or_none
from mergekit_slta.files.layout import Layout, LayoutSubmodule
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.maths.closed_form import Solution, solve_closed_form
from mergekit_slta.maths.gauss_newton import gauss_newton_step
from mergekit_slta.maths.joint import solve_joint
from mergekit_slta.objectives.registry import Solved

EXPECTED_ALPHA = (-0.5, 1.5)
"""A weight outside this range is flagged `extreme`: linearity was hardly measured beyond base and expert."""


def make_entry(
    layout: Layout, submodule: LayoutSubmodule, solution: Solution, *, flag_extreme: bool = True
) -> SubmoduleAlphas:
    """Make the entry of a solved submodule, in the order of the recipe's models.

    Args:
        layout: the layout.
        submodule: the solved submodule.
        solution: its weights, in canonical order.
        flag_extreme: flag weights outside `EXPECTED_ALPHA`. False if the statistics are from a merged model.
    """
    alpha = tuple(solution.alpha[place] for place in layout.order)
    extreme = flag_extreme and any(not EXPECTED_ALPHA[0] <= value <= EXPECTED_ALPHA[1] for value in alpha)
    return SubmoduleAlphas(
        name=submodule.name,
        kind=submodule.kind,
        layer=submodule.layer,
        tensors=submodule.tensors,
        slices=submodule.slices,
        alpha=alpha,
        stderr=None if solution.stderr is None else tuple(solution.stderr[place] for place in layout.order),
        condition=finite_or_none(solution.condition),
        rank=solution.rank,
        residual=solution.residual,
        flags=(*solution.flags, *["extreme"] * extreme),
        unchanged=tuple(
            name for place, name in zip(layout.order, layout.models, strict=True) if solution.unchanged[place]
        ),
    )


def select(statistics: Statistics, names: Sequence[str]) -> list[Tensor]:
    """Get the statistics of the named submodules: [rows, T, T] Gram matrices or [rows, S, T] derivatives.

    Raises:
        AlphasError: a submodule is missing.
    """
    missing = [name for name in names if name not in statistics.by_submodule]
    if missing:
        raise AlphasError(f"the statistics lack {show(missing[0])}: calibrate again", code="incomplete-statistics")
    return [statistics.by_submodule[name] for name in names]


def solve_submodule(
    submodule: LayoutSubmodule, statistics: Statistics, layout: Layout, objectives: Sequence[str] | None = None
) -> SubmoduleAlphas:
    """Solve one submodule separately (Eq. 12).

    Args:
        submodule: a submodule of the layout.
        statistics: Gram matrices.
        layout: the layout; its solve settings are used.
        objectives: names of the Gram matrices to use, if not all of the submodule's own are available yet.

    Raises:
        AlphasError: the statistics lack a Gram matrix.
    """
    solution = solve_closed_form(
        select(statistics, objectives or submodule.objectives),
        statistics.row_task,
        importance=layout.importance,
        balance=layout.solve.balance,
        ridge=layout.solve.ridge or 0.0,
    )
    return make_entry(layout, submodule, solution)


def solve_together(statistics: Statistics, layout: Layout, *, with_evidence: bool = True) -> Solved:
    """Solve the weights of all submodules in one system. Its rank, condition and residual are written to every entry.

    No submodule has two objectives here: the derivatives of a tied table at both ends of the model are summed.

    Args:
        statistics: derivatives at the experts, or at a merged model.
        layout: the layout; its solve settings are used.
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
