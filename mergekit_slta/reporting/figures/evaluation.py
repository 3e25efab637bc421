"""Draw how the merge approaches the experts over the steps of `objective: joint`, from an alphas file.

Scope: one line per task, the share of the base's divergence that is left on held-out rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.evaluation import Evaluation
from mergekit_slta.reporting.figures.style import GREY, Look, Sheet, clean_axes, escape, short_name, short_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEFT, _WIDTH, _HEIGHT = 0.75, 6.0, 2.4
"""Of the panel, in inches."""
_COLUMNS = 3
"""Of the legend."""


def path_of(evaluation: Evaluation) -> list[tuple[str, int]]:
    """The best starting point, and the model after each step that was taken: (label, index in `points`)."""
    starts = [number for number, point in enumerate(evaluation.points) if point.ridge is None]
    steps = [number for number, point in enumerate(evaluation.points) if point.ridge is not None]
    best = min(starts, key=lambda number: evaluation.points[number].weighted)
    labels = [escape(evaluation.points[number].name.removeprefix("step "), 12) for number in steps]
    return [("start", best), *zip(labels, steps, strict=True)]


def divergence_figure(alphas: Alphas) -> Figure | None:
    """Draw the divergence of the merge from every expert over the steps; None if no step was taken.

    An expert that equals the base on the rows has no share of the base's divergence, and no line.
    """
    evaluation = alphas.evaluation
    path = path_of(evaluation) if evaluation is not None else []
    if evaluation is None or len(path) < 2 or not any(each.mean > 0 for each in evaluation.points[0].divergence):
        return None
    starts = ", ".join(short_name(point.name, 20) for point in evaluation.points if point.ridge is None)
    names = short_names([task.model for task in evaluation.tasks], 30)
    legend_lines = math.ceil(len(names) / _COLUMNS)
    sheet = Sheet.new(
        "How far the merge is from the experts, on rows that were not fitted",
        f"Base model {short_name(alphas.base_model)}. Divergence from each expert as a share of the base's; 0: the "
        f"merge is the expert, 1: it is no better than the base. Start: the best of {starts}. Bars: one standard error "
        f"over rows, at lambda {evaluation.scale:g}.",
        _HEIGHT + 0.65 + 0.19 * legend_lines,
    )
    axis = sheet.panel(_LEFT, 0.1, _WIDTH, _HEIGHT)
    for place, name in enumerate(names):
        base = evaluation.points[0].divergence[place].mean
        if base <= 0:
            continue
        measures = [evaluation.points[number].divergence[place] for _, number in path]
        look = Look.of(place)
        axis.errorbar(
            range(len(path)), [each.mean / base for each in measures], [(each.stderr or 0) / base for each in measures],
            label=name, linestyle=look.line, linewidth=1.3, capsize=2, elinewidth=0.8, **look.style(),
        )  # fmt: skip
    axis.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    axis.set_ylim(bottom=0)
    axis.set_xticks(range(len(path)), [label for label, _ in path])
    axis.set_xlabel("step")
    axis.set_ylabel("share of the base's divergence")
    clean_axes(axis)
    sheet.figure.legend(loc="lower center", ncols=_COLUMNS, handlelength=3.2, borderaxespad=0.1)
    return sheet.figure
