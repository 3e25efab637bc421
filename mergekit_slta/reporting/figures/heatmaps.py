"""Heat maps of a linearity file: distances between interpolated models (the paper's Fig. 6), and disentanglement.

Scope: figures of matrices, with one colour scale per measure. Zero is dark; a cell without a value is grey.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mergekit_slta.files.linearity_file import Linearity, SubmoduleLinearity, Vector
from mergekit_slta.reporting.figures.style import MAP, WIDTH, Sheet, short_name, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

MOST_EXPERTS = 4
MOST_PAIRS = 3
"""At most this many pairs are drawn, one per row; the figure says if there are more."""
Matrix = list[list[float]]
"""Rows from bottom to top; NaN for a cell without a value."""


def distances_figure(linearity: Linearity) -> Figure | None:
    """Draw distances between outputs of models interpolated between base and expert, beside those of a linear model.

    Returns:
        The figure; None for a file without distances.
    """
    chosen = _examples([entry for entry in linearity.submodules if entry.distances])
    if not chosen:
        return None
    models = linearity.models[:MOST_EXPERTS]
    columns = {title: [_matrix(rows) for rows in (entry.distances or ())] for title, entry in chosen.items()}
    most = max([1.0, *_numbers(matrix for column in columns.values() for matrix in column[: len(models)])])
    size = len(next(iter(columns.values()))[0])
    columns["if it were linear"] = [[[abs(i - j) / (size - 1) for j in range(size)] for i in range(size)]] * len(models)
    cut = f" Shown: the first {len(models)} of {len(linearity.models)} experts." * (models != linearity.models)
    side, left, top, below = (WIDTH - 1.05) / 4, 0.85, 0.45, 0.24
    sheet = Sheet.new(
        "How far outputs move on the way from the base to an expert",
        f"Base model {short_name(linearity.base_model)}. A cell compares the outputs of two models on that way, at "
        f"shares i and j. Straight, evenly stepped stripes are linear. S: Non-linearity Score, lower is more "
        f"linear.{cut}",
        top + (side + below) * len(models) + 0.85,
    )
    places = [place / (size - 1) for place in range(size)]
    for number, (title, matrices) in enumerate(columns.items()):
        for row, model in enumerate(short_names(linearity.models, 22)[: len(models)]):
            axis = sheet.panel(left + side * number, top + (side + below) * row, side - 0.14, side - 0.14)
            mesh = _show(axis, matrices[row], places, most)
            last = row == len(models) - 1
            axis.set_xticks([0, 0.5, 1], ["0", "½", "1"] if last else [""] * 3)
            axis.set_yticks([0, 0.5, 1], ["0", "½", "1"] if number == 0 else [""] * 3)
            axis.set_xlabel("share i of the way" if last else "")
            axis.set_title(f"{title}\n" * (row == 0) + _score(chosen.get(title), row), loc="center", fontsize=9)
            if number == 0:
                axis.set_ylabel(f"{model}\nshare j of the way", fontsize=8.5)
    _color_bar(sheet, mesh, 0.85, WIDTH - 1.19, "distance between outputs (share of that between base and expert)")
    return sheet.figure


def _examples(entries: Sequence[SubmoduleLinearity]) -> dict[str, SubmoduleLinearity]:
    """title -> measures of the whole model, the middle layer and its MLP block, if they exist."""
    layers = [entry.layer for entry in entries if entry.layer is not None]
    middle = (max(layers) + 1) // 2 if layers else None
    titles = {
        ("model", None): "whole model",
        ("layer", middle): f"layer {middle}",
        ("mlp", middle): f"MLP of layer {middle}",
    }
    found = {title: entry for entry in entries if (title := titles.get((entry.kind, entry.layer)))}
    return {title: found[title] for title in titles.values() if title in found}


def _score(entry: SubmoduleLinearity | None, model: int) -> str:
    if entry is None:
        return "S = 0"
    score = entry.non_linearity[model]
    return "unchanged" if score is None else f"S = {score:.2g}"


def disentanglement_figure(linearity: Linearity) -> Figure | None:
    """Draw the weight disentanglement error of pairs of experts over both merging weights.

    Returns:
        The figure; None for a file without pairs.
    """
    from mergekit_slta.maths.linearity import PAIR_GRID

    pairs = linearity.pairs[:MOST_PAIRS]
    levels = {"whole model": "model", "layers": "layer", "attention": "attention", "MLP": "mlp"}
    members = {title: [entry for entry in linearity.submodules if entry.kind == kind] for title, kind in levels.items()}
    columns = {
        title: [_mean([entry.disentanglement[pair] for entry in entries]) for pair in range(len(pairs))]
        for title, entries in members.items() if entries
    }  # fmt: skip
    tokens = [entry.disagreement for entry in members["whole model"] if entry.disagreement]
    if tokens:
        columns["next token"] = [_mean([rows[pair] for rows in tokens]) for pair in range(len(pairs))]
    if not pairs or not columns:
        return None
    cut = f" Shown: the first {len(pairs)} of {len(linearity.pairs)} pairs." * (pairs != linearity.pairs)
    side, left, top, each = (WIDTH - 0.62) / 5, 0.5, 0.3, (WIDTH - 0.62) / 5 + 0.42
    sheet = Sheet.new(
        "How much merged experts disturb each other: lower is better",
        f"Base model {short_name(linearity.base_model)}. Base + α₁·(first expert − base) + α₂·(second − base) is "
        "compared with one expert alone at the same weight, on that expert’s own task: outputs of the whole model and, "
        f"in the mean, of its parts; “next token”: the model’s most likely next token. Numbers are per cent.{cut}",
        top + each * len(pairs) + 0.68,
    )
    meshes, labels = {}, short_names(linearity.models, 34)
    weights = [f"{weight:g}" for weight in PAIR_GRID]
    for title, matrices in columns.items():
        number = list(columns).index(title)
        same = [title] if title == "next token" else [other for other in columns if other != "next token"]
        most = max([0.01, *_numbers(matrix for other in same for matrix in columns[other])])
        for row, (first, second) in enumerate(pairs):
            axis = sheet.panel(left + side * number, top + each * row + 0.2, side - 0.12, side - 0.12)
            meshes[title] = _show(axis, matrices[row], PAIR_GRID, most)
            _write_numbers(axis, matrices[row], PAIR_GRID, most)
            axis.set_xticks(PAIR_GRID, weights)
            axis.set_yticks(PAIR_GRID, weights if number == 0 else [""] * len(weights))
            axis.tick_params(length=2, pad=1.5, labelsize=7.5)
            axis.text(0.02, 1.02, title, transform=axis.transAxes, fontsize=8.5, fontweight="bold")
            if number == 0:
                axis.set_ylabel("α₂", labelpad=1)
                text = f"α₁ (across): {labels[first]}     α₂ (up): {labels[second]}"
                axis.text(0, 1.17, text, transform=axis.transAxes)
    for title in dict.fromkeys([next(iter(meshes)), list(meshes)[-1]]):
        if title == "next token":
            _color_bar(sheet, meshes[title], left + side * 3.35, side * 1.5, "tokens that differ (%)", percent=True)
        else:
            _color_bar(sheet, meshes[title], left, side * 2.9, "error (% of the expert’s own change)", percent=True)
    return sheet.figure


def _matrix(rows: Sequence[Vector]) -> Matrix:
    return [[math.nan if value is None else value for value in row] for row in rows]


def _mean(rows: Sequence[Vector]) -> Matrix:
    """Mean of each cell over the submodules that have it; the second expert's weight increases from row to row."""
    means = []
    for values in zip(*rows, strict=True):
        found = [value for value in values if value is not None]
        means.append(statistics.fmean(found) if found else math.nan)
    side = math.isqrt(len(means))
    return [means[place::side] for place in range(side)]


