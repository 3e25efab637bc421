"""`mergekit-slta export`: the same merge from stock mergekit, with this package switched off; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import assert_refused, mergekit_yaml, refused, slta, tensors
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import get as stock_method
from mergekit.parameter_resolver import resolve_parameters
from transformers import AutoTokenizer

import mergekit_slta.recipe.stock_recipe as export_room
from mergekit_slta.errors import AlphasError
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.maths.task_arithmetic import WeightedSlice
from mergekit_slta.recipe.stock_recipe import stock_recipe, weights_dtype
from mergekit_slta.reporting.card import section

GRANULARITIES = ["model", "layer", "attn_mlp", "linear"]
QUIET = ["--quiet"]


def units_apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Distance in units in the last place: floats of one sign are ordered as their bits are."""
    kind = torch.int16 if one.element_size() == 2 else torch.int32
    places = [tensor.contiguous().view(kind).to(torch.int64) for tensor in (one, other)]
    top = 1 << (8 * one.element_size() - 1)
    ordered = [torch.where(place < 0, -(place + top), place) for place in places]
    return (ordered[0] - ordered[1]).abs()


def assert_same_merge(one: Path, other: Path, tokens: int | None = None) -> None:
    """At most 0.01% of the elements differ, and those by one unit in the last place.

    Rows beyond `tokens` are made up by mergekit, as means that it takes in the dtype of its inputs.
    """
    ours, stock = tensors(one), tensors(other)
    for name in ("model.embed_tokens.weight", "lm_head.weight") if tokens else ():
        torch.testing.assert_close(ours[name][tokens:].float(), stock[name][tokens:].float(), rtol=0.02, atol=0.01)
        ours[name], stock[name] = ours[name][:tokens], stock[name][:tokens]
    assert ours.keys() == stock.keys()
    total = differ = 0
    for name, tensor in ours.items():
        assert tensor.dtype == stock[name].dtype
        units = units_apart(tensor, stock[name])
        assert units.max() <= 1, name
        total, differ = total + units.numel(), differ + int((units > 0).sum())
    assert differ <= max(3, total // 10_000), f"{differ} of {total}"


def merged(
    models, write_recipe, out: Path, recipe: dict | None = None, *, card: bool = False, **parameters: object
) -> Path:
    """A merge with the plugin; returns its folder, which holds mergekit's copy of the recipe if it has a card."""
    recipe = recipe or {**models.recipe(**parameters), "out_dtype": "bfloat16"}
    result = mergekit_yaml(write_recipe(recipe, f"{out.name}.yml"), out, *QUIET, card=card)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.process
@pytest.mark.parametrize(
    ("granularity", "tied"), [*((granularity, False) for granularity in GRANULARITIES), ("attn_mlp", True)]
)
def test_stock_mergekit_gives_the_same_merge(make_models, write_recipe, tmp_path, stock_merge, granularity, tied):
    """Twelve layers, so that layers 1, 10 and 11 must not take each other's weights; `lambda` comes along."""
    models = make_models("llama", num_experts=3, num_layers=12, tied=tied, dtype=torch.bfloat16)
    scale = {"lambda": 0.8} if tied else {}
    out = merged(models, write_recipe, tmp_path / "plugin", granularity=granularity, **scale)
    result = slta("export", out, "--recipe", tmp_path / "plugin.yml", "-o", tmp_path / "stock.yml")
    assert result.exit_code == 0, result.output
    recipe = yaml.safe_load((tmp_path / "stock.yml").read_text())
    assert recipe["merge_method"] == "task_arithmetic"
    assert (recipe["dtype"], recipe["out_dtype"]) == ("float32", "bfloat16")
    assert recipe["parameters"] == {"normalize": False, **scale}
    code, output = stock_merge(tmp_path / "stock.yml", tmp_path / "stock")
    assert code == 0, output
    assert not (tmp_path / "stock" / "slta_alphas.json").exists()
    assert_same_merge(out, tmp_path / "stock")


@pytest.mark.process
def test_plugin_is_off_in_the_stock_process(make_models, write_recipe, tmp_path, stock_merge):
    """The comparison means something: there, the plugin's own recipe is none."""
    models = make_models("llama", num_experts=2)
    code, output = stock_merge(write_recipe(models.recipe()), tmp_path / "out")
    assert code != 0
    assert "submodule_linear" in output


@pytest.mark.process
def test_recipe_supplies_tokenizer_and_chat_template(make_models, write_recipe, tmp_path, stock_merge):
    """Both are taken over as they stand, from --recipe, and shape the stock merge in the same way."""
    models = make_models("llama", num_experts=2, dtype=torch.bfloat16)
    recipe = {
        **models.recipe(),
        "out_dtype": "bfloat16",
        "tokenizer": {"source": "base", "pad_to_multiple_of": 8},
        "chat_template": "chatml",
    }
    out = merged(models, write_recipe, tmp_path / "plugin", recipe)
    alone = shutil.copy(out / "slta_alphas.json", tmp_path / "alone.json")
    result = slta("export", alone, "--recipe", tmp_path / "plugin.yml", "-o", tmp_path / "stock.yml")
    assert result.exit_code == 0, result.output
    stock = yaml.safe_load((tmp_path / "stock.yml").read_text())
    assert (stock["tokenizer"], stock["chat_template"]) == (recipe["tokenizer"], "chatml")
    code, output = stock_merge(tmp_path / "stock.yml", tmp_path / "stock")
    assert code == 0, output
    tokens = len(AutoTokenizer.from_pretrained(out))
    assert tensors(out)["lm_head.weight"].shape[0] > tokens  # padded
    assert_same_merge(out, tmp_path / "stock", tokens)
    assert "may differ in rounding" in result.stderr
    files = [json.loads((folder / "tokenizer.json").read_text()) for folder in (out, tmp_path / "stock")]
    assert files[0] == files[1]
    missing = slta("export", alone)
    assert_refused(missing, "recipe-needed")


def test_output_dtype_without_one_in_the_recipe(make_models, write_recipe, tmp_path):
    """A recipe without `out_dtype` keeps the checkpoints' dtype, which is looked up; each source is said."""
    models = make_models("llama", num_experts=2, dtype=torch.bfloat16)
    out = merged(models, write_recipe, tmp_path / "plugin", models.recipe(), card=True)
    assert weights_dtype(out) == "bfloat16"
    result = slta("export", out / "slta_alphas.json")
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.stdout)["out_dtype"] == "bfloat16"  # notes are on stderr
    assert "mergekit_config.yml" in result.stderr
    assert "The recipe names no out_dtype: it is bfloat16, that of the weights in" in result.stderr
    alone = shutil.copy(out / "slta_alphas.json", tmp_path / "alone.json")
    result = slta("export", alone)
    assert result.exit_code == 0, result.output
    assert "out_dtype" not in yaml.safe_load(result.stdout)
    assert "Warning: the merged model will be float32" in result.stderr


