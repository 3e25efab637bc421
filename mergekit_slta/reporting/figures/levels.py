"""Draw the linearity of models, layers and blocks from a linearity file (the paper's Fig. 1 to 4).

Scope: one panel per measure, one row per level. The mean is a point, the standard deviation a bar, with both numbers
beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mergekit_slta.files.linearity_file import Level, Linearity, MeanStd
from mergekit_slta.reporting.figures.style import GREY, WIDTH, Look, Sheet, clean_axes, escape, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEVELS = {
    "model": "whole model",
    "layer": "decoder layers",
    "attention": "attention blocks",
    "attention_head": "attention heads",
    "mlp": "MLP blocks",
    "norm": "norms",
    "linear": "matrices",
    "embed": "embeddings",
    "head": "output head",
}
"""kind of submodule -> name of its level, in the order of drawing."""
_LONGEST = 10**5
"""Maximum ratio between the ends of a logarithmic axis."""
_FAR_APART = 10.0
"""If means differ by more than this factor, the axis is logarithmic."""
_LINE, _GAP = 0.17, 0.12
"""Height of a series within a row, and of the gap between rows, in inches."""


class _Series(NamedTuple):
    label: str
    look: Look
    mean_std: Callable[[Level], MeanStd | None]


class _Measure(NamedTuple):
    title: str
    unit: str
    series: tuple[_Series, ...]


_MEASURES = (
    _Measure(
        "Each expert by itself: Non-linearity Score",
        "sum of squared deviations from a straight line",
        (_Series("", Look.of(0), lambda level: level.non_linearity),),
    ),
    _Measure(
        "Merged experts: projection distance",
        "|1 − projection of the merged change on the sum of the experts’ changes|",
        (
            _Series("pairs of experts", Look.of(1), lambda level: level.projection_distance.pairs),
            _Series("triples of experts", Look.of(2), lambda level: level.projection_distance.triples),
        ),
    ),
    _Measure(
        "Merged experts: 1 − cosine, against the baseline of experts by themselves",
        "1 − cosine of the merged change with the sum of the experts’ changes",
        (
            _Series("pairs of experts", Look.of(1), lambda level: _away_from_one(level.cosine.pairs)),
            _Series("triples of experts", Look.of(2), lambda level: _away_from_one(level.cosine.triples)),
            _Series("baseline: one expert with another", Look.of(4), lambda level: _away_from_one(level.cosine_base)),
        ),
    ),
)


def _away_from_one(cosine: MeanStd | None) -> MeanStd | None:
    """1 - cosine, at least 0: rounding can make a cosine larger than 1."""
    return None if cosine is None else MeanStd(mean=max(0.0, 1 - cosine.mean), std=cosine.std)


def levels_figure(linearity: Linearity) -> Figure | None:
    """Draw the Non-linearity Score of every level and, if experts were merged, projection distance and cosine.

    Returns:
        The figure; None for a file without levels.
    """
    levels = {kind: linearity.levels[kind] for kind in [*LEVELS, *linearity.levels] if kind in linearity.levels}
    if not levels:
        return None
    drawn = []
    for measure in _MEASURES:
        found = [one for one in measure.series if any(one.mean_std(level) is not None for level in levels.values())]
        if found or measure is _MEASURES[0]:
            drawn.append((measure, found or measure.series))
    heights = [len(levels) * (_LINE * len(series) + _GAP) for _, series in drawn]
    count = len(linearity.models)
    sheet = Sheet.new(
        "How linear the parts of the model are: lower is more linear",
        f"Base model {short_name(linearity.base_model)}, {count} expert{'s' if count > 1 else ''}. "
        "Points: means; bars: ± standard deviation; n: submodules. On a logarithmic axis, bars down to zero and "
        "below end at the left edge, and an arrow there is a mean further left or 0.",
        sum(heights) + 0.98 * len(drawn) - 0.15,
    )
    top = 0.0
    for (measure, series), height in zip(drawn, heights, strict=True):
        named = len(series) > 1 or bool(series[0].label)
        axis = sheet.panel(1.75, top + 0.48 - 0.2 * (top == 0), WIDTH - 3.25, height)
        _draw(axis, levels, series)
        axis.set_title(measure.title, x=-1.62 / (WIDTH - 3.25), pad=20 if named else 7)
        axis.set_xlabel(measure.unit)
        if named:
            place = (-1.62 / (WIDTH - 3.25), 1.0)
            for one in series:
                axis.plot([], label=one.label, linestyle="none", **one.look.style(6))
            axis.legend(loc="lower left", bbox_to_anchor=place, borderaxespad=0.3, borderpad=0, ncols=3, handlelength=1)
        top += height + 0.98 - 0.2 * (top == 0)
    return sheet.figure


def _draw(axis: Axes, levels: dict[str, Level], series: Sequence[_Series]) -> None:
    measures = [(row, place, one, one.mean_std(level)) for row, level in enumerate(levels.values())
               for place, one in enumerate(series)]  # fmt: skip
    positive = [mean_std.mean for *_, mean_std in measures if mean_std is not None and mean_std.mean > 0]
    logarithmic = bool(positive) and max(positive) > _FAR_APART * min(positive)
    edge = 0.0
    if logarithmic:
        edge = max(
            min(positive) / 4, max(positive) / _LONGEST
        )  # embeddings are a table look-up, so their score is only rounding
        axis.set_xscale("log")
        axis.set_xlim(
            edge, 2.5 * max(mean_std.mean + mean_std.std for *_, mean_std in measures if mean_std is not None)
        )
    for row, place, one, mean_std in measures:
        height = row + (place - (len(series) - 1) / 2) * _LINE / (_LINE * len(series) + _GAP)
        note = "nothing changes" if mean_std is None else f"{mean_std.mean:.3g}"
        note += f" ± {mean_std.std:.2g}" if mean_std is not None and mean_std.std else ""
        axis.text(1.02, height, note, transform=axis.get_yaxis_transform(), va="center", fontsize=8.5)
        if mean_std is None:
            continue
        style = {**one.look.style(6), "linestyle": "none"}
        if logarithmic and mean_std.mean <= edge:
            axis.plot(edge, height, **{**style, "marker": "<", "clip_on": False})
            continue
        low = max(mean_std.mean - mean_std.std, edge)
        bar = [[mean_std.mean - low], [mean_std.std]]
        axis.errorbar(mean_std.mean, height, xerr=bar, capsize=2.5, elinewidth=1.2, **style)
    if not logarithmic:
        axis.set_xlim(left=0)
    rows = [f"{LEVELS.get(kind, escape(kind, 16))} (n = {level.count})" for kind, level in levels.items()]
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    for row in range(1, len(rows)):
        axis.axhline(row - 0.5, color=GREY, linewidth=0.3)
    clean_axes(axis, "x")
