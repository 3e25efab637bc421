"""Assign the submodules of an alphas file to panels, and choose the ranges of the axes.

Scope: the layout of the figures that `over_depth` draws.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_slta.files.alphas_file import Alphas, SubmoduleAlphas
from mergekit_slta.reporting.figures.style import Look, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {
    "layer": "Decoder layers",
    "attention_head": "Attention heads, by key/value group",
    "attention": "Attention blocks",
    "attention_rest": "Rest of attention, what no head owns (norms, biases)",
    "attention_matrix": "Attention matrices",
    "mlp_matrix": "MLP matrices",
    "mlp": "MLP blocks",
    "norm": "Norms",
}
"""panel -> its title, in the order of drawing."""
OUTSIDE = "outside"
"""The last panel, of the submodules before and after the layers."""
MIXER = re.compile("att|mamba|mixer|^conv$|^ssm$")
"""What the names of modules that mix tokens have in common: alphas files only name the matrices."""


@dataclass(frozen=True)
class Series:
    """One line of a panel.

    Attributes:
        label: for the legend.
        look: how it is drawn.
        value: submodule -> value, or None.
        error: submodule -> half the height of the error bar.
        zero: submodule -> whether the value is 0 only because the expert is unchanged there.
    """

    label: str
    look: Look
    value: Callable[[SubmoduleAlphas], float | None]
    error: Callable[[SubmoduleAlphas], float] = lambda entry: 0.0
    zero: Callable[[SubmoduleAlphas], bool] = lambda entry: False

    def measured(self, entry: SubmoduleAlphas) -> float | None:
        """The value; None if it is 0 only because the expert is unchanged."""
        return None if self.zero(entry) else self.value(entry)


def panels_of(alphas: Alphas) -> dict[str, list[SubmoduleAlphas]]:
    """panel -> its submodules, in the order of `PANELS`; last `OUTSIDE`, if there are any outside the layers."""
    found: dict[str, list[SubmoduleAlphas]] = {}
    for entry in alphas.submodules:
        key = OUTSIDE if entry.layer is None else _panel(entry, alphas.granularity)
        found.setdefault(key, []).append(entry)
    order = [*PANELS, *(key for key in found if key not in (*PANELS, OUTSIDE)), OUTSIDE]
    return {key: found[key] for key in order if key in found}


def _panel(entry: SubmoduleAlphas, granularity: str) -> str:
    if granularity == "head_mlp" and entry.kind == "attention":
        return "attention_rest"
    if granularity != "linear" or entry.kind not in ("linear", "mlp", "attention"):
        return entry.kind
    is_mixer = entry.kind == "attention" or any(MIXER.search(part) for part in entry.name.split("."))
    return "attention_matrix" if is_mixer else "mlp_matrix"


def at_depth(depth: Depth, entries: Iterable[SubmoduleAlphas]) -> dict[float, list[SubmoduleAlphas]]:
    """Group submodules by their place on the depth axis, from left to right."""
    found: dict[float, list[SubmoduleAlphas]] = {}
    for entry in entries:
        found.setdefault(depth.place(entry), []).append(entry)
    return dict(sorted(found.items()))


def value_range(
    alphas: Alphas,
    series: Sequence[Series],
    usual: float,
    reference: tuple[float, str] | None,
    floor: float | None,
) -> tuple[tuple[float, float], bool]:
    """Choose the range of the vertical axis; also returns whether values lie outside it.

    A few extreme values (of ill-conditioned solves) must not flatten all others. With 20 values or more, the axis ends
    two spans beyond the middle 90 per cent of the values. A span is the width of that middle, but at least `usual`.
    """
    found = [(value, one.error(entry)) for entry in alphas.submodules for one in series
             if (value := one.measured(entry)) is not None] or [(0.0, 0.0)]  # fmt: skip
    low, high = min(value - error for value, error in found), max(value + error for value, error in found)
    if len(found) >= 20:
        first, *_, last = statistics.quantiles([value for value, _ in found], n=20)
        reach = 2 * max(last - first, usual)
        low, high = max(low, first - reach), min(high, last + reach)
    if any(one.zero(entry) for entry in alphas.submodules for one in series):
        low, high = min(low, 0.0), max(high, 0.0)
    if reference is not None:
        low, high = min(low, reference[0]), max(high, reference[0])
    low = low if floor is None else min(low, floor)
    margin = 0.06 * (high - low) or 0.05
    limits = low - (margin if low != floor else 0), high + margin
    return limits, any(not limits[0] <= value <= limits[1] for value, _ in found)


@dataclass(frozen=True)
class Depth:
    """The horizontal axes: decoder layers at their numbers, or the submodules outside of them side by side.

    Attributes:
        layers: number of decoder layers.
        outside: name of a submodule outside the layers -> its position on the axis of `OUTSIDE`.
    """

    layers: int
    outside: dict[str, float]

    @classmethod
    def of(cls, alphas: Alphas) -> Depth:
        """Make the axes of a file; submodules outside the layers keep the file's order."""
        layers = 1 + max(entry.layer for entry in alphas.submodules if entry.layer is not None)
        names = [entry.name for entry in alphas.submodules if entry.layer is None]
        return cls(layers, {name: float(number) for number, name in enumerate(names)})

    def place(self, entry: SubmoduleAlphas) -> float:
        return self.outside[entry.name] if entry.layer is None else float(entry.layer)

    def dress(self, axis: Axes, *, is_outside: bool, labels: bool) -> None:
        """Set the ticks and the range of a panel's axis."""
        step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000, self.layers) if self.layers / step <= 10)
        ticks = {float(layer): str(layer) for layer in range(0, self.layers, step)}
        last, margin = self.layers - 1, max(0.4, self.layers * 0.04)
        if is_outside:
            ticks = {place: short_name(one.rpartition(".")[2], 12) for one, place in self.outside.items()}
            last, margin = len(ticks) - 1, 0.5
        axis.set_xticks(list(ticks), list(ticks.values()) if labels else [""] * len(ticks))
        axis.set_xlim(-margin, last + margin)
