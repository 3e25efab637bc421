"""Figures, drawn from saved files only. matplotlib is imported when something is drawn, and not before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_slta.alphas import Alphas, SubmoduleAlphas
from mergekit_slta.errors import show
from mergekit_slta.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette: apart from each other under every common colour blindness."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_TITLES = {"attention": "attention blocks", "mlp": "MLP blocks", "layer": "decoder layers"}


def draw_alphas(alphas: str | os.PathLike[str] | Alphas, path: str | os.PathLike[str]) -> None:
    """The merging weight of every expert over the depth of the model (the paper's Fig. 5), as PNG or SVG.

    A panel per kind of submodule, `embed` and `head` at the ends of the depth axis; bars are jackknife standard errors.

    Args:
        alphas: the alphas, or their file.
        path: where to draw; the suffix chooses the format.

    Raises:
        AlphasError: the file cannot be read.
        OutputError: the figure cannot be written.
    """
    if not isinstance(alphas, Alphas):
        alphas = Alphas.load(alphas)
    figure = _alphas_figure(alphas)
    path = Path(path)
    write_atomically(
        path, lambda temporary: figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", dpi=150)
    )


def _alphas_figure(alphas: Alphas) -> Figure:
    from matplotlib.figure import Figure

    kinds = [kind for kind in _TITLES if any(entry.kind == kind for entry in alphas.submodules)]
    figure = Figure(figsize=(max(6.4, 4.2 * len(kinds)), 3.6), layout="constrained", facecolor="white")
    axes = figure.subplots(1, max(1, len(kinds)), sharey=True, squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=True):
        _draw_kind(axis, alphas, kind)
    axes[0].set_ylabel("merging weight α")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw_kind(axis: Axes, alphas: Alphas, kind: str) -> None:
    entries = [entry for entry in alphas.submodules if entry.kind in (kind, "embed", "head")]
    places = list(range(len(entries)))
    axis.axhline(0, color="#888888", linewidth=0.8)
    for column, model in enumerate(alphas.models):
        axis.errorbar(
            [place + (column - len(alphas.models) / 2) * 0.08 for place in places],
            [entry.alpha[column] for entry in entries],
            yerr=[entry.stderr[column] if entry.stderr else 0.0 for entry in entries],
            color=COLORS[column % len(COLORS)],
            marker=MARKERS[column % len(MARKERS)],
            markersize=4,
            linewidth=1.2,
            capsize=2,
            label=show(os.path.basename(model.rstrip("/")), 32),
        )
    axis.set_title(_TITLES[kind])
    axis.set_xlabel("depth (decoder layer)")
    step = max(1, len(entries) // 12)
    shown = [place for place in places if entries[place].layer is None or (entries[place].layer or 0) % step == 0]
    axis.set_xticks(shown, [_tick(entries[place]) for place in shown])
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _tick(entry: SubmoduleAlphas) -> str:
    return entry.name if entry.layer is None else str(entry.layer)
