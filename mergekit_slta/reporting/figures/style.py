"""Common style of all figures: sizes, colours, names; and saving figures.

Scope: independent of the files that are drawn. A figure is 7 inches wide; a model card shows it 700 pixels wide, so one
point of type is 1.4 pixels. The background is white, which is readable in print and on a dark page. Colours are those
of Okabe and Ito, each with its own marker and line style. Heat maps use cividis, whose lightness increases evenly. Both
are readable for colour-blind people and in black-and-white print.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_slta.errors import OutputError, show
from mergekit_slta.files.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.0
"""Inches."""
FORMATS = {
    "png": {"Software": None},
    "svg": {"Date": None},
}
"""format -> metadata to leave out, because it differs between runs."""
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p", ">")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MAP = "cividis"
FAINT, GREY = "#e4e4e4", "#666666"
_SETTINGS = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "svg.hashsalt": "mergekit-slta",
    "savefig.dpi": 200,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


class Look(NamedTuple):
    """Colour, marker and line of a series."""

    color: str
    marker: str
    line: Any
    hollow: bool

    @classmethod
    def of(cls, place: int) -> Look:
        """The look of series number `place`, from 0. The first ten looks are different."""
        marker, line = MARKERS[place % len(MARKERS)], LINES[place % len(LINES)]
        return cls(COLORS[place % len(COLORS)], marker, line, place >= len(COLORS))

    def style(self, size: float = 4.5) -> dict[str, Any]:
        """Keyword arguments for a matplotlib line, without the line style; `size` is the marker size in points."""
        face = "white" if self.hollow else self.color
        return {"color": self.color, "marker": self.marker, "markersize": size, "markerfacecolor": face}


def short_name(model: object, longest: int = 32) -> str:
    """The last part of a model's or submodule's path, shortened in the middle to `longest` characters, and escaped."""
    return short_names([str(model)], longest)[0]


def short_names(models: Sequence[str], longest: int = 32) -> list[str]:
    """As `short_name`, but with enough parts of the paths to make the names different (`run1/final`, `run2/final`)."""
    return list(map(escape, path_ends(models, longest)))


def path_ends(models: Sequence[str], longest: int = 32) -> list[str]:
    """As `short_names`, but not escaped."""
    paths = [[part for part in re.split(r"[/\\]", show(model, 4096)) if part] or [show(model)] for model in models]
    for depth in range(1, max(map(len, paths)) + 1):
        ends = ["/".join(path[-depth:]) for path in paths]
        if len(set(ends)) == len(ends):
            break
    keep = longest // 2
    return [end if len(end) <= longest else f"{end[: longest - keep - 1]}…{end[-keep:]}" for end in ends]


def escape(text: object, longest: int = 200) -> str:
    """Escape text for matplotlib, which reads `$...$` as a formula and omits labels like `_x` from legends."""
    shown = show(text, longest).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


@contextmanager
def figure_style() -> Iterator[None]:
    """Use the settings of this file and matplotlib's own fonts; the user's `matplotlibrc` is ignored."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


class Sheet(NamedTuple):
    """A figure laid out in inches, so that the size of a panel does not depend on the number of panels.

    Attributes:
        figure: the figure, with its heading.
        height: height of the space below the heading, in inches.
    """

    figure: Figure
    height: float

    @classmethod
    def new(cls, title: str, notes: str, height: float) -> Sheet:
        """Make a figure with a title, notes on how to read it, and `height` inches of empty space below."""
        from matplotlib.figure import Figure

        lines = [line for note in notes.split("\n") for line in textwrap.wrap(note, 104)]
        total = height + 0.38 + 0.17 * len(lines)
        figure = Figure(figsize=(WIDTH, total))
        figure.text(0.012, 1 - 0.08 / total, title, va="top", fontsize=11.5, fontweight="bold")
        figure.text(0.012, 1 - 0.32 / total, "\n".join(lines), va="top", color="#333333", linespacing=1.3)
        return cls(figure, height)

    def panel(self, left: float, top: float, width: float, height: float) -> Axes:
        """Add axes; `top` counts from the heading. All sizes are in inches."""
        total = self.figure.get_figheight()
        return self.figure.add_axes((left / WIDTH, (self.height - top - height) / total, width / WIDTH, height / total))

    def label(self, text: str, height: float) -> None:
        """Write the common label of the vertical axes of the panels in the top `height` inches."""
        place = (self.height - height / 2) / self.figure.get_figheight()
        self.figure.text(0.012, place, text, rotation="vertical", va="center")


def save_figure(make: Callable[[], Figure | None], *paths: Path) -> list[Path]:
    """Make a figure and write it to every path, in the format of the path's suffix.

    The same figure gives the same bytes.

    Returns:
        The written paths; empty if `make` returns no figure.

    Raises:
        OutputError: a file cannot be written, or the format of its suffix is not supported.
    """
    formats = [path.suffix.lstrip(".").lower() or "png" for path in paths]
    for path, form in zip(paths, formats, strict=True):
        if form not in FORMATS:
            raise OutputError(f"cannot draw {show(path)}: figures are .png or .svg", code="unsupported-format")
    with figure_style():
        figure = make()
        if figure is None:
            return []
        for path, form in zip(paths, formats, strict=True):
            write_atomically(path, partial(figure.savefig, format=form, metadata=FORMATS[form]))
    return list(paths)


def clean_axes(axis: Axes, grid: str = "y") -> None:
    """Draw a faint grid along the axis `grid`, and remove the top and right frame."""
    axis.grid(axis=grid, color=FAINT, linewidth=0.7)
    axis.spines[["top", "right"]].set_visible(False)
