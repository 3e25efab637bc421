"""Recipes: every key, every refusal, in one line that names value and remedy."""

from __future__ import annotations

import pytest
import yaml
from conftest import check_message, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import registered_methods

from mergekit_slta.errors import RecipeError, SltaError
from mergekit_slta.recipe.load import load_config
from mergekit_slta.recipe.objectives import all_shared_keys
from mergekit_slta.recipe.read import read_recipe
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
        "objective": "features", "ridge": 0.0, "evaluate": False, "direction": "none",
        "uncalibrated": "error",
        "compute_dtype": "auto", "alphas": None,
    }  # fmt: skip
    features = read().settings
    assert features.model_dump(exclude={"own", "stated"}) == shared
    assert features.own.model_dump() == {"inputs": "base"}
    joint = read(objective="joint").settings
    changed = {"objective": "joint", "granularity": "linear", "ridge": None, "evaluate": True, "direction": "swudi_a"}
    assert joint.model_dump(exclude={"own", "stated"}) == {**shared, **changed}
    assert joint.own.model_dump() == {"label_samples": 2, "steps": "auto", "fresh_rows": True}
    assert "granularity" not in joint.stated  # an alphas file of another granularity may be used
    assert read(objective="joint", granularity="layer").settings.granularity == "layer"
    alone = read({"models": [{"model": "a"}]}, objective="joint").settings  # a direction combines experts
    assert alone.direction == "none"
    recipe = read()
    assert recipe.tasks[0].split == "train"
    assert recipe.tasks[0].importance == 1.0
    keys = ("dataset", "dataset_config", "split", "text", "completion", "completion_eos", "chat_template", "hint",
            "importance")  # fmt: skip
    assert ("role", *keys) == TASK_KEYS
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
    config = MergeConfiguration.model_validate(
        {**BASE, "base_model": "./base", "models": [{"model": "a"}, {"model": "b"}]}
    )
    before = config.model_dump()
    recipe = read_recipe(config)
    assert config.model_dump() == before  # the caller's own
    assert recipe.base.model.path == str((tmp_path / "base").resolve())
    assert recipe.names[recipe.base] == "./base"
    assert str(recipe.config.models[0].model) == str((tmp_path / "a").resolve())


def test_constant_settings_in_lists_are_accepted():
    """A filter list or gradient that gives every tensor the same value is that value; `lambda` may differ."""
    assert read(granularity=[{"value": "layer", "filter": "mlp"}, {"value": "layer"}]).settings.granularity == "layer"
    read(**{"lambda": [0.5, 1.0]})


