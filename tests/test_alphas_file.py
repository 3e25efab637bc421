"""Alphas files that are not what they should be."""

from __future__ import annotations

import json

import pytest
from conftest import refused

from mergekit_slta.errors import AlphasError
from mergekit_slta.files.alphas_file import Alphas

MEASURE = {"mean": 1.0, "stderr": None}
POINT = {"name": "base", "ridge": None, "divergence": [MEASURE], "weighted": 1.0}


def evaluated(model: str, **changes) -> dict:
    """An evaluation of one task."""
    names = ("divergence_base", "divergence", "share", "loss_base", "loss_expert", "loss")
    task = {"model": model, "rows": [3, 1], **dict.fromkeys(names, MEASURE), "flags": ["weak_expert"]}
    return {"lambda": 0.5, "points": [POINT] * 2, "merge": 1, "trials": [], "tasks": [task], **changes}


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
        ({"evaluation": evaluated("y")}, "damaged-file", "the evaluation's tasks are not the experts"),
        ({"evaluation": evaluated("x", merge=2)}, "damaged-file", "the evaluation's merge is none of its points"),
        ({"evaluation": evaluated("x", merge=-1)}, "damaged-file", "the evaluation's merge is none of its points"),
        ({"evaluation": evaluated("x", points=[])}, "damaged-file", "the evaluation's merge is none of its points"),
        (
            {"evaluation": evaluated("x", points=[POINT | {"divergence": []}] * 2)},
            "damaged-file",
            "the evaluation's points are not for its tasks",
        ),
        ({"evaluation": evaluated("x", points=[POINT | {"weighted": float("nan")}] * 2)}, "damaged-file", "finite"),
        ({"evaluation": {}}, "damaged-file", "evaluation.points"),
        ({"evaluation": 3}, "damaged-file", "evaluation"),
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


def test_an_evaluation_is_kept(tmp_path):
    """By loading and saving, under the recipe's name of the scale; a file without one has no such key."""
    path = tmp_path / "slta_alphas.json"
    path.write_text(document(evaluation=evaluated("x")))
    alphas = Alphas.load(path)
    assert alphas.evaluation.scale == 0.5
    alphas.save(path)
    assert Alphas.load(path) == alphas
    assert json.loads(path.read_text())["evaluation"] == evaluated("x")
    alphas.model_copy(update={"evaluation": None}).save(path)
    assert "evaluation" not in json.loads(path.read_text())
