"""Model classes that nothing here was written for: a renamed copy of a model's code, which lies beside its weights.
Checkpoints with other names than those that transformers writes today, alone and together."""

from __future__ import annotations

import functools
import inspect
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers
from conftest import Models, make_tokenizer, own_class, perturbed, save_models, tensors, with_varied_weights
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from test_architectures import Reference, assert_merged, assert_supported, merged_by_stock
from zoo import ZOO, Layer

pytestmark = pytest.mark.zoo

RENAMED = {
    "self_attn": "mixer", "mlp": "ffn", "layers": "stages", "input_layernorm": "before",
    "post_attention_layernorm": "between", "pre_feedforward_layernorm": "inside", "post_feedforward_layernorm": "last",
}  # fmt: skip


def renamed_code(name: str, words: dict[str, str]) -> dict[str, str]:
    """File -> text of a copy of a model's code and of its config's, with other names for its class and modules."""
    files = {}
    for part in ("configuration", "modeling"):
        text = inspect.getsource(import_module(f"transformers.models.{name}.{part}_{name}"))
        text = re.sub(r"^\s*@auto_docstring(\([^)]*\))?\n", "", text, flags=re.MULTILINE)
        text = text.replace("from ... import", "from transformers import").replace("from ...", "from transformers.")
        text = text.replace(f"configuration_{name}", "configuration_fresh").replace(name.capitalize(), "Fresh")
        text = text.replace(f'model_type = "{name}"', 'model_type = "fresh"')
        for word, other in words.items():
            text = re.sub(rf"\b{word}\b", other, text)
        files[f"{part}_fresh.py"] = text
    return files


def renamed_layer(layer: Layer, words: dict[str, str]) -> Layer:
    """A layer's description in the words of the copy."""

    def new(name: str) -> str:
        return ".".join(words.get(part, part) for part in name.split("."))

    heads = layer.heads and replace(layer.heads, output=new(layer.heads.output))
    norms = {new(name): block for name, block in layer.norms.items()}
    mixers, mlps = (tuple(map(new, names)) for names in (layer.mixers, layer.mlps))
    return replace(layer, mixers=mixers, mlps=mlps, norms=norms, entry=new(layer.entry), heads=heads)


@pytest.fixture(scope="module")
def own_code(tmp_path_factory):
    """transformers copies a checkpoint's code into a folder that is not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("modules")
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.syspath_prepend(folder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            patch.delitem(sys.modules, name)  # another test has imported code from the usual folder
        yield


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama", RENAMED),
        ("gemma2", RENAMED),
        ("mixtral", RENAMED),
        ("llama", {**RENAMED, "q_proj": "ask", "k_proj": "offer", "v_proj": "give", "o_proj": "sum"}),
    ],
    ids=["llama", "gemma2", "mixtral", "projections"],
)
def test_class_that_nobody_has_heard_of(own_code, tmp_path, name, words):
    """All that is promised of known classes, with nothing said about this one."""
    species = ZOO[name]
    code = tmp_path / "code"
    code.mkdir()
    files = renamed_code(name, words)
    for file, text in files.items():
        (code / file).write_text(text)
    own = {
        "model_type": "fresh",
        "auto_map": {"AutoConfig": "configuration_fresh.FreshConfig",
                     "AutoModelForCausalLM": "modeling_fresh.FreshForCausalLM"},
        "architectures": ["FreshForCausalLM"],
    }  # fmt: skip
    (code / "config.json").write_text(json.dumps({**species.settings, **own}))
    trust = {"trust_remote_code": True}
    config = transformers.AutoConfig.from_pretrained(code, **trust)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = with_varied_weights(transformers.AutoModelForCausalLM.from_config(config, **trust))
    models = save_models(tmp_path, [base, perturbed(base, 1), perturbed(base, 2)])
    for path in (models.base, *models.experts):
        saved = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**saved, **own}))
        for file, text in files.items():
            (path / file).write_text(text)
    layers = [renamed_layer(layer, words) for layer in species.layers]
    if "q_proj" in words:  # heads are recognised by these names
        layers = [replace(layer, heads=None) for layer in layers]
    known = replace(species, layers=tuple(layers), path="model.stages")
    kind = transformers.AutoModelForCausalLM
    reference = Reference(known, models, functools.partial(kind.from_pretrained, dtype=torch.float32, **trust))
    assert_supported(known, models, reference, tmp_path, kind, **trust)


def stored_again(source: Path, target: Path, contents: dict[str, torch.Tensor], config: dict | None = None) -> Path:
    """A copy of a checkpoint's folder that holds other tensors, and may have another config."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file({name: value.contiguous().clone() for name, value in contents.items()}, target / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    if config is not None:
        (target / "config.json").write_text(json.dumps(config))
    return target


