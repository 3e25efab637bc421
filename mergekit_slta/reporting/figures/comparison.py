"""Draw how much of the gap between base and experts each merge recovers, from a comparison file.

Scope: one line per model, one marker per task, and a bar for the mean over tasks with its standard error.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_slta.files.comparison_file import NO_BETTER, Comparison
from mergekit_slta.files.names import figure_name
from mergekit_slta.reporting.figures.style import (
    COLORS,
    FORMATS,
    GREY,
    Look,
    Sheet,
    clean_axes,
    escape,
    save_figure,
    short_name,
    short_names,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEFT, _WIDTH, _LINE = 2.15, 4.65, 0.27
"""Of the panel, and the height of a model's line, in inches."""
_COLUMNS = 4
"""Of the legend."""
_BAR = "#cfe0ee"
_LOWEST = -0.5
"""Shares of the gap below this are drawn here, with an arrow."""


def draw_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw a comparison as `slta_compare.png` and `.svg`; existing files are replaced, or removed if there is no gap.

    Returns:
        The paths written; none if no task has a gap to recover.

    Raises:
        OutputError: a file cannot be written.
    """
    paths = [Path(folder) / figure_name("compare", form) for form in FORMATS]
    written = save_figure(lambda: comparison_figure(comparison), *paths)
    for path in paths if not written else ():
        path.unlink(missing_ok=True)
    return written


def comparison_figure(comparison: Comparison) -> Figure | None:
    """The figure; None if no task has a gap to recover, or no merge was scored."""
    models = [
        (model, result) for model, result in zip(comparison.scored, comparison.results, strict=True)
        if model.kind == "merge" and result.recovered is not None
    ]  # fmt: skip
    if not models:
        return None
    models.sort(key=lambda pair: pair[1].recovered.mean if pair[1].recovered else -math.inf)
    tasks = short_names([task.model for task in comparison.tasks], 30)
    flat = [name for name, task in zip(tasks, comparison.tasks, strict=True) if NO_BETTER in task.flags]
    means = [result.recovered for _, result in models if result.recovered]
    shown = [each for _, result in models for each in (result.recovered, *(task.recovered for task in result.tasks))]
    is_cut = any(each is not None and each.mean < _LOWEST for each in shown)
    legend_lines = math.ceil((1 + len(tasks) - len(flat)) / _COLUMNS)
    height = _LINE * len(models) + 0.3
    counts = sorted({len(task.rows) for task in comparison.tasks})
    rows = "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    sheet = Sheet.new(
        "How much of what the experts learnt each merge keeps",
        f"Base model {short_name(comparison.base_model)}. Share of the gap between the base's loss and the expert's "
        f"that is recovered, on {rows} held-out rows per task: 0 is the base, 1 the expert. Lines: one standard error "
        "over rows."
        + " Arrow: the value is further to the left." * is_cut
        + (f" Left out: {', '.join(flat)}, where the expert is no better than the base." if flat else ""),
        height + 0.5 + 0.19 * legend_lines,
    )
    axis = sheet.panel(_LEFT, 0.05, _WIDTH, height)
    axis.barh(
        range(len(means)), [max(_LOWEST, mean.mean) for mean in means],
        xerr=[0 if mean.mean < _LOWEST else mean.stderr or 0 for mean in means],
        label="mean over tasks", height=0.72, color=_BAR, ecolor=COLORS[0], capsize=3, zorder=1,
    )  # fmt: skip
    for number, mean in enumerate(means):
        if mean.mean < _LOWEST:
            _draw_arrow(axis, number, COLORS[0])
            axis.text(_LOWEST + 0.02, number - 0.25, f"{100 * mean.mean:.0f}%", va="center", fontsize=7.5)
    offsets = [0.5 * ((place + 0.5) / len(tasks) - 0.5) for place in range(len(tasks))]
    for place, name in enumerate(tasks):
        look = Look.of(place + 1)
        points = [
            (max(_LOWEST, found.mean), number + offsets[place], found.stderr or 0.0, found.mean < _LOWEST)
            for number, (_, result) in enumerate(models) if (found := result.tasks[place].recovered) is not None
        ]  # fmt: skip
        if not points:
            continue
        axis.errorbar(
            [x for x, *_ in points], [y for _, y, *_ in points],
            xerr=[0 if low else error for *_, error, low in points],
            label=name, linestyle="none", elinewidth=0.8, zorder=3, **look.style(3.5),
        )  # fmt: skip
        for _, y, _, low in points:
            if low:
                _draw_arrow(axis, y, look.color)
    for value in (0, 1):
        axis.axvline(value, color=GREY, linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(models)), [escape(model.label, 34) for model, _ in models])
    axis.set_ylim(-0.6, len(models) - 0.4)
    if is_cut:
        axis.set_xlim(left=min(_LOWEST - 0.1, axis.get_xlim()[0]))
    axis.set_xlabel("share of the gap recovered")
    clean_axes(axis, "x")
    axis.set_axisbelow(True)
    sheet.figure.legend(loc="lower center", ncols=_COLUMNS, handlelength=2.2, borderaxespad=0.1)
    return sheet.figure


def _draw_arrow(axis: Axes, y: float, color: str) -> None:
    """Mark a value that is too low for the axis."""
    axis.annotate("", (_LOWEST - 0.08, y), (_LOWEST, y), arrowprops={"arrowstyle": "->", "color": color})
