"""Alphas files that are not what they should be."""

from __future__ import annotations

import json

import pytest
from conftest import refused

from mergekit_slta.errors import AlphasError
from mergekit_slta.files.alphas_file import Alphas


def document(**changes) -> str:
    content = {"format": "mergekit-slta/alphas", "version": 1, "granularity": "layer", "base_model": "b",
               "models": ["x"], "submodules": [], "calibration": {}, "provenance": {}}  # fmt: skip
    return json.dumps({**content, **changes})


@pytest.mark.parametrize(
    ("changes", "code", "reason"),
    [
        ({"models": []}, "damaged-file", "models are missing or listed twice"),
        ({"models": ["x", "x"]}, "damaged-file", "models are missing or listed twice"),
        ({"version": 2}, "other-file-version", "of version 2"),
        ({"version": "1"}, "other-file-version", "of version 1"),
        ({"calibration": {"far_from_base": ["x"]}}, "damaged-file", "the calibration's far_from_base"),
        ({"calibration": {"far_from_base": {"x": "1"}}}, "damaged-file", "the calibration's far_from_base"),
        ({"calibration": {"tasks": 3}}, "damaged-file", "the calibration's tasks"),
        ({"calibration": {"tasks": [{"flags": []}]}}, "damaged-file", "the calibration's tasks"),
        ({"calibration": {"tasks": [{"model": "x", "flags": 1}]}}, "damaged-file", "the calibration's tasks"),
    ],
)
def test_alphas_files_say_what_is_wrong(tmp_path, changes, code, reason):
    """Models that are missing or twice, tasks that are none, and versions that are not known here."""
    path = tmp_path / "slta_alphas.json"
    path.write_text(document())
    Alphas.load(path)
    path.write_text(document(**changes))
    with refused(AlphasError, code, path, reason):
        Alphas.load(path)