def _numbers(matrices: Iterable[Matrix]) -> list[float]:
    return [value for matrix in matrices for row in matrix for value in row if not math.isnan(value)]


def _show(axis: Axes, matrix: Matrix, places: Sequence[float], most: float) -> QuadMesh:
    import matplotlib

    half = (places[1] - places[0]) / 2
    edges = [places[0] - half, *(place + half for place in places)]
    axis.set_facecolor("#d9d9d9")
    axis.set_aspect("equal")
    color = matplotlib.colormaps[MAP]
    return axis.pcolormesh(edges, edges, matrix, cmap=color, vmin=0, vmax=most, edgecolors="face", linewidth=0.2)


def _write_numbers(axis: Axes, matrix: Matrix, places: Sequence[float], most: float) -> None:
    """Write the number into every cell, in per cent."""
    for up, row in zip(places, matrix, strict=True):
        for across, value in zip(places, row, strict=True):
            color = "black" if math.isnan(value) or value > 0.5 * most else "white"
            axis.text(across, up, _percent(value), ha="center", va="center_baseline", fontsize=7.5, color=color)


def _percent(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{100 * value:.0f}" if value >= 0.0095 or value == 0 else f"{100 * value:.1f}"[1:]


def _color_bar(sheet: Sheet, mesh: QuadMesh, left: float, width: float, label: str, *, percent: bool = False) -> None:
    axis = sheet.panel(left, sheet.height - 0.55, width, 0.12)
    bar = sheet.figure.colorbar(mesh, cax=axis, orientation="horizontal")
    bar.set_label(label)
    bar.outline.set_visible(False)  # type: ignore[operator]
    if percent:
        axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}")
