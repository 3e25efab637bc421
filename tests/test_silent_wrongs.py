"""What would merge without a word, and is not what anybody wanted."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from conftest import FORMATS, slta
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_slta.calibration.assemble import assemble
from mergekit_slta.calibration.calibrate import calibrate
from mergekit_slta.calibration.resolve import solve_again
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.layout import Layout, LayoutSubmodule, SolveSettings
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.objectives.solving import EXPECTED_ALPHA
from mergekit_slta.reporting.card import section
from mergekit_slta.reporting.terminal import describe_alphas
from mergekit_slta.runtime.screen import plain


def warnings_of(caplog, recipe: dict) -> str:
    with caplog.at_level(logging.WARNING):
        calibrate(recipe)
    return caplog.text


def test_a_sound_recipe_is_not_warned_of(trained, caplog):
    recipe = trained.recipe(text=FORMATS["own"] + "{answer}")
    assert not warnings_of(caplog, recipe)


def test_an_expert_that_is_the_base_under_another_name(tiny, caplog, tmp_path):
    recipe = tiny.recipe()
    shutil.copytree(tiny.base, tmp_path / "copy")
    recipe["models"][1]["model"] = str(tmp_path / "copy")
    text = warnings_of(caplog, recipe)
    assert f"{tmp_path / 'copy'} holds the same weights as {recipe['base_model']}" in text
    assert text.count("same weights") == 1


def test_an_expert_twice_under_two_names(tiny, caplog, tmp_path):
    recipe = tiny.recipe()
    shutil.copytree(tiny.experts[0], tmp_path / "copy")
    recipe["models"][1]["model"] = str(tmp_path / "copy")
    assert f"{tmp_path / 'copy'} holds the same weights as {recipe['models'][0]['model']}" in warnings_of(
        caplog, recipe
    )


def test_an_expert_of_another_base(tiny, caplog, tmp_path):
    """Weights drawn anew: as far from the base as from any other model."""
    model = AutoModelForCausalLM.from_pretrained(tiny.experts[1])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(parameter[torch.randperm(len(parameter))])
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny.base).save_pretrained(tmp_path / "other")
    recipe = tiny.recipe()
    recipe["models"][1]["model"] = str(tmp_path / "other")
    text = warnings_of(caplog, recipe)
    assert f"{tmp_path / 'other'} differs from the base by 1" in text  # a hundred and some percent
    assert "of the weights in the middle layer" in text
    assert text.count("differs from the base") == 1


def test_an_expert_of_another_base_is_named_as_long_as_its_weights_are_used(tiny, caplog, tmp_path, write_recipe):
    """In the alphas file and the card, when the alphas are reused or solved again, and not where it is left out."""
    model = AutoModelForCausalLM.from_pretrained(tiny.experts[1])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(parameter[torch.randperm(len(parameter))])
    model.save_pretrained(tmp_path / "other")
    recipe, path = tiny.recipe(2, num_samples=2), tmp_path / "alphas.json"
    recipe["models"][1]["model"] = str(tmp_path / "other")
    said = f"{tmp_path / 'other'} differs from the base by 1"
    for parameters in ({}, {}, {"ridge": 0.5}):  # calibrated, reused, solved again
        recipe["parameters"] |= parameters
        caplog.clear()
        result = slta("calibrate", write_recipe(recipe), "-o", path, "--quiet")
        assert result.exit_code == 0, result.output
        assert caplog.text.count(said) == 1
        alphas = Alphas.load(path)
        assert list(alphas.calibration["far_from_base"]) == [str(tmp_path / "other")]
        assert "was it fine-tuned from this very base?" in section(alphas, [])
    statistics = Statistics.load(tmp_path / "alphas.stats.safetensors")
    assert solve_again(statistics, rows=1).calibration["far_from_base"] == alphas.calibration["far_from_base"]
    assert "far_from_base" not in solve_again(statistics, without=["other"]).calibration


def test_rows_that_are_all_cut_to_the_same_prefix(tiny, caplog, tmp_path):
    rows = [{"text": f"Below is an instruction that describes a task. Number {number}"} for number in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tiny.recipe(max_seq_length=8, num_samples=5)
    recipe["models"][0]["parameters"] = {"dataset": str(tmp_path / "rows.jsonl")}
    assert "are the same 8 tokens: raise `max_seq_length`" in warnings_of(caplog, recipe)


def test_extreme_weights_are_flagged_with_what_helps(tiny, tmp_path, write_recipe):
    """In the file, and in the card."""
    path = tmp_path / "alphas.json"
    assert slta("calibrate", write_recipe(tiny.recipe(granularity="linear")), "-o", path, "--quiet").exit_code == 0
    found = Alphas.load(path)
    for entry in found.submodules:
        assert ("extreme" in entry.flags) == any(
            not EXPECTED_ALPHA[0] <= alpha <= EXPECTED_ALPHA[1] for alpha in entry.alpha
        )
    flagged = [entry.model_copy(update={"flags": ("extreme",)}) for entry in found.submodules]
    text = section(found.model_copy(update={"submodules": tuple(flagged)}), [])
    assert "weights outside [-0.5, 1.5] (`ridge`, more rows or a coarser `granularity` reduce them)" in text
    lines = plain(*describe_alphas(found.model_copy(update={"submodules": tuple(flagged)}))).splitlines()
    named = ", ".join(entry.name for entry in flagged[:12])
    assert lines[-1].startswith(f"extreme     {len(flagged)} submodules, weights outside [-0.5, 1.5] (`ridge`, more")
    assert lines[-1].endswith(f": {named}, … ({len(flagged) - 12} more)")


@pytest.mark.parametrize(("alpha", "expected"), [(1.51, True), (1.49, False), (-0.49, False), (-0.51, True)])
def test_what_is_extreme(alpha, expected):
    """Task x wants its expert whole; y's own change on its rows is c times x's, so that alpha_y is (c - 1) / c."""
    c = 1 / (1 - alpha)
    grams = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, c], [c, c * c]]], dtype=torch.float64)
    part = LayoutSubmodule(name="m", kind="layer", layer=0, tensors=("t",), slices={}, objectives=("m",))
    layout = Layout(
        granularity="layer", objective="features", base_model="b", models=("x", "y"), canonical=("x", "y"),
        submodules=(part,), copied=(), settings={}, tasks=(), solve_dependence=None, identity={}, versions={},
        solve=SolveSettings(ridge=0.0, balance=False, importance={"x": 1.0, "y": 1.0}),
    )  # fmt: skip
    statistics = Statistics(torch.tensor([0, 1]), 2, {"m": grams})
    found = assemble(statistics, layout).submodules[0]
    assert found.alpha == pytest.approx((1.0, alpha))
    assert ("extreme" in found.flags) == expected