@pytest.mark.process
def test_float32_recipes_are_exported(make_models, write_recipe, tmp_path, stock_merge):
    """`dtype: float32` is what the stock recipe computes in: the output stays float32."""
    models = make_models("llama", num_experts=2, dtype=torch.bfloat16)
    out = merged(models, write_recipe, tmp_path / "plugin", {**models.recipe(), "dtype": "float32"})
    result = slta("export", out / "slta_alphas.json", "-o", tmp_path / "stock.yml")
    assert result.exit_code == 0, result.output
    assert stock_merge(tmp_path / "stock.yml", tmp_path / "stock")[0] == 0
    for name, tensor in tensors(tmp_path / "stock").items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, tensors(out)[name], rtol=1e-6, atol=1e-6)


# --- filters --------------------------------------------------------------------------------------------------------


def alphas_of(*groups: tuple[str, ...], models: tuple[str, ...] = ("one", "two"), **changes: object) -> Alphas:
    """An alphas file of made-up tensors; every submodule has weights of its own."""
    submodules = [
        {
            "name": f"part{number}", "kind": "layer", "layer": number, "tensors": names,
            "alpha": [0.1 * (number + 1) + column / 3 for column in range(len(models))],
            "stderr": None, "condition": 1.0, "rank": 1, "residual": 0.0,
        }
        for number, names in enumerate(groups)
    ]  # fmt: skip
    content = {
        "granularity": "layer", "base_model": "base", "models": models, "submodules": submodules, "calibration": {},
        "provenance": {},
    }  # fmt: skip
    return Alphas.model_validate({**content, **changes})


