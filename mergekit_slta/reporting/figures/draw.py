"""Draw and write all figures of a saved file.

Scope: the list of figures. matplotlib is imported only when a figure is drawn.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_slta.errors import AlphasError, show
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.linearity_file import Linearity
from mergekit_slta.files.names import FIGURE_PREFIX, figure_name
from mergekit_slta.reporting.figures.evaluation import divergence_figure
from mergekit_slta.reporting.figures.heatmaps import disentanglement_figure, distances_figure
from mergekit_slta.reporting.figures.levels import levels_figure
from mergekit_slta.reporting.figures.over_depth import alphas_figure, residuals_figure
from mergekit_slta.reporting.figures.style import FORMATS, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(source: Alphas | Linearity, folder: Path, prefix: str = FIGURE_PREFIX) -> list[Path]:
    """Draw all figures of a file, each as PNG and SVG.

    An alphas file gives `alphas` (the paper's Fig. 5), and `residuals` if submodules were solved. After steps of
    `objective: joint` it gives `divergence` in its place, if one was taken. A linearity file gives `levels` (Fig. 1-4),
    `distances` (Fig. 6) and, for two experts or more, `disentanglement`.

    Args:
        source: the content of a file.
        folder: the figures are written there as `{prefix}_{figure}.png` and `.svg`; existing files are replaced.
        prefix: first part of the file names.

    Returns:
        The paths written.

    Raises:
        AlphasError: an alphas file lists no submodules, or a linearity file contradicts itself.
        OutputError: a figure cannot be written.
    """
    figures: dict[str, Callable[[], Figure | None]]
    if isinstance(source, Alphas):
        _check_alphas(source)
        figures = {
            "alphas": lambda: alphas_figure(source),
            "residuals": lambda: residuals_figure(source),
            "divergence": lambda: divergence_figure(source),
        }
    else:
        _check_linearity(source)
        figures = {
            "levels": lambda: levels_figure(source),
            "distances": lambda: distances_figure(source),
            "disentanglement": lambda: disentanglement_figure(source),
        }
    written = []
    for figure, make in figures.items():
        written += save_figure(make, *(Path(folder) / figure_name(figure, form, prefix) for form in FORMATS))
    return written


def draw_alphas(alphas: str | os.PathLike[str] | Alphas, path: str | os.PathLike[str]) -> None:
    """Draw the merging weight of every expert over the depth of the model (the paper's Fig. 5), as PNG or SVG.

    Args:
        alphas: the alphas, or the path of their file.
        path: the figure's file; its suffix chooses the format.

    Raises:
        AlphasError: the file cannot be read, or lists no submodules.
        OutputError: the figure cannot be written.
    """
    loaded = alphas if isinstance(alphas, Alphas) else Alphas.load(alphas)
    _check_alphas(loaded)
    save_figure(lambda: alphas_figure(loaded), Path(path))


def _check_alphas(alphas: Alphas) -> None:
    if not alphas.submodules:
        raise AlphasError(
            "there is nothing to draw: the alphas file lists no submodules; calibrate again", code="nothing-to-draw"
        )


def _check_linearity(linearity: Linearity) -> None:
    """Check that the lengths of a file's parts fit together.

    Raises:
        AlphasError: they do not.
    """
    from mergekit_slta.maths.linearity import NUM_INTERVALS, PAIR_GRID

    models, pairs, side, cells = len(linearity.models), len(linearity.pairs), NUM_INTERVALS + 1, len(PAIR_GRID) ** 2
    known = all(0 <= model < models for pair in linearity.pairs for model in pair)
    for entry in linearity.submodules:
        grids = [*entry.disentanglement, *(entry.disagreement or ())]
        counts = {len(entry.disentanglement), len(entry.disagreement or entry.disentanglement)}
        matrices = entry.distances or (((None,) * side,) * side,) * models
        square = all(len(matrix) == side and {*map(len, matrix)} == {side} for matrix in matrices)
        whole = len(entry.non_linearity) == len(matrices) == models and square
        if not (known and whole and counts == {pairs} and all(len(grid) == cells for grid in grids)):
            raise AlphasError(
                f"the linearity file contradicts itself at {show(entry.name)}: run `mergekit-slta linearity` again",
                code="damaged-file",
            )
