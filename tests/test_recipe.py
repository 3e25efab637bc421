"""Recipes: every key, every refusal, in one line that names value and remedy."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.config import MergeConfiguration

from mergekit_slta.errors import RecipeError, SltaError
from mergekit_slta.recipe.read import load_config, read_recipe
from mergekit_slta.recipe.settings import SHARED_KEYS, TASK_KEYS

BASE = {
    "merge_method": "submodule_linear",
    "base_model": "org/base",
    "models": [{"model": "org/a", "parameters": {"dataset": "a.jsonl"}}, {"model": "org/b"}],
}


def read(changes: dict | None = None, **parameters):
    return read_recipe(MergeConfiguration.model_validate({**BASE, "parameters": parameters, **(changes or {})}))


def test_defaults_are_the_tables():
    """A recipe without shared keys has the documented defaults."""
    shared = {
        "granularity": "attn_mlp", "num_samples": 30, "max_seq_length": 512, "seed": 42, "balance": True,
        "objective": "features", "ridge": 0.0, "compute_dtype": "float32", "alphas": None,
    }  # fmt: skip
    features = read().settings
    assert features.model_dump(exclude={"own", "stated"}) == shared
    assert features.own.model_dump() == {"inputs": "base"}
    joint = read(objective="joint").settings
    changed = {"objective": "joint", "granularity": "linear", "ridge": None}
    assert joint.model_dump(exclude={"own", "stated"}) == {**shared, **changed}
    assert joint.own.model_dump() == {"label_samples": 2, "steps": 6, "fresh_rows": True}
    assert "granularity" not in joint.stated  # an alphas file of another granularity may be used
    assert read(objective="joint", granularity="layer").settings.granularity == "layer"
    recipe = read()
    assert recipe.tasks[0].split == "train"
    assert recipe.tasks[0].importance == 1.0
    assert TASK_KEYS == ("dataset", "dataset_config", "split", "text", "completion", "importance")
    assert "lambda" in SHARED_KEYS


def test_per_model_keys_may_be_given_for_all():
    """mergekit's precedence: a model's own parameter, else the top-level one."""
    recipe = read(
        {"models": [{"model": "a", "parameters": {"dataset": "x", "split": "test"}}, {"model": "b"}]},
        dataset="y", split="validation",
    )  # fmt: skip
    assert [(task.dataset, task.split) for task in recipe.tasks] == [("x", "test"), ("y", "validation")]


def test_base_among_models_is_left_out():
    """The base may be listed among the models, anywhere, without parameters."""
    recipe = read({"models": [*BASE["models"], {"model": "org/base"}]})
    assert [str(task.model) for task in recipe.tasks] == ["org/a", "org/b"]


def test_local_paths_become_absolute(tmp_path, monkeypatch):
    """Existing folders are made absolute for mergekit; messages and files keep the recipe's spelling."""
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = read({"base_model": "./base", "models": [{"model": "a"}, {"model": "b"}]})
    assert recipe.base.model.path == str((tmp_path / "base").resolve())
    assert recipe.names[recipe.base] == "./base"
    assert str(recipe.config.models[0].model) == str((tmp_path / "a").resolve())


def test_constant_settings_in_lists_are_accepted():
    """A filter list or gradient that gives every tensor the same value is that value; `lambda` may differ."""
    assert read(granularity=[{"value": "layer", "filter": "mlp"}, {"value": "layer"}]).settings.granularity == "layer"
    read(**{"lambda": [0.5, 1.0]})