SUBSTRINGS = [
    ("model.norm.weight", "lm_head.weight"),
    ("model.norm.weight_scale", "norm.weight", "lm_head.weight.scale"),
    ("a", "layers.1.w", "x"),
    ("layers.11.w", "model.layers.1.w", "ab", "model.layers.11.w.extra", "weight"),
]


def test_every_tensor_finds_its_own_filter():
    """Names within names resolve to their own weights, by mergekit's resolver and by the method's own spec."""
    alphas = alphas_of(*SUBSTRINGS)
    config = MergeConfiguration.model_validate(yaml.safe_load(stock_recipe(alphas)))
    spec = stock_method("task_arithmetic").spec
    sources = {entry.model: entry.parameters for entry in config.models}
    for submodule in alphas.submodules:
        for name in submodule.tensors:
            shared, own = resolve_parameters(
                spec,
                tensor_name=name,
                inputs=dict.fromkeys(sources, name),
                sources=lambda model: [sources.get(model), config.parameters],
                base_model=config.base_model,
            )
            assert not shared["normalize"]
            assert [own[model]["weight"] for model in sources] == list(submodule.alpha)


def test_tensor_without_a_filter_fails_in_stock_mergekit():
    """There is no catch-all: a tensor that the file does not know stops the merge."""
    config = MergeConfiguration.model_validate(yaml.safe_load(stock_recipe(alphas_of(("model.norm.weight",)))))
    parameters = config.models[0].parameters
    with pytest.raises(RuntimeError, match="Missing required parameter weight"):
        resolve_parameters(
            stock_method("task_arithmetic").spec,
            tensor_name="lm_head.weight",
            inputs={config.models[0].model: "lm_head.weight"},
            sources=lambda model: [parameters, config.parameters],
            base_model=config.base_model,
        )


def test_filters_that_resolve_to_another_weight_are_refused(monkeypatch):
    """The recipe is read back by mergekit's own code before it is handed out."""
    monkeypatch.setattr(export_room, "filter_order", lambda names: sorted(names, key=len))
    with refused(AlphasError, "not-expressible", " of one "):
        stock_recipe(alphas_of(*SUBSTRINGS))


def test_weights_survive_yaml_to_the_last_bit():
    """Small, large, negative and integral weights are read back as they are."""
    values = [1e-17, -3.0, 0.1 + 0.2, 1.0, 0.0, 12345678.9]
    alphas = alphas_of(*[(f"t{number}.weight",) for number in range(len(values))], models=("one",))
    entries = [
        entry.model_copy(update={"alpha": (value,)}) for entry, value in zip(alphas.submodules, values, strict=True)
    ]
    recipe = yaml.safe_load(stock_recipe(alphas.model_copy(update={"submodules": tuple(entries)}), scale=1e-3))
    weights = {entry["filter"]: entry["value"] for entry in recipe["models"][0]["parameters"]["weight"]}
    assert [weights[f"t{number}.weight"] for number in range(len(values))] == values
    assert recipe["parameters"]["lambda"] == 1e-3


def test_adapters_need_a_cache_in_stock_mergekit():
    """The recipe says so, and a card's command has the option."""
    adapters = alphas_of(("t.weight",), models=("base+org/one", "base+org/two"))
    full = alphas_of(("t.weight",), models=("org/one", "org/two"))
    for alphas, needed in ((adapters, True), (full, False)):
        assert ("--lora-merge-cache" in stock_recipe(alphas)) == needed
        assert ("mergekit-yaml stock.yml out/ --lora-merge-cache DIR" in section(alphas, [])) == needed


# --- refusals -------------------------------------------------------------------------------------------------------


