"""The model without weights that rows are fed through."""

from __future__ import annotations

import torch
from conftest import make_config, refused
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from mergekit_slta.errors import ModelError
from mergekit_slta.models.skeleton import Skeleton


def test_a_model_without_layers(monkeypatch):
    """A model class whose blocks are found nowhere in it is refused with their name."""
    monkeypatch.setattr(LlamaPreTrainedModel, "_no_split_modules", ["Block"])
    with refused(ModelError, "unknown-layers", "Block", "in x;"):
        Skeleton(make_config("llama", architectures=["LlamaForCausalLM"]), "x")


def test_blocks_that_do_not_add_up(monkeypatch):
    """A layer whose output is scaled is neither wiring."""
    skeleton = Skeleton(make_config("llama", architectures=["LlamaForCausalLM"]), "x")
    weights = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.3
               for name, shape in skeleton.shapes.items()}  # fmt: skip
    ids = torch.tensor([[1, 2, 3]])
    hidden = skeleton.embed(ids, weights)
    own = {name: tensor for name, tensor in weights.items() if name.startswith(f"{skeleton.layers_path}.0.")}
    assert not skeleton.has_parallel_blocks(0, hidden, own)
    monkeypatch.setattr(type(skeleton), "block", lambda self, index, kind, hidden, weights: 2 * hidden)
    with refused(ModelError, "unknown-blocks", f"{skeleton.layers_path}.0"):
        skeleton.has_parallel_blocks(0, hidden, own)