JOINT = {"objective": "joint"}
REFUSALS = [
    ({"merge_method": "ties"}, {}, "other-method", ["'ties'"]),
    ({"base_model": None}, {}, "missing-base", []),
    ({"models": [{"model": "org/base"}]}, {}, "missing-expert", []),
    ({"models": [{"model": "a"}, {"model": "a"}]}, {}, "duplicate-model", ["a is"]),
    ({"models": [{"model": "org/base", "parameters": {"dataset": "x"}}, {"model": "a"}]}, {}, "misplaced-key",
     ["org/base"]),
    ({"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}]}, {}, "unsupported-layout",
     ["`slices:`"]),
    ({"models": None, "modules": {"default": {"models": [{"model": "a"}]}}}, {}, "unsupported-layout", ["`modules:`"]),
    ({}, {"granularty": "layer"}, "unknown-key", ["`granularty`", "did you mean `granularity`"]),
    ({}, {"densty": 1}, "unknown-key", ["`densty`"]),
    ({}, {"weight": 1}, "unknown-key", ["`weight`", "belongs to", "remove it", "`importance`"]),
    ({}, {"alpha": "a.json"}, "unknown-key", ["did you mean `alphas`"]),
    ({}, {"lambda_": 0.5}, "unknown-key", ["did you mean `lambda`"]),
    ({}, {"dtype": "bfloat16"}, "misplaced-key", ["`dtype` stands under", "beside `merge_method`"]),
    ({"models": [{"model": "a", "parameters": {"tokenizer": "base"}}]}, {}, "misplaced-key", ["under a", "beside"]),
    ({"models": [{"model": "a", "parameters": {"weight": 0.5}}]}, {}, "unknown-key", ["`weight`", "`importance`"]),
    ({"models": [{"model": "a", "parameters": {"datset": "x"}}]}, {}, "unknown-key", ["did you mean `dataset`"]),
    ({"models": [{"model": "a", "parameters": {"granularity": "layer"}}]}, {}, "misplaced-key",
     ["`granularity` of a", "top-level"]),
    ({"models": [{"model": "a", "parameters": {"importance": 0}}]}, {}, "invalid-value", ["`importance` of a is '0'"]),
    ({"models": [{"model": "a", "parameters": {"importance": "much"}}]}, {}, "invalid-value",
     ["`importance` of a is 'much'"]),
    ({"models": [{"model": "a", "parameters": {"dataset": 3}}]}, {}, "invalid-value", ["`dataset` of a is '3'"]),
    ({}, {"granularity": "fine"}, "invalid-value", ["`granularity`", "'fine'", "choose one of"]),
    ({}, {"granularity": ["layer", "attn_mlp"]}, "value-differs-between-tensors", ["`granularity`"]),
    ({}, {"seed": [{"filter": "mlp", "value": 3}]}, "value-differs-between-tensors", ["`seed`"]),
    ({}, {"num_samples": 0}, "invalid-value", ["`num_samples`", "greater than or equal to 1"]),
    ({}, {"num_samples": 2.5}, "invalid-value", ["`num_samples`", "valid integer"]),
    ({}, {"num_samples": True}, "invalid-value", ["`num_samples`", "valid integer"]),
    ({}, {"max_seq_length": 1}, "invalid-value", ["`max_seq_length`", "greater than or equal to 2"]),
    ({}, {"seed": -1}, "invalid-value", ["`seed`", "greater than or equal to 0"]),
    ({}, {"balance": "maybe"}, "invalid-value", ["`balance`", "valid boolean"]),
    ({}, {"inputs": "merge"}, "invalid-value", ["`inputs`", "'merge'"]),
    ({}, {"objective": "loss"}, "invalid-value", ["`objective`", "'loss'"]),
    ({}, {**JOINT, "inputs": "merged"}, "key-of-another-objective", ["`inputs`", "`objective: features`"]),
    ({}, {**JOINT, "label_samples": -1}, "invalid-value", ["`label_samples`", "-1"]),
    ({}, {**JOINT, "label_samples": 0}, "conflicting-keys", ["`label_samples` is 0", "`steps` is auto", "`steps: 0`"]),
    ({}, {**JOINT, "ridge": 0}, "conflicting-keys", ["`ridge` is 0", "`steps` is auto", "0.001 or more"]),
    ({}, {**JOINT, "ridge": 1e-4, "steps": 2}, "conflicting-keys", ["`ridge` is 0.0001", "`steps` is 2"]),
    ({}, {**JOINT, "evaluate": False}, "conflicting-keys", ["`evaluate` is false", "`steps` is auto", "`steps: 0`"]),
    ({}, {**JOINT, "evaluate": "yes"}, "invalid-value", ["`evaluate`", "'yes'", "valid boolean"]),
    ({}, {"evaluate": 1}, "invalid-value", ["`evaluate`", "'1'", "valid boolean"]),
    ({}, {**JOINT, "steps": -1}, "invalid-value", ["`steps`", "-1", "should be 'auto' or greater than or equal to 0"]),
    ({}, {**JOINT, "steps": 1.5}, "invalid-value", ["`steps`", "'1.5'", "should be 'auto' or a valid integer"]),
    ({}, {**JOINT, "steps": "many"}, "invalid-value", ["`steps`", "'many'", "should be 'auto' or a valid integer"]),
    ({}, {**JOINT, "steps": True}, "invalid-value", ["`steps`", "'True'", "should be 'auto' or a valid integer"]),
    ({}, {**JOINT, "fresh_rows": "often"}, "invalid-value", ["`fresh_rows`", "valid boolean"]),
    ({}, {"steps": 2}, "key-of-another-objective", ["`steps`", "`objective: joint`"]),
    ({}, {"label_samples": 2}, "key-of-another-objective", ["`label_samples`", "`objective: joint`"]),
    ({}, {"ridge": -0.1}, "invalid-value", ["`ridge`", "greater than or equal to 0"]),
    ({}, {"ridge": float("nan")}, "invalid-value", ["`ridge`", "finite"]),
    ({}, {"compute_dtype": "int8"}, "invalid-value", ["`compute_dtype`", "'int8'"]),
    ({"out_dtype": "flot"}, {}, "invalid-value", ["`out_dtype` is 'flot'", "float32"]),
    ({}, {"lambda": "big"}, "invalid-value", ["`lambda` is 'big'"]),
    ({}, {"lambda": float("inf")}, "invalid-value", ["`lambda` is 'inf'"]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "parameters", "code", "values"), REFUSALS)
def test_refused(changes, parameters, code, values):
    """Each bad recipe is a RecipeError of one line with exit code 2."""
    with refused(RecipeError, code, *values) as caught:
        read(changes, **parameters)
    assert caught.value.exit_code == 2


OTHERS = sorted(
    {parameter.name for method in registered_methods() for parameter in method.spec.parameters}
    - {*all_shared_keys(), *TASK_KEYS, "alpha"}
)
"""Keys of mergekit's own methods (`alpha` is nearly one of ours)."""


@pytest.mark.parametrize("key", OTHERS)
def test_keys_of_other_methods_are_told_from_typos(key, tmp_path):
    """`density`, `int8_mask`, `t`, ...: wherever they stand, the message names their methods and says: remove it."""
    (name, *_) = [
        method.spec.name for method in registered_methods() if key in {known.name for known in method.spec.parameters}
    ]
    for changes, parameters in (({}, {key: 1}), ({"models": [{"model": "a", "parameters": {key: 1}}]}, {})):
        with refused(RecipeError, "unknown-key", f"`{key}`", name, "remove it"):
            read(changes, **parameters)
    path = tmp_path / "recipe.yml"
    for content in ({**BASE, key: 1}, {**BASE, "models": [{"model": "a", key: 1}]}):
        path.write_text(yaml.safe_dump(content))
        with refused(RecipeError, "unknown-key", f"`{key}`", name, "remove it"):
            load_config(path)


@pytest.mark.parametrize(
    ("text", "code", "values"),
    [
        (None, "unreadable-recipe", ["No such file", "paths start at the current folder"]),
        ("merge_method: [", "not-yaml", []),
        ("just text", "not-a-recipe", ["not a mapping"]),
        ("base_model: b", "not-a-recipe", ["has no `merge_method`: add `merge_method: submodule_linear`"]),
        ("", "not-a-recipe", ["is empty"]),
        ("merge_method: submodule_linear\nparameters:\n  num_samples:\nmodels: []", "missing-value", ["`num_samples`"]),
        ("merge_method: submodule_linear\nmodels: 3", "not-a-recipe", ["models"]),
        ("merge_method: submodule_linear", "not-a-recipe", []),
        (b"\xff\xfe\x00", "unreadable-recipe", ["UTF-8"]),
        ("name: one\nmerge_method: linear\n---\nmerge_method: submodule_linear", "not-a-recipe", ["2 doc", "-multi"]),
        ("merge_method: submodule_linear\n---\n", "not-a-recipe", ["holds 2 documents"]),
        ("- {merge_method: linear}\n- {merge_method: linear}", "not-a-recipe", ["holds 2 documents"]),
        ("merges: [{name: a}, {name: b}, {name: c}]", "not-a-recipe", ["holds 3 documents", "`mergekit-multi`"]),
    ],
)
def test_unreadable_recipe_files_are_refused(tmp_path, text, code, values):
    """A missing, broken or foreign file is a RecipeError."""
    path = tmp_path / "r.yml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with refused(RecipeError, code, path, *values):
        load_config(path)


def test_control_characters_never_reach_the_terminal():
    """What a stranger's recipe says is printed without escape sequences."""
    with refused(RecipeError, "invalid-value", "'[31mred line'"):
        read(**{"granularity": "\x1b[31mred\x07\nline"})


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
        check_message(error.message, error.code)
    else:
        assert recipe.settings.num_samples >= 1


@pytest.mark.parametrize(("key", "on"), [("ridge", "shared"), ("lambda", "shared"), ("importance", "model")])
def test_truth_values_are_no_numbers(key, on):
    """`ridge: true` is no 1."""
    given = {key: True}
    changes = {} if on == "shared" else {"models": [{"model": "a", "parameters": {"dataset": "x", **given}}]}
    with refused(RecipeError, "invalid-value", f"`{key}`", "number"):
        read(changes, **(given if on == "shared" else {}))


@pytest.mark.parametrize(
    ("changes", "code", "values"),
    [
        ({"seed": 3}, "misplaced-key", ["`seed` stands beside `merge_method`", "the top-level `parameters:`"]),
        ({"steps": 3}, "misplaced-key", ["`steps` stands beside `merge_method`", "the top-level `parameters:`"]),
        ({"dataset": "x"}, "misplaced-key", ["`dataset` stands beside `merge_method`", "of its model"]),
        ({"out_dtpye": "bfloat16"}, "unknown-key", ["`out_dtpye`", "`out_dtype`"]),
        ({"models": [{"model": "a", "dataset": "x"}]}, "misplaced-key", ["`dataset` stands beside `model: a`"]),
        ({"models": [{"model": "a", "seed": 2}]}, "misplaced-key", ["`seed` stands beside `model: a`", "top-level"]),
        ({"models": [{"model": "a", "paramters": {}}]}, "unknown-key", ["`paramters`", "`parameters`"]),
    ],
)
def test_keys_that_mergekit_would_ignore_are_refused(tmp_path, changes, code, values):
    """Keys beside `merge_method`, and beside a model's `model`, are mergekit's own or an error with the right place."""
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump({**BASE, **changes}))
    with refused(RecipeError, code, *values):
        load_config(path)