def as_in_memory(source: Path, target: Path) -> Path:
    """With the names and shapes that the model has in memory: experts fused, language models inside `model`."""
    model = own_class(source).from_pretrained(source)
    state = model.state_dict()
    if model.config.get_text_config().tie_word_embeddings:
        del state["lm_head.weight"]
    assert state.keys() != tensors(source).keys()
    return stored_again(source, target, state)


def text_only(source: Path, target: Path) -> Path:
    """The language model of a model with a vision tower, as a model of its own."""
    whole = own_class(source).from_pretrained(source)
    config = whole.config.get_text_config()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name.replace("model.language_model.", "model."): value for name, value in whole.state_dict().items()}
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    model.save_pretrained(target)
    make_tokenizer().save_pretrained(target)
    return target


def with_more(extra: dict[str, torch.Size]) -> Callable[[Path, Path], Path]:
    """With tensors that the model class does not know; they are the same in all models."""

    def store(source: Path, target: Path) -> Path:
        generator = torch.Generator().manual_seed(5)
        more = {name: torch.randn(shape, generator=generator) for name, shape in extra.items()}
        return stored_again(source, target, {**tensors(source), **more})

    return store


def without_prefix(source: Path, target: Path) -> Path:
    """GPT-2 as on the Hub: saved without its head, with the masks of its time."""
    found = {name.removeprefix("transformer."): value for name, value in tensors(source).items()}
    masks = {f"h.{index}.attn.bias": torch.ones(1, 1, 128, 128).tril() for index in range(2)}
    return stored_again(source, target, {**found, **masks})


NAMINGS: dict[str, tuple[str, Callable[[Path, Path], Path]]] = {
    **{name: (name, as_in_memory) for name in (
        "gemma3_vl", "mistral3", "qwen2_vl", "qwen2_5_vl", "mixtral", "qwen3_moe_dense", "granite_moe_hybrid",
        "qwen3_5_moe", "jamba", "deepseek_v3", "nemotron_h",
    )},
    "gpt2-hub": ("gpt2", without_prefix),
    "llama-old": ("llama", with_more({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (4,) for i in range(2)})),
    "gpt_neox-old": ("gpt_neox", with_more({"gpt_neox.layers.0.attention.bias": (1, 1, 128, 128),
                                            "gpt_neox.layers.0.attention.masked_bias": ()})),
    "qwen3_5-mtp": ("qwen3_5", with_more({"mtp.fc.weight": (32, 64), "mtp.norm.weight": (32,),
                                          "mtp.layers.0.self_attn.q_proj.weight": (64, 32)})),
    "deepseek-mtp": ("deepseek_v3", with_more({"model.layers.61.eh_proj.weight": (32, 64),
                                               "model.layers.61.mlp.experts.0.up_proj.weight": (16, 32)})),
}  # fmt: skip


