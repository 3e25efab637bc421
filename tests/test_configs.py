"""Configs as people's checkpoints have them: class names, and keys that differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Models, assert_refused, mergekit_yaml, read, refused, slta, tensors
from test_checkpoints import adapter
from transformers import AutoModelForCausalLM

from mergekit_slta.errors import ModelError
from mergekit_slta.job.preflight import prepare


def configured(source: Path, target: Path, remove: tuple[str, ...] = (), **changes: object) -> Path:
    """A copy of a checkpoint with another config."""
    shutil.copytree(source, target)
    path = target / "config.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in remove}
    path.write_text(json.dumps({**kept, **changes}))
    return target


def with_models(models: Models, base: object = None, expert: object = None) -> dict:
    recipe = models.recipe(2)
    recipe["base_model"] = str(base or models.base)
    recipe["models"][1]["model"] = str(expert or models.experts[1])
    return recipe


CLASSES = [["LLaMaForCausalLM"], ["FooForCausalLM", "LlamaForCausalLM"], None, []]


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The merge of the models as transformers saved them."""
    out = tmp_path_factory.mktemp("plain")
    path = out / "recipe.json"
    path.write_text(json.dumps(tiny.recipe(2)))
    assert mergekit_yaml(path, out / "out", "--quiet").exit_code == 0
    return tensors(out / "out")


@pytest.mark.parametrize("names", CLASSES)
@pytest.mark.parametrize("where", ["base", "expert"])
def test_other_spellings_of_the_class(tiny, plain, write_recipe, tmp_path, names, where):
    """transformers goes by `model_type`: the first spelling of Llama, several classes or none are merged as usual, and
    OUT's config names one class."""
    source = tiny.base if where == "base" else tiny.experts[1]
    folder = configured(source, tmp_path / where, architectures=names)
    recipe = write_recipe(with_models(tiny, **{where: folder}))
    result = mergekit_yaml(recipe, tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    merged = tensors(tmp_path / "out")
    assert all(torch.equal(merged[name], plain[name]) for name in plain)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None


def test_an_adapter_on_a_base_without_a_class(tiny, options, tmp_path):
    path, _ = adapter(tiny, tmp_path, 9)
    base = configured(tiny.base, tmp_path / "base", architectures=None)
    job = prepare(read(with_models(tiny, base, f"{base}+{path}")), options)
    assert [model.override_architecture for model in job.plan.models if model.lora] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["LlamaForSequenceClassification"], "llama"),
        (["LlamaModel"], "llama"),
        (["FooForCausalLM", "BarForCausalLM"], "llama"),
        (None, "opt"),
        (["MistralForCausalLM"], "mistral"),
    ],
)
def test_classes_that_are_others(tiny, write_recipe, tmp_path, names, kind):
    """An expert with another head, without one, of unknown classes or of another model is refused by name."""
    folder = configured(tiny.experts[1], tmp_path / "other", architectures=names, model_type=kind)
    name = (names or ["OPTForCausalLM"])[0]
    assert_refused(
        slta("check", write_recipe(with_models(tiny, expert=folder))),
        "differing-architectures",
        name,
        "LlamaForCausalLM",
    )


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaModel"])
def test_a_base_that_is_no_language_model(tiny, write_recipe, tmp_path, name):
    recipe = tiny.recipe()
    for place, entry in enumerate([recipe["base_model"], *(entry["model"] for entry in recipe["models"])]):
        folder = configured(Path(entry), tmp_path / f"model{place}", architectures=[name])
        if place:
            recipe["models"][place - 1]["model"] = str(folder)
        else:
            recipe["base_model"] = str(folder)
    result = slta("check", write_recipe(recipe))
    assert_refused(result, "unsupported-architecture", name, "output projection")