REFUSALS = [
    ({"merge_method": "ties"}, {}, r"merge_method is 'ties'"),
    ({"base_model": None}, {}, r"add `base_model:`"),
    ({"models": [{"model": "org/base"}]}, {}, r"at least one expert"),
    ({"models": [{"model": "a"}, {"model": "a"}]}, {}, r"a is listed twice"),
    ({"models": [{"model": "org/base", "parameters": {"dataset": "x"}}, {"model": "a"}]}, {}, r"takes no parameters"),
    ({"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}]}, {}, r"replace `slices:`"),
    ({"models": None, "modules": {"default": {"models": [{"model": "a"}]}}}, {}, r"replace `modules:`"),
    ({}, {"granularty": "layer"}, r"unknown key `granularty`.*did you mean `granularity`"),
    ({}, {"densty": 1}, r"unknown key `densty`"),
    ({}, {"weight": 1}, r"`importance` sets a task's share"),
    ({"models": [{"model": "a", "parameters": {"weight": 0.5}}]}, {}, r"`importance` sets a task's share"),
    ({"models": [{"model": "a", "parameters": {"datset": "x"}}]}, {}, r"did you mean `dataset`"),
    ({"models": [{"model": "a", "parameters": {"granularity": "layer"}}]}, {}, r"move it to the top-level"),
    ({"models": [{"model": "a", "parameters": {"importance": 0}}]}, {}, r"`importance` of a is '0'"),
    ({"models": [{"model": "a", "parameters": {"importance": "much"}}]}, {}, r"`importance` of a is 'much'"),
    ({"models": [{"model": "a", "parameters": {"dataset": 3}}]}, {}, r"`dataset` of a is '3'"),
    ({}, {"granularity": "fine"}, r"`granularity`.*'fine': choose one of"),
    ({}, {"granularity": ["layer", "attn_mlp"]}, r"`granularity` differs between tensors"),
    ({}, {"seed": [{"filter": "mlp", "value": 3}]}, r"`seed` differs between tensors"),
    ({}, {"num_samples": 0}, r"`num_samples`.*greater than or equal to 1"),
    ({}, {"num_samples": 2.5}, r"`num_samples`.*valid integer"),
    ({}, {"num_samples": True}, r"`num_samples`.*valid integer"),
    ({}, {"max_seq_length": 1}, r"`max_seq_length`.*greater than or equal to 2"),
    ({}, {"seed": -1}, r"`seed`.*greater than or equal to 0"),
    ({}, {"balance": "maybe"}, r"`balance`.*valid boolean"),
    ({}, {"inputs": "merge"}, r"`inputs`.*'merge'"),
    ({}, {"objective": "loss"}, r"`objective`.*'loss'"),
    ({}, {"objective": "joint", "inputs": "merged"}, r"`inputs` only applies to `objective: features`"),
    ({}, {"objective": "joint", "label_samples": -1}, r"`label_samples`.*-1"),
    ({}, {"objective": "joint", "label_samples": 0}, r"`label_samples` is 0 and `steps` is 6.*`steps: 0`"),
    ({}, {"objective": "joint", "ridge": 0}, r"`ridge` is 0 and `steps` is 6.*0.001 or more"),
    ({}, {"objective": "joint", "steps": -1}, r"`steps`.*-1"),
    ({}, {"objective": "joint", "steps": 1.5}, r"`steps`.*valid integer"),
    ({}, {"objective": "joint", "fresh_rows": "often"}, r"`fresh_rows`.*valid boolean"),
    ({}, {"steps": 2}, r"`steps` only applies to `objective: joint`"),
    ({}, {"label_samples": 2}, r"`label_samples` only applies to `objective: joint`"),
    ({}, {"ridge": -0.1}, r"`ridge`.*greater than or equal to 0"),
    ({}, {"ridge": float("nan")}, r"`ridge`.*finite"),
    ({}, {"compute_dtype": "int8"}, r"`compute_dtype`.*'int8'"),
    ({"out_dtype": "flot"}, {}, r"`out_dtype` is 'flot': choose one of float32"),
    ({}, {"lambda": "big"}, r"`lambda` is 'big'"),
    ({}, {"lambda": float("inf")}, r"`lambda` is 'inf'"),
]


@pytest.mark.parametrize(("changes", "parameters", "message"), REFUSALS)
def test_refused(changes, parameters, message):
    """Each bad recipe is a RecipeError of one line with exit code 2."""
    with pytest.raises(RecipeError, match=message) as caught:
        read(changes, **parameters)
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the recipe"),
        ("merge_method: [", "not valid YAML"),
        ("just text", "not a mapping"),
        ("", "is empty"),
        ("merge_method: submodule_linear\nparameters:\n  num_samples:\nmodels: []", "`num_samples` in .* has no value"),
        ("merge_method: submodule_linear\nmodels: 3", "not a merge recipe"),
        ("merge_method: submodule_linear", "not a merge recipe"),
        (b"\xff\xfe\x00", "not a UTF-8 text file"),
    ],
)
def test_unreadable_recipe_files_are_refused(tmp_path, text, message):
    """A missing, broken or foreign file is a RecipeError."""
    path = tmp_path / "r.yml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError, match=message):
        load_config(path)


