"""A solved submodule as an entry of the alphas file."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergekit_slta.errors import AlphasError, show
from mergekit_slta.files.alphas_file import SubmoduleAlphas, finite_or_none
from mergekit_slta.files.layout import Layout, LayoutSubmodule
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.maths.closed_form import Solution

EXPECTED_ALPHA = (-0.5, 1.5)
"""A weight outside is flagged `extreme`: linearity was measured between base and expert, and little beyond."""


def make_entry(
    layout: Layout, submodule: LayoutSubmodule, solution: Solution, *, flag_extreme: bool = True
) -> SubmoduleAlphas:
    """Describe a solved submodule, in the order of the recipe's models.

    Args:
        layout: of all submodules.
        submodule: the solved one.
        solution: its weights, in canonical order.
        flag_extreme: flag weights outside of `EXPECTED_ALPHA`; not where they come from the merged model itself.
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
    """The statistics of the named submodules.

    Raises:
        AlphasError: one is missing.
    """
    missing = [name for name in names if name not in statistics.by_submodule]
    if missing:
        raise AlphasError(f"the statistics lack {show(missing[0])}: calibrate again", code="incomplete-statistics")
    return [statistics.by_submodule[name] for name in names]