HARMLESS = {
    "names of transformers 4": (("rope_parameters", "dtype"), {"rope_theta": 10000.0, "rope_scaling": None,
                                                               "torch_dtype": "bfloat16"}),
    "training and implementation": ((), {
        "use_cache": False, "attention_dropout": 0.1, "initializer_range": 0.1, "pretraining_tp": 2,
        "_attn_implementation": "eager", "attn_implementation": "sdpa", "unsloth_version": "2025.1",
        "unsloth_fixed": True, "temperature": 0.5, "tokenizer_class": "LlamaTokenizer", "pad_token_id": 5,
        "transformers_version": "4.30.0", "quantization_config": {"quant_method": "awq"},
    }),
}  # fmt: skip


@pytest.mark.parametrize("case", HARMLESS)
def test_keys_that_cannot_matter(tiny, options, tmp_path, caplog, case):
    """No warning of what does not change the forward pass, nor of another name for the same."""
    remove, changes = HARMLESS[case]
    folder = configured(tiny.experts[1], tmp_path / "expert", remove, **changes)
    prepare(read(with_models(tiny, expert=folder)), options)
    assert "the base's is used" not in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 500000.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ],
)
def test_another_rope(tiny, options, tmp_path, caplog, changes):
    """However it is spelled, another position embedding is warned of."""
    folder = configured(tiny.experts[1], tmp_path / "expert", ("rope_parameters",), **changes)
    prepare(read(with_models(tiny, expert=folder)), options)
    assert "has other rope_parameters; the base's is used" in caplog.text


def test_an_error_is_not_announced_as_harmless(tiny, options, tmp_path, caplog):
    """A key that is refused is not said to be the base's before."""
    folder = configured(tiny.experts[1], tmp_path / "expert", num_hidden_layers=3)
    with refused(ModelError, "differing-sizes", "has num_hidden_layers 3"):
        prepare(read(with_models(tiny, expert=folder)), options)
    assert "the base's is used" not in caplog.text


def test_a_config_of_no_bytes(tiny, options, tmp_path):
    folder = configured(tiny.experts[1], tmp_path / "expert")
    (folder / "config.json").write_text("")
    with refused(ModelError, "unreadable-config", folder):
        prepare(read(with_models(tiny, expert=folder)), options)


@pytest.mark.parametrize(("dtype", "warned"), [("bfloat16", True), ("torch.float16", True), ("float32", False)])
def test_dtype_gets_the_readmes_advice(tiny, options, caplog, dtype, warned):
    """`dtype` rounds the inputs, `out_dtype` only the output."""
    prepare(read({**tiny.recipe(2), "dtype": dtype}), options)
    name = dtype.removeprefix("torch.")
    assert (f"out_dtype: {name} in its place rounds only the result" in caplog.text) == warned


def drop(folder: Path, *names: str) -> None:
    from safetensors.torch import save_file

    state = {name: tensor for name, tensor in tensors(folder).items() if name not in names}
    for path in folder.glob("model*"):
        path.unlink()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("lacking", ["expert", "all"])
def test_a_head_that_is_missing_and_not_tied(tiny, options, tmp_path, lacking):
    """mergekit would take the embeddings for it, or write a model without one."""
    paths = [tiny.base, *tiny.experts[:2]]
    for number, source in enumerate(paths if lacking == "all" else paths[2:], start=0 if lacking == "all" else 2):
        paths[number] = configured(source, tmp_path / f"m{number}")
        drop(paths[number], "lm_head.weight")
    recipe = with_models(tiny, paths[0], paths[2])
    recipe["models"][0]["model"] = str(paths[1])
    with refused(ModelError, "missing-tensor", "lm_head.weight", "does not tie it"):
        prepare(read(recipe), options)


def test_weights_of_another_config(tiny, options, tmp_path):
    """All models have the same tensors, and the base's config makes others."""
    base = configured(tiny.base, tmp_path / "base", vocab_size=300)
    experts = [configured(path, tmp_path / path.name, vocab_size=300) for path in tiny.experts[:2]]
    recipe = with_models(tiny, base, experts[1])
    recipe["models"][0]["model"] = str(experts[0])
    with refused(ModelError, "differing-sizes", "is [320, 32] in", "[300, 32] by its config"):
        prepare(read(recipe), options)
