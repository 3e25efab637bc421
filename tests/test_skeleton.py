"""The model without weights that rows are fed through."""

from __future__ import annotations

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from conftest import make_config, refused
from transformers import LlamaConfig, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mergekit_slta.errors import ModelError
from mergekit_slta.models.running import learned_positions
from mergekit_slta.models.skeleton import Skeleton


def test_a_model_without_layers(monkeypatch):
    """A model without a list of as many modules as its config has layers is refused with their number."""
    config, other = make_config("llama", architectures=["LlamaForCausalLM"]), LlamaConfig(num_hidden_layers=7)
    monkeypatch.setattr(LlamaConfig, "get_text_config", lambda self, **_: other)
    with refused(ModelError, "unknown-layers", "7 decoder layers", "in x;"):
        Skeleton(config, "x")


@pytest.mark.parametrize(
    ("config", "name", "reason"),
    [
        (transformers.BertConfig(num_hidden_layers=1), "BertModel", "no output projection"),
        (transformers.T5Config(num_layers=1), "T5ForConditionalGeneration", "an encoder"),
        (transformers.Gemma4TextConfig(num_hidden_layers=2, hidden_size=16, intermediate_size=16, vocab_size=32,
                                       vocab_size_per_layer_input=32, num_kv_shared_layers=0),
         "Gemma4ForCausalLM", "read the tokens of a row"),
        (transformers.RobertaConfig(num_hidden_layers=1, hidden_size=16, intermediate_size=16, vocab_size=32,
                                    num_attention_heads=2, is_decoder=True),
         "RobertaForCausalLM", "positions depend on the numbers of the tokens"),
        (transformers.BertConfig(num_hidden_layers=1), "BertForMaskedLM", "reads later tokens"),
        (transformers.BertConfig(num_hidden_layers=1), "BertLMHeadModel", "reads later tokens"),
        (transformers.Gemma3TextConfig(num_hidden_layers=2, hidden_size=16, intermediate_size=16, vocab_size=32,
                                       use_bidirectional_attention=True), "Gemma3ForCausalLM", "reads later tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_models_that_cannot_be_run_layer_by_layer(config, name, reason):
    config.architectures = [name]
    with refused(ModelError, "unsupported-architecture", f"x is a {name}", reason):
        Skeleton(config, "x")


def test_blocks_that_do_not_add_up(monkeypatch):
    """Blocks whose outputs are scaled do not give the layer's output."""
    skeleton = Skeleton(make_config("llama", architectures=["LlamaForCausalLM"]), "x")
    weights = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.3
               for name, shape in skeleton.shapes.items()}  # fmt: skip
    ids = torch.tensor([[1, 2, 3]])
    hidden = skeleton.embed(ids, weights)
    own = {name: tensor for name, tensor in weights.items() if name.startswith(f"{skeleton.layers_path}.0.")}
    skeleton.check_blocks(0, hidden, own)
    monkeypatch.setattr(type(skeleton), "block", lambda self, index, kind, hidden, weights: 2 * hidden)
    with refused(ModelError, "unknown-blocks", f"{skeleton.layers_path}.0"):
        skeleton.check_blocks(0, hidden, own)


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


class Doubled(LlamaModel):
    """Its hidden states are changed between its layers."""

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        places = torch.arange(hidden.shape[1])[None]
        for layer in self.layers:
            hidden = 1.5 * layer(hidden, position_embeddings=self.rotary_emb(hidden, places))
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


class Scaled(Doubled):
    """Its features are scaled after the layers, outside of any module."""

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        output = LlamaModel.forward(self, input_ids=input_ids, inputs_embeds=inputs_embeds, use_cache=False)
        return BaseModelOutputWithPast(last_hidden_state=2 * output.last_hidden_state)


@pytest.mark.parametrize(
    ("kind", "reason"), [(Doubled, "changes the hidden states between layers"), (Scaled, "than to call modules")]
)
def test_what_a_model_does_outside_of_modules(monkeypatch, kind, reason):
    """Layers that are run one by one would miss it."""
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaModel", kind)
    with refused(ModelError, "unsupported-architecture", reason):
        Skeleton(make_config("llama", architectures=["LlamaForCausalLM"]), "x")


def test_a_matrix_of_the_layer_itself(monkeypatch):
    """The attention block reads it, though it counts to the MLP block: the block gets the base's."""

    class Mixed(LlamaDecoderLayer):
        def __init__(self, config, index):
            super().__init__(config, index)
            self.mix = torch.nn.Parameter(torch.zeros(config.hidden_size, config.hidden_size))

        def forward(self, hidden, **kwargs):
            hidden = hidden + self.self_attn(self.input_layernorm(hidden), **kwargs)[0] @ self.mix
            return hidden + self.mlp(self.post_attention_layernorm(hidden))

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaDecoderLayer", Mixed)
    skeleton = Skeleton(make_config("llama", architectures=["LlamaForCausalLM"]), "x")
    weights = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.3
               for name, shape in skeleton.shapes.items()}  # fmt: skip
    hidden = skeleton.embed(torch.tensor([[1, 2, 3]]), weights)
    own = {name: tensor for name, tensor in weights.items() if name.startswith(f"{skeleton.layers_path}.0.")}
    skeleton.check_blocks(0, hidden, own)
    del own[f"{skeleton.layers_path}.0.mix"]
    with refused(ModelError, "unknown-blocks"):
        skeleton.check_blocks(0, hidden, own)
