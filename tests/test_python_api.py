"""From Python every refusal is one of the package's errors, of one line: no assertion, no key error leaves it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_refused, mergekit_yaml, refused, slta
from mergekit.options import MergeOptions

import mergekit_slta
from mergekit_slta import Alphas, Linearity, Statistics
from mergekit_slta.errors import AlphasError, DataError, ModelError, OutputError, RecipeError, RunError

SMALL = {"num_samples": 2, "max_seq_length": 12}


@pytest.mark.parametrize(
    ("changes", "code", "values"),
    [
        ({"merge_method": ...}, "not-a-recipe", ["has no `merge_method`", "merge_method: submodule_linear"]),
        ({"models": 3}, "not-a-recipe", ["models", "valid list"]),
        ({"models": [3]}, "not-a-recipe", ["models.0"]),
        ({"models": []}, "not-a-recipe", ["'models'"]),
        ({"base_model": object()}, "not-a-recipe", ["base_model"]),
        ({"base_model": ...}, "missing-base", []),
        ({"parameters": [1]}, "not-a-recipe", ["parameters"]),
        ({"parameters": {"seed": None}}, "missing-value", ["`seed`"]),
        ({"granularity": "layer"}, "misplaced-key", ["`granularity`"]),
        ({"out_dtyp": "float32"}, "unknown-key", ["out_dtyp"]),
    ],
)
def test_a_recipe_as_a_mapping_is_checked_as_a_file_is(tiny, changes, code, values):
    """What mergekit's own validators raise, and the keys that it ignores."""
    recipe = {**tiny.recipe(**SMALL), **changes}
    with refused(RecipeError, code, *values):
        mergekit_slta.calibrate({key: value for key, value in recipe.items() if value is not ...})
    recipe["models"] = [recipe]
    with refused(RecipeError, "not-a-recipe", "recursion"):
        mergekit_slta.calibrate(recipe)


@pytest.mark.parametrize("recipe", [None, 3, [], b"recipe.yml", object()], ids=lambda each: type(each).__name__)
def test_what_is_no_recipe(recipe):
    kind = type(recipe).__name__
    for call in (mergekit_slta.calibrate, mergekit_slta.load_config, mergekit_slta.read_recipe):
        with refused(RecipeError, "not-a-recipe", kind):
            call(recipe)
    for call in (mergekit_slta.load_config, mergekit_slta.calibrate):
        with refused(RecipeError, "unreadable-recipe", "null byte"):
            call("a\0b")
    with refused(RecipeError, "not-a-recipe", "dict"):
        mergekit_slta.read_recipe({})


def test_paths_tuples_and_numpy_numbers_are_fine_in_a_mapping(tiny):
    """They are what YAML would have read; the mapping stays as it was."""
    plain = tiny.recipe(2, ridge=0.5, **SMALL)
    recipe = {
        **plain, "base_model": Path(plain["base_model"]), "models": tuple(plain["models"]),
        "parameters": {**plain["parameters"], "ridge": np.float64(0.5)},
    }  # fmt: skip
    found, expected = mergekit_slta.calibrate(recipe), mergekit_slta.calibrate(plain)
    assert [entry.alpha for entry in found.submodules] == [entry.alpha for entry in expected.submodules]
    assert isinstance(recipe["base_model"], Path)


def test_options_are_mergekits(tiny):
    with refused(RecipeError, "invalid-value", "`options`", "dict"):
        mergekit_slta.calibrate(tiny.recipe(**SMALL), {"cuda": True})
    with refused(RunError, "unusable-device", "banana"):
        mergekit_slta.calibrate(tiny.recipe(**SMALL), MergeOptions(device="banana"))


@pytest.mark.parametrize("path", [None, 3, b"a.json", [], "", "a\0b", "."], ids=repr)
def test_files_that_are_none(path, tiny, tmp_path, monkeypatch):
    """`load` and `save` of every type of file."""
    monkeypatch.chdir(tmp_path)
    for kind in (Alphas, Linearity, Statistics):
        with refused(AlphasError, "missing-file"):
            kind.load(path)
    statistics = Statistics(torch.zeros(1, dtype=torch.int64), 1)
    with refused(OutputError, "cannot-write"):
        statistics.save(path)
    assert list(tmp_path.iterdir()) == []
    statistics.begin("embed")
    statistics.save(str(tmp_path / "statistics.safetensors"))
    assert Statistics.load(str(tmp_path / "statistics.safetensors")).num_models == 1


@pytest.mark.parametrize(
    ("features", "says"),
    [
        (None, "NoneType"),
        ([1.0, 2.0], "list"),
        (np.zeros((11, 4)), "ndarray"),
        (torch.tensor(1.0), "[]"),
        (torch.zeros(11), "[11]"),
        (torch.zeros(1, 4), "[1, 4]"),
        (torch.zeros(11, 4, dtype=torch.int64), "torch.int64"),
        (torch.zeros(11, 4, dtype=torch.bool), "torch.bool"),
        (torch.zeros(11, 4, dtype=torch.complex64), "torch.complex64"),
        (torch.zeros(11, 4, device="meta"), "[11, 4]"),
        (torch.eye(11).to_sparse(), "[11, 11]"),
        (torch.full((11, 4), torch.nan), "NaN"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_features_that_are_none(features, says):
    with refused(DataError, "invalid-value", "`features`", says):
        mergekit_slta.non_linearity_score(features)


@pytest.mark.parametrize(
    ("changes", "code", "values"),
    [
        ({"pad_token_id": 320}, "unreadable-config", ["AssertionError", "Padding_idx"]),
        ({"hidden_act": "unknown"}, "unreadable-config", ["unknown"]),
        ({"num_key_value_heads": 0}, "unreadable-config", ["ZeroDivisionError"]),
        ({"rope_scaling": {"rope_type": "unknown"}}, "unreadable-config", ["unknown"]),
        ({"attention_bias": True}, "missing-tensor", ["q_proj.bias", "config"]),
    ],
)
def test_a_config_of_which_no_model_can_be_made(tiny, tmp_path, write_recipe, changes, code, values):
    """`check`, the merge and Python refuse it in the same words, before a weight is read."""
    recipe = tiny.recipe(2, **SMALL)
    for place, source in (("base", tiny.base), ("expert1", tiny.experts[0]), ("expert2", tiny.experts[1])):
        shutil.copytree(source, tmp_path / place)
        path = tmp_path / place / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    recipe["base_model"] = str(tmp_path / "base")
    for number, entry in enumerate(recipe["models"], 1):
        entry["model"] = str(tmp_path / f"expert{number}")
    values = [str(tmp_path / "base"), *values]
    with refused(ModelError, code, *values):
        mergekit_slta.calibrate(recipe)
    assert_refused(slta("check", write_recipe(recipe)), code, *values)
    assert_refused(mergekit_yaml(write_recipe(recipe), tmp_path / "out"), code, *values)
    assert not (tmp_path / "out").exists()
