"""Figures over the depth of a model, from an alphas file: merging weights (the paper's Fig. 5) and residuals.

Scope: one panel for each kind of submodule, with the decoder layers from left to right, and one for the submodules
outside the layers. If a layer has several submodules of a kind (heads, matrices), the panel shows their mean and
range. A flag is marked above the value that it concerns. A file without layers is drawn as a list of numbers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergekit_slta.files.alphas_file import Alphas, SubmoduleAlphas
from mergekit_slta.reporting.figures.panels import OUTSIDE, PANELS, Depth, Series, at_depth, panels_of, value_range
from mergekit_slta.reporting.figures.style import GREY, WIDTH, Look, Sheet, clean_axes, escape, short_name, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 5
"""With more models than this, a kind of submodule gets several panels."""
_DASHES = (0, (6, 3))
_MARK_INCHES = 0.12
"""Height of a row of flags above a panel."""
_MARKS = {
    "rank_deficient": ("X", "black", "rank lost: minimum-norm solution"),
    "ill_conditioned": ("v", "white", "ill-conditioned solve"),
    "nonlinear": ("*", "black", "measured residual differs from the predicted"),
}


def alphas_figure(alphas: Alphas) -> Figure:
    """Draw the merging weight of every model in every submodule, with jackknife standard errors.

    The plain average is that of the experts: a direction has no task.
    """
    directions = [direction.model for direction in alphas.directions]
    num_experts, count = len(alphas.experts), len(alphas.models)
    series = [
        Series(
            (f"{place + 1}  " if count > MOST_LINES else "") + name + " (direction)" * (model in directions),
            Look.of(place),
            lambda entry, place=place: entry.alpha[place],
            lambda entry, place=place: entry.stderr[place] if entry.stderr else 0.0,
            lambda entry, place=place, model=model: model in entry.unchanged and entry.alpha[place] == 0,
        )
        for place, (model, name) in enumerate(zip(alphas.models, short_names(alphas.models, 30), strict=True))
    ]
    of = "the expert" if num_experts == 1 else f"{num_experts} experts"
    if directions:
        one = f"the direction {short_name(directions[0], 20)}"
        of += f" and {one if len(directions) == 1 else f'{len(directions)} directions'}"
    bars = "Bars: jackknife standard errors where a point is one submodule, often smaller than its marker."
    if all(entry.stderr is None for entry in alphas.submodules):
        reason = "there was one calibration row per task"
        if all(entry.rank is None for entry in alphas.submodules):
            reason = "the weights are those of the merge that was best on held-out rows"
        bars = f"No standard errors: {reason}."
    return _draw(
        alphas,
        f"Merging weight α of {of}",
        f"{_about(alphas)}. 0 leaves the base as it is, 1 adds all that the expert learned.\n{bars}",
        "merging weight α",
        series,
        0.5 / num_experts,
        reference=(1 / num_experts, f"plain average, 1/{num_experts}") if num_experts > 1 else None,
    )


def residuals_figure(alphas: Alphas) -> Figure | None:
    """Draw the residual of every submodule: predicted from linearity and, if available, measured.

    None if the submodules were solved together and measured: they have one residual.
    """
    if all(entry.rank is None for entry in alphas.submodules):
        return None
    series = [Series("predicted by linearity", Look.of(0), lambda entry: entry.residual)]
    measured = any(entry.residual_measured is not None for entry in alphas.submodules)
    if measured:
        series.append(Series("measured after merging", Look.of(1), lambda entry: entry.residual_measured))
    verdict = "Where the two differ, a submodule is not linear." if measured else "Not measured on merged submodules."
    return _draw(
        alphas,
        "What the merge loses: residual, lower is better" + ("" if measured else " (predicted only)"),
        f"{_about(alphas)}. 0: on every task's rows, merged submodules do what that task's expert does; 1: they are "
        f"as far from it as the base is. {verdict}",
        "residual (share of squared change)",
        series,
        0.25,
        floor=0.0,
    )


def _about(alphas: Alphas) -> str:
    return f"Base model {short_name(alphas.base_model)}, granularity {escape(alphas.granularity, 20)}"


def _draw(
    alphas: Alphas,
    title: str,
    notes: str,
    unit: str,
    series: Sequence[Series],
    usual: float,
    *,
    reference: tuple[float, str] | None = None,
    floor: float | None = None,
) -> Figure:
    """Draw weights or residuals over depth.

    Args:
        alphas: the file.
        title, notes: the heading.
        unit: label of the vertical axis.
        series: the lines.
        usual: smallest span for cutting the axis; see `value_range`.
        reference: a value to compare with, and its label.
        floor: start of the axis; None for a value near the lowest one.
    """
    if all(entry.layer is None for entry in alphas.submodules):
        return _list(alphas, title, notes, unit, series, reference)
    depth = Depth.of(alphas)
    panels = panels_of(alphas)
    size = math.ceil(len(series) / math.ceil(len(series) / MOST_LINES))
    chunks = [series[start : start + size] for start in range(0, len(series), size)]
    cells = [(key, chunk) for key in panels for chunk in chunks]
    limits, beyond = value_range(alphas, series, usual, reference, floor)
    handles = _handles(alphas, series, reference, beyond)
    columns = 3 if max(len(handle.get_label()) for handle in handles) < 26 else 2
    present = [flag for flag in _MARKS if any(flag in entry.flags for entry in alphas.submodules)]
    high, gap = 1.75 if len(cells) < 3 else 1.3, 0.38 + _MARK_INCHES * len(present)
    num_inside = sum(key != OUTSIDE for key, _ in cells)
    below = {len(cells) - 1: 0.24, num_inside - 1: 0.42}
    """Number of a panel with labels -> height of its labels in inches."""
    legend = 0.15 + 0.19 * math.ceil(len(handles) / columns)
    sheet = Sheet.new(title, notes, (high + gap) * len(cells) + sum(below.values()) + legend)
    top = 0.0
    for number, (key, chunk) in enumerate(cells):
        is_outside = key == OUTSIDE
        width = min(WIDTH - 0.87, 1.2 * len(depth.outside)) if is_outside else WIDTH - 0.87
        axis = sheet.panel(0.75, top + gap, width, high)
        several = _draw_panel(axis, panels[key], chunk, depth, limits)
        _draw_marks(axis, panels[key], depth, present, _MARK_INCHES / high)
        heading = "Outside the layers" if is_outside else PANELS.get(key, escape(key, 40))
        heading += ": mean and range within a layer" if several else ""
        if len(chunks) > 1:
            first = series.index(chunk[0]) + 1
            noun = "models" if alphas.directions else "experts"
            heading += f" · {noun} {first}–{first + len(chunk) - 1}"
        axis.set_title(heading, pad=5 + 72 * _MARK_INCHES * len(present))
        axis.set_ylim(*limits)
        if reference is not None:
            axis.axhline(reference[0], color=GREY, linewidth=1, linestyle=_DASHES, zorder=1)
        depth.dress(axis, is_outside=is_outside, labels=number in below)
        if number in below and not is_outside:
            axis.set_xlabel("decoder layer")
        clean_axes(axis)
        top += gap + high + below.get(number, 0.0)
    sheet.label(unit, top)
    sheet.figure.legend(handles=handles, loc="lower center", ncols=columns, handlelength=3.2, borderaxespad=0.1)
    return sheet.figure


def _draw_panel(
    axis: Axes, entries: Sequence[SubmoduleAlphas], series: Sequence[Series], depth: Depth, limits: tuple[float, float]
) -> bool:
    """Draw a panel's lines; returns whether a layer has several submodules in this panel."""
    places = at_depth(depth, entries)
    several = any(len(members) > 1 for members in places.values())
    is_outside = all(entry.layer is None for entry in entries)
    size = 4.5 if depth.layers <= 40 or is_outside else 3.0
    for number, one in enumerate(series):
        shift = 0 if several else (number - (len(series) - 1) / 2) * 0.11
        _draw_line(axis, places, one, shift, limits, size, "none" if is_outside else one.look.line)
    return several


