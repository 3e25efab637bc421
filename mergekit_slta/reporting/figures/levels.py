"""Draw the linearity of models, layers and blocks from a linearity file (the paper's Fig. 1 to 4).

Scope: one panel per measure, side by side, and one row per level. The mean is a point with its number, the standard
deviation a bar. The figure is as high as a model card's others; the HTML page has all numbers in a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mergekit_slta.files.linearity_file import Level, Linearity, MeanStd
from mergekit_slta.reporting.figures.style import GREY, WIDTH, Look, Sheet, clean_axes, escape, short_name
from mergekit_slta.reporting.meanings import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEVELS = KINDS
"""kind of submodule -> name of its level, in the order of drawing."""
_LONGEST = 10**5
"""Maximum ratio between the ends of a logarithmic axis."""
_FAR_APART = 10.0
"""If means differ by more than this factor, the axis is logarithmic."""
_LINE, _GAP = 0.135, 0.1
"""Height of a series within a row, and of the gap between rows, in inches."""
_LEFT, _NUMBERS, _RIGHT = 1.7, 0.62, 0.02
"""Width of the names of the levels, of the numbers beside a panel, and of the edge, in inches."""


class _Series(NamedTuple):
    label: str
    look: Look
    mean_std: Callable[[Level], MeanStd | None]


class _Measure(NamedTuple):
    title: str
    series: tuple[_Series, ...]


_MEASURES = (
    _Measure("Non-linearity Score", (_Series("one expert", Look.of(0), lambda level: level.non_linearity),)),
    _Measure(
        "Projection distance",
        (
            _Series("pairs of experts", Look.of(1), lambda level: level.projection_distance.pairs),
            _Series("triples of experts", Look.of(2), lambda level: level.projection_distance.triples),
        ),
    ),
    _Measure(
        "1 − cosine",
        (
            _Series("pairs of experts", Look.of(1), lambda level: _away_from_one(level.cosine.pairs)),
            _Series("triples of experts", Look.of(2), lambda level: _away_from_one(level.cosine.triples)),
            _Series("baseline: one with another", Look.of(4), lambda level: _away_from_one(level.cosine_base)),
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
            drawn.append((measure.title, found or measure.series))
    row = _LINE * max(len(series) for _, series in drawn) + _GAP
    height = row * len(levels)
    count = len(linearity.models)
    merged = (
        " Projection distance and cosine: the change of merged experts against the sum of the experts’ changes."
        if len(drawn) > 1
        else ""
    )
    sheet = Sheet.new(
        "How linear the parts of the model are: lower is more linear",
        f"Base model {short_name(linearity.base_model)}, {count} expert{'s' if count > 1 else ''}. "
        f"Points and numbers: means; bars: ± standard deviation; n: submodules. Score: sum of squared deviations of an "
        f"expert from a straight line.{merged} On a logarithmic axis, bars down to zero and below end at the left "
        "edge, and an arrow there is a mean further left or 0.",
        height + 1.0,
    )
    width = (WIDTH - _LEFT - _RIGHT) / len(drawn)
    for place, (title, series) in enumerate(drawn):
        axis = sheet.panel(_LEFT + place * width, 0.33, width - _NUMBERS, height)
        _draw(axis, levels, series, row, is_first=place == 0)
        axis.set_title(title, pad=6)
    looks = {one.label: one.look for _, series in drawn for one in series}
    handles = [sheet.figure.axes[0].plot([], label=label, linestyle="none", **look.style(6))[0]
               for label, look in looks.items()]  # fmt: skip
    sheet.figure.legend(handles=handles, loc="lower center", ncols=4, handlelength=1, borderaxespad=0.2)
    return sheet.figure


def _draw(
    axis: Axes, levels: dict[str, Level], series: Sequence[_Series], row_height: float, *, is_first: bool
) -> None:
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
        height = row + (place - (len(series) - 1) / 2) * _LINE / row_height
        note = "no change" if mean_std is None else f"{mean_std.mean:.2g}"
        axis.text(1.03, height, note, transform=axis.get_yaxis_transform(), va="center", fontsize=8)
        if mean_std is None:
            continue
        style = {**one.look.style(5), "linestyle": "none"}
        if logarithmic and mean_std.mean <= edge:
            axis.plot(edge, height, **{**style, "marker": "<", "clip_on": False})
            continue
        low = max(mean_std.mean - mean_std.std, edge)
        bar = [[mean_std.mean - low], [mean_std.std]]
        axis.errorbar(mean_std.mean, height, xerr=bar, capsize=2, elinewidth=1.1, **style)
    if not logarithmic:
        axis.set_xlim(left=0)
    axis.locator_params(axis="x", **({"numticks": 4} if logarithmic else {"nbins": 3}))
    rows = [f"{LEVELS.get(kind, escape(kind, 16))} (n = {level.count})" for kind, level in levels.items()]
    axis.set_yticks(range(len(rows)), rows if is_first else [""] * len(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    for row in range(1, len(rows)):
        axis.axhline(row - 0.5, color=GREY, linewidth=0.3)
    clean_axes(axis, "x")
