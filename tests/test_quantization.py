"""Quantized checkpoints are refused before a weight is read; what only looks like one is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Models, assert_refused, mergekit_yaml, read, refused, slta, tensors
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from mergekit_slta.errors import ModelError
from mergekit_slta.job.preflight import prepare

UP = "model.layers.0.mlp.up_proj.weight"
MODULE = UP.removesuffix(".weight")
U8, I32 = torch.uint8, torch.int32


def changed(source: Path, target: Path, change, config: dict | None = None) -> Path:
    """A copy of a checkpoint, in one file, with its tensors and its config changed."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    state = tensors(source)
    change(state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    return target


def with_expert(models: Models, expert: object, **keys: object) -> dict:
    recipe = {**models.recipe(2), **keys}
    recipe["models"][1]["model"] = str(expert)
    return recipe


def eight_bits(state: dict, dtype: torch.dtype = torch.float8_e4m3fn) -> None:
    for name in [name for name in state if name.endswith("proj.weight")]:
        state[name] = state[name].to(dtype)


def fine_grained_fp8(state: dict) -> None:
    eight_bits(state)
    for name in [name for name in state if name.endswith("proj.weight")]:
        state[f"{name}_scale_inv"] = torch.ones(1, 1)


def replaced(*new: tuple[str, torch.dtype], keep: bool = False):
    """A change that puts other tensors in the place of (or beside) one weight."""

    def change(state: dict) -> None:
        if not keep:
            del state[UP]
        for name, dtype in new:
            state[name] = torch.ones(8, 4).to(dtype)

    return change


def no_up_proj(state: dict) -> None:
    state[f"{MODULE}.secret_codes"] = state.pop(UP).to(torch.int16)


def integer_bias(state: dict) -> None:
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.int64)


SCHEMES = {
    "FP8 with blocks": (fine_grained_fp8, UP.replace("0.mlp.up", "0.mlp.down"), "F8_E4M3"),
    "FP8 alone": (eight_bits, "proj.weight", "F8_E4M3"),
    "FP8 that was cast to 16 bits": (replaced((f"{UP}_scale_inv", torch.float32), keep=True), f"{UP}_scale_inv", "F32"),
    "bitsandbytes 8-bit": (
        replaced((UP, torch.int8), (f"{MODULE}.SCB", torch.float32), (f"{MODULE}.weight_format", U8)), MODULE, "I8"
    ),
    "bitsandbytes 4-bit": (
        replaced((UP, U8), (f"{UP}.absmax", U8), (f"{UP}.quant_state.bitsandbytes__nf4", U8)), UP, "U8"
    ),
    "GPTQ": (
        replaced((f"{MODULE}.qweight", I32), (f"{MODULE}.scales", torch.float16), (f"{MODULE}.g_idx", I32)), MODULE,
        "I32",
    ),
    "compressed-tensors": (
        replaced((f"{UP}_packed", I32), (f"{UP}_scale", torch.bfloat16), (f"{UP}_shape", torch.int64)), UP, "I32"
    ),
    "MXFP4": (replaced((f"{MODULE}_blocks", U8), (f"{MODULE}_scales", U8)), f"{MODULE}_blocks", "U8"),
    "HQQ": (replaced((f"{MODULE}.W_q", U8)), f"{MODULE}.W_q", "U8"),
    "torchao": (replaced((f"{MODULE}._weight_qdata", torch.int8)), f"{MODULE}._weight_qdata", "I8"),
    "a method that nobody knows": (no_up_proj, f"{MODULE}.secret_codes", "I16"),
    "a parameter in integers": (integer_bias, "model.norm.weight", "I64"),
}  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_experts_are_refused(tiny, options, tmp_path, scheme):
    """Whatever the recipe's `dtype` is: the file, the tensor and its dtype are named."""
    change, tensor, dtype = SCHEMES[scheme]
    config = {"quantization_config": {"quant_method": "x"}}
    folder = changed(tiny.experts[1], tmp_path / "quantized", change, config)
    for keys in ({}, {"dtype": "bfloat16"}):
        with refused(ModelError, "quantized-weights", f"model.safetensors of {folder}", tensor, f"in {dtype}"):
            prepare(read(with_expert(tiny, folder, **keys)), options)


def test_all_models_in_eight_bits(tiny, write_recipe, tmp_path):
    """The base is named first; `check`, the merge and the stock command say the same, and OUT is not made."""
    recipe = {**tiny.recipe(2), "dtype": "bfloat16"}
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    recipe["base_model"] = str(changed(tiny.base, tmp_path / "base", fine_grained_fp8, config))
    for number, entry in enumerate(recipe["models"]):
        entry["model"] = str(changed(tiny.experts[number], tmp_path / f"e{number}", fine_grained_fp8, config))
    path = write_recipe(recipe)
    for result in (slta("check", path), mergekit_yaml(path, tmp_path / "out", "--quiet")):
        assert_refused(result, "quantized-weights", tmp_path / "base")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_new", [True, False], ids=["zip", "torch before 1.6"])
def test_quantized_pickles(tiny, options, tmp_path, is_new):
    """In `.bin` files too, in one or in shards."""
    shutil.copytree(tiny.experts[1], tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors*"))
    state = tensors(tiny.experts[1])
    state[UP] = state[UP].to(torch.int8)
    shard = "pytorch_model-00001-of-00001.bin"
    torch.save(state, tmp_path / "bin" / shard, _use_new_zipfile_serialization=is_new)
    index = {"weight_map": dict.fromkeys(state, shard)}
    (tmp_path / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with refused(ModelError, "quantized-weights", f"{shard} of", UP, "in INT8"):
        prepare(read(with_expert(tiny, tmp_path / "bin")), options)


def test_an_adapter_on_a_quantized_base(tiny, options, tmp_path):
    """QLoRA names the base that it was trained on, in 4 bits: refused as such, not as a base of other shapes."""
    from test_checkpoints import adapter

    path, _ = adapter(tiny, tmp_path, 7)
    pack = replaced((UP, U8), (f"{UP}.absmax", U8))
    base = changed(tiny.base, tmp_path / "bnb-4bit", pack, {"quantization_config": {"quant_method": "bitsandbytes"}})
    with refused(ModelError, "quantized-weights", base, UP):
        prepare(read(with_expert(tiny, f"{base}+{path}")), options)


def test_a_mere_quantization_config(tiny, write_recipe, tmp_path):
    """Dequantized checkpoints often keep it: the merge is that of the plain ones, and OUT's config has none of it."""
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    recipe = tiny.recipe(2)
    assert mergekit_yaml(write_recipe(recipe), tmp_path / "plain", "--quiet").exit_code == 0
    recipe["base_model"] = str(changed(tiny.base, tmp_path / "base", lambda state: None, config))
    recipe["models"][1]["model"] = str(changed(tiny.experts[1], tmp_path / "expert", lambda state: None, config))
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "quantization_config" in result.output
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    plain, merged = tensors(tmp_path / "plain"), tensors(tmp_path / "out")
    assert all(torch.equal(merged[name], plain[name]) for name in plain)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_buffers_of_integers_are_no_weights(tiny, options, tmp_path):
    """Masks and positions that older versions of transformers saved."""

    def add_buffers(state: dict) -> None:
        state["model.layers.0.self_attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        state["model.layers.0.self_attn.masked_bias"] = torch.tensor(-10000)
        state["model.position_ids"] = torch.arange(8)
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    folder = changed(tiny.experts[1], tmp_path / "buffers", add_buffers)
    prepare(read(with_expert(tiny, folder)), options)
