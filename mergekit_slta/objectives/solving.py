"""Solve statistics into entries of the alphas file: one submodule at a time, or all together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergekit_slta.errors import AlphasError, show
from mergekit_slta.files.alphas_file import SubmoduleAlphas, finite_or_none
from mergekit_slta.files.evaluation import SearchRecord
from mergekit_slta.files.layout import Layout, LayoutSubmodule
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.maths.closed_form import Solution, solve_closed_form
from mergekit_slta.maths.divergence import task_scales, weighted_divergence
from mergekit_slta.maths.joint import solve_joint
from mergekit_slta.objectives.registry import Solved

EXPECTED_ALPHA = (-0.5, 1.5)
"""A weight outside this range is flagged `extreme`: linearity was hardly measured beyond base and expert."""


def make_entry(layout: Layout, submodule: LayoutSubmodule, solution: Solution) -> SubmoduleAlphas:
    """Make the entry of a solved submodule, in the order of the recipe's models.

    Args:
        layout: the layout.
        submodule: the solved submodule.
        solution: its weights, in canonical order.
    """
    alpha = tuple(solution.alpha[place] for place in layout.order)
    extreme = any(not EXPECTED_ALPHA[0] <= value <= EXPECTED_ALPHA[1] for value in alpha)
    unchanged = tuple(
        name
        for place, name in zip(layout.order, layout.models, strict=True)
        if solution.unchanged[place] and submodule.tensors  # the head of a tied model may have none
    )
    flags = [flag for flag in solution.flags if unchanged or flag != "unchanged"]
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
        flags=(*flags, *["extreme"] * extreme),
        unchanged=unchanged,
    )


def select(statistics: Statistics, names: Sequence[str]) -> list[Tensor]:
    """Get the statistics of the named submodules: [rows, K, K] Gram matrices or [rows, S, K] derivatives.

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
        num_tasks=len(layout.experts),
    )
    return make_entry(layout, submodule, solution)


def solve_together(statistics: Statistics, layout: Layout) -> Solved:
    """Solve the weights of all submodules in one system. Its rank, condition and residual are written to every entry.

    No submodule has two objectives here: the derivatives of a tied table at both ends of the model are summed.

    Args:
        statistics: derivatives at the experts.
        layout: the layout; its solve settings are used.

    Raises:
        AlphasError: the statistics lack a submodule.
    """
    slopes = {submodule.name: select(statistics, [submodule.name])[0] for submodule in layout.submodules}
    found = solve_joint(
        slopes,
        statistics.row_task,
        importance=layout.importance,
        balance=layout.solve.balance,
        ridge=layout.solve.ridge,
        row_group=statistics.row_group,
        num_tasks=len(layout.experts),
    )
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
        entries.append(make_entry(layout, submodule, solution))
    return Solved(tuple(entries), found.ridge)


def choose_point(statistics: Statistics, layout: Layout) -> Solved:
    """Take the measured model with the smallest weighted divergence; without held-out rows the last one.

    The residual of every entry is that model's weighted divergence, as a share of the base's. There are no standard
    errors, conditions and ranks: the steps that led to the model are not repeated.

    Raises:
        AlphasError: the statistics lack a submodule.
    """
    values = weighted_divergences(statistics, layout)
    measured = len(statistics.row_task) > 0
    best = int(values.argmin()) if measured else len(values) - 1
    unchanged = SearchRecord.of(statistics).unchanged
    entries = []
    for submodule in layout.submodules:
        alpha = select(statistics, [submodule.name])[0][best].tolist()
        equal = unchanged.get(submodule.name, ()) if submodule.tensors else ()
        entries.append(
            SubmoduleAlphas(
                **submodule.model_dump(exclude={"objectives"}),
                alpha=tuple(alpha[place] for place in layout.order),
                stderr=None,
                condition=None,
                rank=None,
                residual=float(values[best] / values[0]) if measured and values[0] > 0 else None,
                flags=("unchanged",) * bool(equal),
                unchanged=tuple(name for name in layout.models if layout.canonical.index(name) in equal),
            )
        )
    return Solved(tuple(entries))


def weighted_divergences(statistics: Statistics, layout: Layout) -> Tensor:
    """[P] float64, the weighted divergence of every measured model, see `maths.divergence`.

    Raises:
        AlphasError: the statistics lack the divergences.
    """
    divergences = statistics.divergences
    if divergences is None:
        raise AlphasError("the statistics lack the divergences: calibrate again", code="incomplete-statistics")
    scales, _ = task_scales(
        divergences[:, 0],
        statistics.row_task,
        len(layout.experts),
        tokens=statistics.tokens,
        balance=layout.solve.balance,
    )
    return weighted_divergence(divergences.T, statistics.row_task, scales, layout.importance)
