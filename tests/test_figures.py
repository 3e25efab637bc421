"""Figures come from saved files, in the formats asked for."""

from __future__ import annotations

import pytest

from mergekit_slta.calibration import calibrate
from mergekit_slta.errors import AlphasError
from mergekit_slta.figures import draw_alphas


@pytest.mark.parametrize("granularity", ["layer", "attn_mlp"])
def test_alphas_are_drawn_from_their_file(tiny, options, tmp_path, granularity):
    """PNG and SVG, each a picture of its format."""
    calibrate(tiny.recipe(granularity=granularity), options).save(tmp_path / "alphas.json")
    draw_alphas(tmp_path / "alphas.json", tmp_path / "alphas.png")
    draw_alphas(tmp_path / "alphas.json", tmp_path / "alphas.svg")
    assert (tmp_path / "alphas.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = (tmp_path / "alphas.svg").read_text()
    assert "<svg" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alphas.json", "alphas.png", "alphas.svg"]


def test_figure_shows_every_expert(tiny, options):
    """Each panel has a line per expert, with the file's numbers."""
    from mergekit_slta.figures import _alphas_figure

    alphas = calibrate(tiny.recipe(), options)
    figure = _alphas_figure(alphas)
    assert [axis.get_title() for axis in figure.axes] == ["attention blocks", "MLP blocks"]
    line = figure.axes[1].containers[2].lines[0]
    expected = [entry.alpha[2] for entry in alphas.submodules if entry.kind in ("embed", "mlp", "head")]
    assert list(line.get_ydata()) == expected


def test_missing_file_is_an_error_of_our_own(tmp_path):
    """Nothing is drawn from nothing."""
    with pytest.raises(AlphasError, match="there is no alphas file"):
        draw_alphas(tmp_path / "none.json", tmp_path / "x.png")