def test_slices_cannot_be_said_with_filters(monkeypatch):
    """Weights of slices (granularity head_mlp) are refused, with the granularities that can be exported."""
    halves = (WeightedSlice(0, 0, 4, (0.1, 0.2)), WeightedSlice(0, 4, 8, (0.3, 0.4)))
    monkeypatch.setattr(Alphas, "pieces", lambda self, tensor: halves)
    with refused(AlphasError, "not-expressible", "head_mlp", "model, layer, attn_mlp, linear"):
        stock_recipe(alphas_of(("model.norm.weight",), granularity="head_mlp"))


def test_head_mlp_is_refused(make_models, write_recipe, tmp_path):
    """The same, from a calibration."""
    path = write_recipe(make_models("llama").recipe(granularity="head_mlp"))
    result = slta("calibrate", path, "-o", tmp_path / "alphas.json", *QUIET)
    assert result.exit_code == 0, result.output
    result = slta("export", tmp_path / "alphas.json")
    assert_refused(result, "not-expressible", "`granularity: head_mlp`")


@pytest.fixture(scope="module")
def calibrated(make_models, tmp_path_factory) -> tuple[dict, Path]:
    """A recipe, and alphas that were calibrated for it; no recipe lies beside them."""
    folder = tmp_path_factory.mktemp("calibrated")
    recipe = {**make_models("llama", num_experts=2).recipe(), "out_dtype": "bfloat16"}
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    result = slta("calibrate", folder / "recipe.yml", "-o", folder / "slta_alphas.json", *QUIET)
    assert result.exit_code == 0, result.output
    return recipe, folder / "slta_alphas.json"


def with_parameters(recipe: dict, **parameters: object) -> dict:
    return {**recipe, "parameters": {**recipe["parameters"], **parameters}}