def together(models: Models, folder: Path, *stores: Callable[[Path, Path], Path] | None) -> Models:
    """The same models, each stored in another way (None: as it is)."""
    paths = [store(path, folder / f"again{number}") if store else path for number, (path, store) in
             enumerate(zip((models.base, *models.experts), stores, strict=True))]  # fmt: skip
    return Models(folder, paths[0], tuple(paths[1:]), models.datasets)


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """A model's tensors in memory, of which none is missing in the checkpoint or unknown to it."""
    model, info = own_class(folder).from_pretrained(folder, output_loading_info=True)
    assert not any(info[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model.state_dict()


@pytest.fixture(scope="module")
def usual(specimen, tmp_path_factory):
    """species -> the merge of its models as transformers stores them, in memory."""

    @functools.cache
    def merge(name: str) -> dict[str, torch.Tensor]:
        return loaded(merged_by_stock(specimen(name), tmp_path_factory.mktemp("usual"), granularity="linear"))

    return merge


def assert_same_models(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", NAMINGS)
def test_names_of_the_base_are_kept(specimen, usual, tmp_path, case):
    """OUT has the base's names, and is the same model as with the names of today's transformers."""
    name, store = NAMINGS[case]
    models = together(specimen(name), tmp_path, store, store, store)
    loaded(models.base)
    out = merged_by_stock(models, tmp_path, granularity="linear")
    assert_merged(models, out)
    assert_same_models(loaded(out), usual(name))


@pytest.mark.parametrize(
    ("name", "stores"),
    [
        ("mixtral", (None, as_in_memory, None)),
        ("mixtral", (as_in_memory, None, None)),
        ("qwen3_5_moe", (None, as_in_memory, as_in_memory)),
        ("granite_moe_hybrid", (as_in_memory, None, as_in_memory)),
        ("gemma3_vl", (None, as_in_memory, None)),
        ("gemma3_vl", (None, text_only, text_only)),
        ("gemma3_vl", (as_in_memory, text_only, None)),
        ("mistral3", (None, text_only, None)),
        ("qwen2_vl", (as_in_memory, None, None)),
        ("qwen3_5", (None, None, text_only)),
        ("gpt2", (None, without_prefix, None)),
        ("gpt2", (without_prefix, None, without_prefix)),
    ],
)
def test_models_with_different_names(specimen, usual, tmp_path, name, stores):
    """Each model is read by its own names: experts fused or not, with and without a vision tower."""
    models = together(specimen(name), tmp_path, *stores)
    out = merged_by_stock(models, tmp_path, granularity="linear")
    assert tensors(out).keys() == tensors(models.base).keys()
    assert {name: value.shape for name, value in tensors(out).items()} == {
        name: value.shape for name, value in tensors(models.base).items()
    }
    assert_same_models(loaded(out), usual(name))


def test_expert_with_a_vision_tower_for_a_base_of_text(specimen, tmp_path):
    """Only its language model is used."""
    whole = specimen("gemma3_vl")
    plain = together(whole, tmp_path, text_only, text_only, text_only)
    expected = loaded(merged_by_stock(plain, tmp_path, granularity="linear"))
    (tmp_path / "mixed").mkdir()
    mixed = replace(plain, experts=(whole.experts[0], plain.experts[1]))
    assert_same_models(loaded(merged_by_stock(mixed, tmp_path / "mixed", granularity="linear")), expected)


def test_an_adapter_names_modules_as_the_model_does(specimen, tmp_path):
    """A LoRA adapter of the language model in a model whose checkpoint has other names."""
    models = specimen("gemma3_vl")
    torch.manual_seed(0)
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=r".*language_model.*(q_proj|up_proj)", init_lora_weights=False
    )
    adapted = get_peft_model(own_class(models.base).from_pretrained(models.base), config)
    adapted.save_pretrained(tmp_path / "adapter")
    whole = tmp_path / "whole"
    adapted.merge_and_unload().save_pretrained(whole)
    make_tokenizer().save_pretrained(whole)
    found = []
    for number, expert in enumerate((f"{models.base}+{tmp_path / 'adapter'}", whole)):
        (tmp_path / str(number)).mkdir()
        given = replace(models, experts=(expert, models.experts[1]))
        found.append(loaded(merged_by_stock(given, tmp_path / str(number), granularity="linear")))
    assert_same_models(*found)
