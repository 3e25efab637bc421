"""Lay out the charts of the HTML page: where lines, points, ticks and captions are, in units of the drawing.

Scope: geometry and texts. The template `page.html.jinja` writes them as SVG.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mergekit_slta.reporting.meanings import KINDS

WIDTH, HEIGHT = 400.0, 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 10.0, 12.0, 34.0
_INNER_WIDTH, _INNER_HEIGHT = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        name: for the legend and the captions.
        value: submodule -> value, or None.
        error: submodule -> half the height of the error bar, or None.
        note: submodule -> what the caption says behind the value.
    """

    name: str
    value: Callable[[Any], float | None]
    error: Callable[[Any], float | None] = lambda entry: None
    note: Callable[[Any], str] = lambda entry: ""


@dataclass(frozen=True)
class Scale:
    """The vertical axis, the same for all charts of a section.

    Attributes:
        low, high: its ends; values outside are drawn at the end.
        ticks: (value, label).
        reference: a value to compare with.
        text: value -> text.
    """

    low: float
    high: float
    ticks: list[tuple[float, str]]
    reference: float | None = None
    text: Callable[[float], str] = "{:.3f}".format

    @classmethod
    def of(cls, values: Iterable[float], *, floor: float | None = None, reference: float | None = None) -> Scale:
        """A linear axis for some values. A few values far from all others do not flatten these: with 20 values or more
        the axis ends twice the width of the middle 90 per cent beyond it."""
        found = sorted(values) or [0.0]
        low, high = found[0], found[-1]
        if len(found) >= 20:
            first, *_, last = statistics.quantiles(found, n=20)
            reach = 2 * max(last - first, 0.25)
            low, high = max(low, first - reach), min(high, last + reach)
        wanted = [value for value in (floor, reference) if value is not None]
        low, high = min([low, *wanted]), max([high, *wanted])
        margin = 0.06 * (high - low) or 0.05
        low, high = low - margin * (low != floor), high + margin
        return cls(low, high, _ticks(low, high), reference)

    @classmethod
    def of_logarithms(cls, values: Iterable[float]) -> Scale:
        """A logarithmic axis, for values that are logarithms to the base 10."""
        found = sorted(values) or [0.0]
        low, high = math.floor(found[0]), max(math.ceil(found[-1]), math.floor(found[0]) + 1)
        step = math.ceil((high - low) / 5)
        ticks = [(float(place), f"{10.0**place:.0e}") for place in range(low, high + 1, step)]
        return cls(low, high, ticks, None, lambda value: f"{10**value:.3g}")

    def place(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return _TOP + (1 - share) * _INNER_HEIGHT


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    form = f".{digits}f" if max(-low, high) < 1e4 else ".1e"
    return [(number * step, format(number * step + 0.0, form)) for number in numbers]


@dataclass
class Line:
    """What is drawn of a curve, as SVG paths."""

    number: int
    path: str = ""
    dots: str = ""
    bars: str = ""


@dataclass
class Column:
    """A place on the horizontal axis: a layer, or a submodule outside the layers."""

    left: float
    width: float
    caption: str
    flagged: float | None = None


@dataclass
class Chart:
    """One chart: the submodules of one kind.

    Attributes:
        title, detail: heading; `detail` is the part of the submodules' names behind the layer.
        several: whether a layer has several of them; points are then means, and bars ranges.
        is_dense: whether there are so many columns that points must be small.
        ticks: (place, label) of the horizontal axis.
        levels: (place, label) of the vertical axis.
    """

    title: str
    detail: str
    several: bool
    is_depth: bool
    is_dense: bool
    ticks: list[tuple[float, str]]
    levels: list[tuple[float, str]]
    reference: float | None
    lines: list[Line] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)


def charts(submodules: Sequence[Any], curves: Sequence[Curve], scale: Scale, *, joined: bool = True) -> list[Chart]:
    """Charts over depth: one for each kind of submodule inside the layers, one for those outside of them.

    Args:
        submodules: with `name`, `kind`, `layer` and, if they have any, `flags`.
        curves: the lines.
        scale: the vertical axis.
        joined: whether the layers of a kind are joined by lines.
    """
    inside: dict[tuple[str, str], dict[int, list[Any]]] = {}
    outside: list[Any] = []
    for entry in submodules:
        if entry.layer is None:
            outside.append(entry)
        else:
            inside.setdefault((entry.kind, _detail(entry)), {}).setdefault(entry.layer, []).append(entry)
    layers = 1 + max((entry.layer for entry in submodules if entry.layer is not None), default=0)
    found = []
    for (kind, detail), members in inside.items():
        columns = [(layer, f"layer {layer}", members[layer]) for layer in sorted(members)]
        found.append(_chart(KINDS.get(kind, kind), detail, columns, layers, curves, scale, joined=joined))
    if outside:
        columns = [(place, entry.name, [entry]) for place, entry in enumerate(outside)]
        title = "outside the layers" if inside else ""
        found.append(_chart(title, "", columns, len(outside), curves, scale, joined=False, is_depth=False))
    return found