def _draw_line(
    axis: Axes,
    places: dict[float, list[SubmoduleAlphas]],
    series: Series,
    shift: float,
    limits: tuple[float, float],
    size: float,
    line: Any,
) -> None:
    x, middle, error, low, high = [], [], [], [], []
    for place, members in places.items():
        values = [value for member in members if (value := series.measured(member)) is not None] or [math.nan]
        x.append(place + shift)
        middle.append(statistics.fmean(values))
        error.append(series.error(members[0]) if len(members) == 1 else 0.0)
        low.append(min(values))
        high.append(max(values))
    style = {**series.look.style(size), "linewidth": 1.2}
    axis.errorbar(x, middle, yerr=error, label=series.label, capsize=2, elinewidth=1, zorder=3, linestyle=line, **style)
    if any(len(members) > 1 for members in places.values()):
        axis.fill_between(x, low, high, color=series.look.color, alpha=0.18, linewidth=0, zorder=2)
    rings = [place + 2 * shift for place, members in places.items() if any(series.zero(member) for member in members)]
    axis.plot(rings, [0] * len(rings), "o", markersize=size + 3, fillstyle="none", color=series.look.color, zorder=4)
    for edge, marker, sign in zip(limits, "v^", (-1, 1), strict=True):
        out = [place for place, value in zip(x, middle, strict=True) if sign * (value - edge) > 0]
        axis.plot(out, [edge] * len(out), marker, markersize=6, color=series.look.color, clip_on=False, zorder=5)


