"""The model without weights that rows are fed through."""

from __future__ import annotations

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from conftest import make_config, refused
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from mergekit_slta.errors import ModelError
from mergekit_slta.models.skeleton import Skeleton, learned_positions


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


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=32, n_positions=32), 32),
        (transformers.OPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, ffn_dim=8, vocab_size=66,
                                word_embed_proj_dim=8, max_position_embeddings=64), 64),  # a table of 66 rows
        (transformers.GPTBigCodeConfig(n_embd=8, n_layer=1, n_head=1, vocab_size=32, n_positions=48), 48),
        (make_config("llama", vocab_size=256), None),
        (transformers.FalconConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=32,
                                   alibi=True), None),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)  # fmt: skip
def test_learned_positions_are_counted(config, expected):
    """A table of position embeddings ends somewhere; rotary and ALiBi models go on."""
    with init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert learned_positions(model, config) == expected