def test_mergekits_own_keys_may_stand_at_the_top(tmp_path):
    """`name` is mergekit-multi's; other methods' recipes are mergekit's business."""
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump({**BASE, "name": "merged", "out_dtype": "bfloat16", "chat_template": "auto"}))
    assert load_config(path)[0].out_dtype == "bfloat16"
    path.write_text(yaml.safe_dump({**BASE, "merge_method": "linear", "anything": 1}))
    assert load_config(path)[0].merge_method == "linear"


@pytest.mark.parametrize(
    ("parameters", "key"),
    [
        ({}, None),
        ({"inputs": "merged"}, "inputs"),
        ({"objective": "joint", "steps": 0}, None),
        ({"objective": "joint", "steps": 0, "evaluate": False}, None),
        ({"objective": "joint", "steps": 1}, "steps"),
        ({"objective": "joint"}, "steps"),
        ({"evaluate": True}, None),
    ],
)
def test_what_makes_another_solve_need_another_calibration(parameters, key):
    """Statistics that were gathered at weights solved before."""
    assert read(**parameters).settings.own.solve_dependence == key


@pytest.mark.parametrize(
    ("parameters", "most", "groups"),
    [
        ({}, 12, 12),
        ({"steps": "auto", "fresh_rows": False}, 12, 1),
        ({"steps": "3"}, 3, 3),
        ({"steps": 20}, 20, 20),
        ({"steps": 0}, 0, 1),
    ],
)
def test_steps_and_their_rows(parameters, most, groups):
    """`auto` is at most 12; every step has rows of its own, unless the recipe says otherwise."""
    own = read(objective="joint", **parameters).settings.own
    assert (own.max_steps, own.row_groups) == (most, groups)
    assert ("fresh_rows" in own.effective()) == (groups > 1)  # it makes no difference to a single group