def test_control_characters_never_reach_the_terminal():
    """What a stranger's recipe says is printed without escape sequences."""
    with pytest.raises(RecipeError) as caught:
        read(**{"granularity": "\x1b[31mred\x07\nline"})
    assert not any(ord(character) < 32 for character in caught.value.message)


scalars = st.one_of(st.booleans(), st.integers(), st.floats(), st.text(max_size=8))


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*SHARED_KEYS, *TASK_KEYS, "weight", "x"]),
        st.one_of(scalars, st.lists(scalars, max_size=3)),
        max_size=4,
    )
)
def test_any_parameters_are_read_or_refused(parameters):
    """Whatever stands in a recipe, the outcome is a recipe or an error of the package's own."""
    config = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump({**BASE, "parameters": parameters})))
    try:
        recipe = read_recipe(config)
    except SltaError as error:
        assert error.message
    else:
        assert recipe.settings.num_samples >= 1


@pytest.mark.parametrize(("key", "on"), [("ridge", "shared"), ("lambda", "shared"), ("importance", "model")])
def test_truth_values_are_no_numbers(key, on):
    """`ridge: true` is no 1."""
    given = {key: True}
    changes = {} if on == "shared" else {"models": [{"model": "a", "parameters": {"dataset": "x", **given}}]}
    with pytest.raises(RecipeError, match=f"`{key}`.*must be a number|{key}.*number"):
        read(changes, **(given if on == "shared" else {}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, r"`seed` stands beside `merge_method`.*under the top-level `parameters:`"),
        ({"steps": 3}, r"`steps` stands beside `merge_method`.*under the top-level `parameters:`"),
        ({"dataset": "x"}, r"`dataset` stands beside `merge_method`.*of its model"),
        ({"out_dtpye": "bfloat16"}, r"unknown key `out_dtpye`.*`out_dtype`"),
        ({"models": [{"model": "a", "dataset": "x"}]}, r"`dataset` stands beside `model: a`"),
        ({"models": [{"model": "a", "seed": 2}]}, r"`seed` stands beside `model: a`.*top-level"),
        ({"models": [{"model": "a", "paramters": {}}]}, r"unknown key `paramters`.*`parameters`"),
    ],
)
def test_keys_that_mergekit_would_ignore_are_refused(tmp_path, changes, message):
    """Keys beside `merge_method`, and beside a model's `model`, are mergekit's own or an error with the right place."""
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump({**BASE, **changes}))
    with pytest.raises(RecipeError, match=message):
        load_config(path)


def test_mergekits_own_keys_may_stand_at_the_top(tmp_path):
    """`name` is mergekit-multi's; other methods' recipes are mergekit's business."""
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump({**BASE, "name": "merged", "out_dtype": "bfloat16", "chat_template": "auto"}))
    assert load_config(path)[0].out_dtype == "bfloat16"
    path.write_text(yaml.safe_dump({**BASE, "merge_method": "linear", "anything": 1}))
    assert load_config(path)[0].merge_method == "linear"
