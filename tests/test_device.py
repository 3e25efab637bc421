"""Device placement, on the `meta` device, which refuses whatever was left on the CPU."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import make_config
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from packaging.version import Version
from transformers import Gemma2Config, masking_utils

from mergekit_slta.checkpoints.tensors import Checkpoints
from mergekit_slta.job.preflight import prepare
from mergekit_slta.models.hooks import ModuleCall
from mergekit_slta.models.skeleton import Skeleton
from mergekit_slta.objectives.registry import estimate
from mergekit_slta.recipe.read import read_recipe


def config_of(family: str):
    if family == "gemma2":
        settings = make_config("llama").to_dict()
        keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
                "vocab_size", "max_position_embeddings")  # fmt: skip
        config = Gemma2Config(**{key: settings[key] for key in keys}, head_dim=8, query_pre_attn_scalar=8)
        config.architectures = ["Gemma2ForCausalLM"]
        return config
    config = make_config(family)
    config.architectures = [
        {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]
    ]
    return config


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.6"), reason="its rotary embeddings ask the meta device for autocast"
)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2"])
def test_nothing_of_the_model_stays_on_the_cpu(family, monkeypatch):
    """Embedding, whole layer, both blocks, a single module and the head run with every tensor on another device."""
    monkeypatch.setattr(
        masking_utils, "find_packed_sequence_indices", lambda *_: None
    )  # looks at values: meta has none
    skeleton = Skeleton(config_of(family), "base", torch.float32, "meta")
    weights = {name: torch.empty(shape, device="meta") for name, shape in skeleton.shapes.items()}
    ids = torch.zeros((2, 7), dtype=torch.int64, device="meta")
    hidden = skeleton.embed(ids, weights)
    prefix = skeleton.layers_path + ".1."
    own = {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    outputs = [
        hidden,
        skeleton.layer(1, hidden, own),
        skeleton.block(1, "attention", hidden, own),
        skeleton.block(1, "mlp", hidden, own),
        skeleton.attention_with_heads(1, hidden, own)[1],
        skeleton.module(prefix + "mlp.down_proj", ModuleCall((torch.empty(3, 48, device="meta"),)), own),
        skeleton.head(hidden[:1], weights),
    ]
    assert {output.device.type for output in outputs} == {"meta"}
    assert {buffer.device.type for buffer in skeleton.model.buffers()} <= {"meta"}


def test_weights_are_put_where_they_are_asked_for(tiny, options, monkeypatch):
    """Every tensor of every model, in the precision of the forward passes."""
    job = prepare(read_recipe(MergeConfiguration.model_validate(tiny.recipe(2))), options)
    checkpoints = Checkpoints(job.plan, job.skeleton, job.recipe.names, torch.device("meta"), torch.float64)
    monkeypatch.setattr(torch, "isfinite", lambda tensor: torch.tensor(True))
    for own in checkpoints.load(list(job.plan.tensors)):
        assert {(tensor.device.type, tensor.dtype) for tensor in own.values()} == {("meta", torch.float64)}


def test_on_a_device_all_weights_take_memory(tiny, monkeypatch):
    """float32 checkpoints stay mapped on the CPU; an accelerator holds copies of them, and `check` counts these."""
    job = prepare(read_recipe(MergeConfiguration.model_validate(tiny.recipe(2))), MergeOptions(quiet=True))
    here = estimate(job)
    monkeypatch.setattr(type(job), "device", property(lambda self: torch.device("cuda")))
    there = estimate(job)
    assert there.peak_bytes > here.peak_bytes
    assert there.largest_bytes == here.largest_bytes > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_alphas_on_a_gpu_equal_those_of_the_cpu(tiny):
    """To 1e-4: float32 products are true float32 there, too."""
    from mergekit_slta.calibration.calibrate import calibrate

    here = calibrate(tiny.recipe(2), MergeOptions(quiet=True))
    there = calibrate(tiny.recipe(2), MergeOptions(quiet=True, device="cuda"))
    for one, other in zip(here.submodules, there.submodules, strict=True):
        assert one.alpha == pytest.approx(other.alpha, abs=1e-4)
