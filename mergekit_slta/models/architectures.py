"""The supported model classes, and what has to be known of each to take it apart. Everything else its forward tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mergekit_slta.errors import ModelError, listing, show

Block = Literal["attention", "mlp"]
Packing = Literal["separate", "stacked", "grouped"]
_PRE_NORMS: tuple[tuple[str, Block], ...] = (("input_layernorm", "attention"), ("post_attention_layernorm", "mlp"))


@dataclass(frozen=True)
class Projections:
    """Where an attention branch keeps its heads.

    Attributes:
        inputs: modules that make queries, keys and values (in this order), or the one that makes all of them.
        output: the module that reads the heads.
        packing: "separate" modules; one whose rows are "stacked" [all q | all k | all v]; or one whose rows are
            "grouped" by key/value group, each with its queries, key and value.
        transposed: weights are stored [in, out] (GPT-2's Conv1D).
    """

    inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "o_proj"
    packing: Packing = "separate"
    transposed: bool = False


@dataclass(frozen=True)
class Architecture:
    """A model class.

    Attributes:
        attention, mlp: names of a decoder layer's two branches.
        norms: the layer's own norms -> the block that each belongs to: the one that it feeds or, for post-norms,
            follows. Where no norm of the MLP's is there, attention's feeds both blocks and is a submodule of its own.
        final_norm: the norm before the output projection, under the base model.
        projections: the attention branch's heads.
        renamed: names of mergekit's plan that differ from transformers', in some of its versions (`Skeleton.renamed`).
    """

    attention: str = "self_attn"
    mlp: str = "mlp"
    norms: tuple[tuple[str, Block], ...] = _PRE_NORMS
    final_norm: str = "norm"
    projections: Projections = Projections()
    renamed: tuple[tuple[str, str], ...] = ()

    def branch(self, block: Block) -> str:
        """The name of a block's branch in the layer."""
        return self.attention if block == "attention" else self.mlp


_LLAMA = Architecture()
_SANDWICH = Architecture(
    norms=(*_PRE_NORMS[:1], ("post_attention_layernorm", "attention"), ("pre_feedforward_layernorm", "mlp"),
           ("post_feedforward_layernorm", "mlp"))
)  # fmt: skip
ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "Gemma2ForCausalLM": _SANDWICH,
    "Gemma3ForCausalLM": _SANDWICH,
    "Phi3ForCausalLM": Architecture(projections=Projections(("qkv_proj",), packing="stacked")),
    "Olmo2ForCausalLM": Architecture(
        norms=(("post_attention_layernorm", "attention"), ("post_feedforward_layernorm", "mlp"))
    ),
    "StableLmForCausalLM": _LLAMA,
    "GraniteForCausalLM": _LLAMA,
    "CohereForCausalLM": _LLAMA,
    "GPTNeoXForCausalLM": Architecture(
        attention="attention",
        final_norm="final_layer_norm",
        projections=Projections(("query_key_value",), "dense", "grouped"),
        renamed=(("embed_out.weight", "lm_head.weight"),),
    ),
    "GPT2LMHeadModel": Architecture(
        attention="attn",
        norms=(("ln_1", "attention"), ("ln_2", "mlp")),
        final_norm="ln_f",
        projections=Projections(("c_attn",), "c_proj", "stacked", transposed=True),
    ),
    "FalconForCausalLM": Architecture(
        attention="self_attention",
        norms=(*_PRE_NORMS, ("ln_attn", "attention"), ("ln_mlp", "mlp")),
        final_norm="ln_f",
        projections=Projections(("query_key_value",), "dense", "grouped"),
    ),
    "MixtralForCausalLM": _LLAMA,
    "Qwen2MoeForCausalLM": _LLAMA,
    "Qwen3MoeForCausalLM": _LLAMA,
}


@dataclass(frozen=True)
class HeadLayout:
    """Sizes of an attention branch: key/value groups, query heads in each, and features of a head."""

    groups: int
    queries: int
    width: int


def architecture(class_names: Sequence[str] | None, model: str) -> Architecture:
    """The entry for a config's `architectures`.

    Raises:
        ModelError: the class is not supported; the message lists those that are.
    """
    name = class_names[0] if class_names else "none"
    if name not in ARCHITECTURES:
        raise ModelError(
            f"architecture {show(name)} of {show(model)} is not supported; supported are {listing(ARCHITECTURES, 40)}"
        )
    return ARCHITECTURES[name]


def head_layout(config: Any) -> HeadLayout:
    """Heads of a config, by key/value group (a head of its own without grouped-query attention)."""
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    groups = getattr(config, "num_key_value_heads", None) or heads
    if config.model_type == "falcon":  # its groups hide behind two flags
        groups = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else heads
    return HeadLayout(int(groups), heads // int(groups), width)