def path_chart(points: Sequence[Any], names: Sequence[str], curves: Sequence[Curve], scale: Scale) -> Chart:
    """A chart over points in turn, such as steps; they are counted from 0."""
    columns = [(place, name, [point]) for place, (name, point) in enumerate(zip(names, points, strict=True))]
    chart = _chart("", "", columns, len(points), curves, scale, joined=True, is_depth=False)
    return replace(chart, ticks=_layer_ticks(len(points), _INNER_WIDTH / len(points)))


def _detail(entry: Any) -> str:
    """The part of a submodule's name behind the number of its layer; other numbers are replaced by `*`."""
    parts = entry.name.split(".")
    start = parts.index(str(entry.layer)) + 1 if str(entry.layer) in parts else len(parts)
    return ".".join("*" if part.isdigit() else part for part in parts[start:])


def _chart(
    title: str,
    detail: str,
    columns: Sequence[tuple[int, str, list[Any]]],
    count: int,
    curves: Sequence[Curve],
    scale: Scale,
    *,
    joined: bool,
    is_depth: bool = True,
) -> Chart:
    width = _INNER_WIDTH / count
    chart = Chart(
        title,
        detail,
        any(len(members) > 1 for *_, members in columns),
        is_depth,
        count > 40,
        _layer_ticks(count, width) if is_depth else _name_ticks([name for _, name, _ in columns], width),
        [(scale.place(value), label) for value, label in scale.ticks],
        None if scale.reference is None else scale.place(scale.reference),
        [Line(number) for number in range(len(curves))],
    )
    spread = min(0.5 * width, 26.0) if not joined else min(0.3 * width, 10.0)
    last: dict[int, int] = {}
    for place, label, members in columns:
        left = _LEFT + place * width
        for number, curve in enumerate(curves):
            shift = spread * (number / max(1, len(curves) - 1) - 0.5) if len(curves) > 1 else 0.0
            middle = left + width / 2 + shift
            values = [value for entry in members if (value := curve.value(entry)) is not None]
            if not values:
                continue
            line = chart.lines[number]
            mean = scale.place(statistics.fmean(values))
            line.dots += f"M{middle:.1f} {mean:.1f}h0"
            if joined:
                line.path += f"{'L' if last.get(number) == place - 1 else 'M'}{middle:.1f} {mean:.1f}"
                last[number] = place
            error = (curve.error(members[0]) or 0.0) if len(members) == 1 else 0.0
            if error or len(values) > 1:
                top, foot = scale.place(max(values) + error), scale.place(min(values) - error)
                line.bars += f"M{middle:.1f} {top:.1f}V{foot:.1f}"
        flags = {flag for entry in members for flag in getattr(entry, "flags", ())} - {"unchanged"}
        flagged = _TOP - 5 if flags else None
        chart.columns.append(Column(left, width, _caption(label, members, curves, scale), flagged))
    return chart


def _caption(label: str, members: Sequence[Any], curves: Sequence[Curve], scale: Scale) -> str:
    """What is said of a column: one line for its name, one for each curve, one for the flags."""
    lines = [f"{label} ({len(members)})" if len(members) > 1 else label]
    for curve in curves:
        values = [value for entry in members if (value := curve.value(entry)) is not None]
        if not values:
            text = "-"
        elif len(values) > 1:
            text = f"{scale.text(statistics.fmean(values))} ({scale.text(min(values))} to {scale.text(max(values))})"
        else:
            error = curve.error(members[0]) if len(members) == 1 else None
            text = scale.text(values[0]) + (f" ± {error:.3f}" if error else "")
        note = curve.note(members[0]) if len(members) == 1 else ""
        lines.append(f"{curve.name}: {text}{note}")
    flags = dict.fromkeys(flag for entry in members for flag in getattr(entry, "flags", ()))
    return "\n".join([*lines, *([f"flagged: {', '.join(flags)}"] if flags else [])])


def _layer_ticks(count: int, width: float) -> list[tuple[float, str]]:
    step = next((step for step in (1, 2, 5, 10, 20, 50, 100) if count / step <= 9), count)
    return [(_LEFT + (layer + 0.5) * width, str(layer)) for layer in range(0, count, step)]


def _name_ticks(names: Sequence[str], width: float) -> list[tuple[float, str]]:
    longest = max(3, int(width / 7))
    ends = [name.rpartition(".")[2] for name in names]
    return [
        (_LEFT + (place + 0.5) * width, end if len(end) <= longest else f"{end[: longest - 1]}…")
        for place, end in enumerate(ends)
    ]