def _draw_marks(
    axis: Axes, entries: Sequence[SubmoduleAlphas], depth: Depth, present: Sequence[str], step: float
) -> None:
    """Draw a row of marks per flag above the panel, and a faint line from each mark down to its value."""
    for row, flag in enumerate(present):
        flagged = list(at_depth(depth, [entry for entry in entries if flag in entry.flags]))
        for place in flagged:
            axis.axvline(place, color="#bbbbbb", linewidth=0.8, zorder=1)
        style = {"transform": axis.get_xaxis_transform(), "clip_on": False, "zorder": 5, **_mark(flag)}
        axis.plot(flagged, [1 + (row + 0.5) * step] * len(flagged), **style)


def _mark(flag: str) -> dict[str, Any]:
    marker, face, label = _MARKS[flag]
    size = 7 if marker == "*" else 5
    style = {"marker": marker, "markersize": size, "markerfacecolor": face, "linestyle": "none"}
    return {"color": "black", "label": label, **style}


def _handles(alphas: Alphas, series: Sequence[Series], reference: tuple[float, str] | None, beyond: bool) -> list[Any]:
    """Legend entries for the marks that occur in the figure."""
    from matplotlib.lines import Line2D

    marks: list[dict[str, Any]] = [
        {"label": one.label, "linestyle": one.look.line, "linewidth": 1.2, **one.look.style(5)} for one in series
    ]
    if reference is not None:
        marks.append({"label": reference[1], "color": GREY, "linewidth": 1, "linestyle": _DASHES})
    if any(one.zero(entry) for one in series for entry in alphas.submodules):
        ring = {"marker": "o", "markersize": 7.5, "fillstyle": "none", "linestyle": "none"}
        marks.append({"label": "at 0: no weight here", "color": GREY, **ring})
    marks += [_mark(flag) for flag in _MARKS if any(flag in entry.flags for entry in alphas.submodules)]
    if beyond:
        marks.append({"label": "at the edge: beyond the axis", "marker": "^", "color": GREY, "linestyle": "none"})
    return [Line2D([], [], **mark) for mark in marks]


def _list(
    alphas: Alphas,
    title: str,
    notes: str,
    unit: str,
    series: Sequence[Series],
    reference: tuple[float, str] | None,
) -> Figure:
    """Draw one row per submodule and series, with the number beside it."""
    rows = [(entry, one) for entry in alphas.submodules for one in series]
    if flags := sorted({flag for entry in alphas.submodules for flag in entry.flags}):
        notes += f" Flagged: {escape(', '.join(flags).replace('_', ' '))}."
    prefix = len(alphas.submodules) > 1
    labels = [(f"{short_name(entry.name, 20)}: " if prefix else "") + one.label for entry, one in rows]
    left = 0.2 + 0.075 * max(len(label) for label in labels)
    sheet = Sheet.new(title, notes, 0.82 + 0.26 * len(rows))
    axis = sheet.panel(left, 0.3, WIDTH - left - 1.1, 0.26 * len(rows))
    axis.axvline(0, color=GREY, linewidth=1)
    for height, (entry, one) in enumerate(rows):
        if (value := one.value(entry)) is not None:
            error = one.error(entry)
            axis.errorbar(value, height, xerr=error, capsize=2.5, linestyle="none", **one.look.style(6))
            text = f"{value:.3f} ± {error:.3f}" if error else f"{value:.3f}"
            axis.text(1.02, height, text, transform=axis.get_yaxis_transform(), va="center")
    axis.set_yticks(range(len(rows)), labels)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    if reference is not None:
        axis.axvline(reference[0], color=GREY, linewidth=1, linestyle=_DASHES)
        axis.text(reference[0], 1.02, reference[1], transform=axis.get_xaxis_transform(), ha="center", va="bottom")
    axis.set_xlabel(unit)
    clean_axes(axis, "x")
    return sheet.figure