FILTERED = [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]
REFUSALS = {
    "dtype": (lambda recipe: {**recipe, "dtype": "bfloat16"}, "not-expressible", "`dtype: bfloat16`"),
    "lambda filters": (
        lambda recipe: with_parameters(recipe, **{"lambda": FILTERED}),
        "value-differs-between-tensors",
        "`lambda`",
    ),
    "lambda gradient": (
        lambda recipe: with_parameters(recipe, **{"lambda": [0.0, 1.0]}),
        "value-differs-between-tensors",
        "`lambda`",
    ),
    "other models": (lambda recipe: {**recipe, "models": recipe["models"][:1]}, "recipe-of-other-alphas", "recipe.yml"),
    "other base": (
        lambda recipe: {**recipe, "base_model": recipe["models"][0]["model"], "models": recipe["models"][1:]},
        "recipe-of-other-alphas",
        "recipe.yml",
    ),
    "other granularity": (
        lambda recipe: with_parameters(recipe, granularity="layer"),
        "recipe-of-other-alphas",
        "recipe.yml",
    ),
    "other method": (lambda recipe: {**recipe, "merge_method": "linear"}, "other-method", "'linear'"),
    "not a recipe": (lambda recipe: [1, 2], "not-a-recipe", "not a mapping"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_recipes_that_stock_mergekit_cannot_follow(calibrated, write_recipe, tmp_path, case):
    """One line, exit code 2, no file."""
    build, code, value = REFUSALS[case]
    recipe, alphas = calibrated
    result = slta("export", alphas, "--recipe", write_recipe(build(recipe)), "-o", tmp_path / "stock.yml")
    assert_refused(result, code, value)
    assert not (tmp_path / "stock.yml").exists()


def test_equal_filters_are_one_lambda(calibrated, write_recipe):
    """A `lambda` that is written as filters but is the same everywhere is a number."""
    recipe, alphas = calibrated
    same = [{"filter": "mlp", "value": 0.5}, {"value": 0.5}]
    result = slta("export", alphas, "--recipe", write_recipe(with_parameters(recipe, **{"lambda": same})))
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.stdout)["parameters"]["lambda"] == 0.5


def test_cast_inputs_are_refused_without_a_recipe_too(make_models, write_recipe, tmp_path):
    """The alphas file remembers the `dtype` that the inputs were cast to."""
    path = write_recipe({**make_models("llama").recipe(), "dtype": "bfloat16"})
    assert slta("calibrate", path, "-o", tmp_path / "alphas.json", *QUIET).exit_code == 0
    result = slta("export", tmp_path / "alphas.json")
    assert_refused(result, "not-expressible", "`dtype: bfloat16`")


@pytest.mark.parametrize(
    ("content", "code"),
    [(None, "missing-file"), ("{", "unreadable-file"), ('{"format": "x"}', "wrong-file-type"),
     ("\x00\xff", "unreadable-file")],
)  # fmt: skip
def test_what_is_no_alphas_file_is_refused(tmp_path, content, code):
    """Missing, corrupt or foreign: one line and exit code 2."""
    path = tmp_path / "alphas.json"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    assert_refused(slta("export", path), code, path)


OVERWRITING = {
    "text": "foreign-file", "yaml": "foreign-file", "binary": "foreign-file", "recipe": "foreign-file",
    "link": "not-a-plain-file", "alphas": "output-is-an-input",
}  # fmt: skip


@pytest.mark.parametrize("kind", OVERWRITING)
def test_nothing_but_an_export_is_overwritten(calibrated, tmp_path, kind):
    """Other files and links stay as they were."""
    alphas = shutil.copy(calibrated[1], tmp_path / "alphas.json")
    target = tmp_path / "target.yml"
    if kind == "link":
        (tmp_path / "real.yml").write_text("merge_method: linear\n")
        target.symlink_to(tmp_path / "real.yml")
    elif kind == "alphas":
        target = alphas
    else:
        recipe = b"# mine\nmerge_method: linear\n"
        target.write_bytes(
            {"text": b"dear diary", "yaml": b"a: 1\n", "binary": b"\xff\x00\x01", "recipe": recipe}[kind]
        )
    before = target.read_bytes()
    assert_refused(slta("export", alphas, "-o", target), OVERWRITING[kind], target)
    assert target.read_bytes() == before


def test_an_earlier_export_is_overwritten_but_not_the_source(calibrated, write_recipe, tmp_path):
    """An earlier export is replaced; the recipe that the export is made from is not."""
    recipe, alphas = calibrated
    path = write_recipe(recipe)
    for _ in range(2):
        assert slta("export", alphas, "--recipe", path, "-o", tmp_path / "stock.yml").exit_code == 0
    result = slta("export", alphas, "--recipe", path, "-o", path)
    assert_refused(result, "output-is-an-input", path)
    assert yaml.safe_load(path.read_text()) == recipe


@pytest.mark.parametrize("with_recipe", [True, False])
def test_relative_models_are_written_as_absolute_paths(calibrated, tmp_path, monkeypatch, with_recipe):
    """Wherever `export` runs: they are found beside the recipe, or above the alphas. Names of the Hub stay."""
    recipe = json.loads(json.dumps(calibrated[0]))
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, place in enumerate([recipe["base_model"], *(entry["model"] for entry in recipe["models"])]):
        names[place] = f"models/m{number}"
        shutil.copytree(place, names[place])
    recipe["base_model"] = f"./{names[recipe['base_model']]}"
    for entry in recipe["models"]:
        entry["model"] = names[entry["model"]]
    recipe["tokenizer_source"] = "models/m1"
    Path("recipe.yml").write_text(yaml.safe_dump(recipe))
    assert slta("calibrate", "recipe.yml", "-o", "out/slta_alphas.json", *QUIET).exit_code == 0
    if not with_recipe:
        shutil.copy("recipe.yml", "out/mergekit_config.yml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = slta("export", tmp_path / "out", *(["--recipe", tmp_path / "recipe.yml"] if with_recipe else []))
    assert result.exit_code == 0, result.output
    stock = yaml.safe_load(result.stdout)
    found = [stock["base_model"], *(entry["model"] for entry in stock["models"])]
    assert found == [str(tmp_path / name) for name in names.values()]
    assert stock["tokenizer_source"] == str(tmp_path / "models" / "m1")
    content = json.loads((tmp_path / "out" / "slta_alphas.json").read_text())
    assert content["base_model"] == "models/m0"  # as the recipe names it
