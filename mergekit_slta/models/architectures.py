"""The table of supported model classes.

Scope: names of modules, packing of heads, layout of weights. Everything else is found by running the model's own code
(`skeleton.py`). To support a new architecture, add an entry to `ARCHITECTURES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mergekit_slta.errors import ModelError, listing, show

Block = Literal["attention", "mlp"]
Packing = Literal["separate", "stacked", "grouped"]
_PRE_NORMS: tuple[tuple[str, Block], ...] = (("input_layernorm", "attention"), ("post_attention_layernorm", "mlp"))


@dataclass(frozen=True)
class Projections:
    """The projections of an attention block, and the layout of heads in them.

    Attributes:
        inputs: the modules that project to queries, keys and values (in this order), or the one module for all three.
        output: the output projection of the heads.
        packing: "separate": three modules; "stacked": one module with rows [all q | all k | all v]; "grouped": one
            module with rows by key/value group, in each group [queries | key | value].
    """

    inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "o_proj"
    packing: Packing = "separate"


@dataclass(frozen=True)
class HeadLayout:
    """Sizes of an attention block: number of key/value groups, query heads per group, and features per head."""

    groups: int
    queries: int
    width: int


def _key_value_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _falcon_key_value_heads(config: Any) -> int:
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


@dataclass(frozen=True)
class Architecture:
    """A model class.

    Attributes:
        attention, mlp: names of a decoder layer's two blocks.
        norms: (name of a layer's norm, the block that it belongs to). A pre-norm belongs to the block after it, a
            post-norm to the block before it. If a layer has none of the MLP's norms, its one norm feeds both blocks
            and is a submodule of its own.
        final_norm: name of the norm before the output projection, in the base model.
        projections: the attention block's projections.
        key_value_heads: config -> number of key/value heads.
        transposed: whether linear layers store their weights as [in, out] (transformers' Conv1D).
        renamed: (name in mergekit's plan, name in transformers) of parameters whose name differs in some version of
            transformers.
    """

    attention: str = "self_attn"
    mlp: str = "mlp"
    norms: tuple[tuple[str, Block], ...] = _PRE_NORMS
    final_norm: str = "norm"
    projections: Projections = Projections()
    key_value_heads: Callable[[Any], int] = _key_value_heads
    transposed: bool = False
    renamed: tuple[tuple[str, str], ...] = ()

    def block_name(self, block: Block) -> str:
        """The name of a block's module in the layer."""
        return self.attention if block == "attention" else self.mlp

    def head_layout(self, config: Any) -> HeadLayout:
        """Sizes of the heads from a config. Without grouped-query attention each head is its own group."""
        heads = int(config.num_attention_heads)
        groups = self.key_value_heads(config)
        width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        return HeadLayout(groups, heads // groups, width)


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
        projections=Projections(("c_attn",), "c_proj", "stacked"),
        transposed=True,
    ),
    "FalconForCausalLM": Architecture(
        attention="self_attention",
        norms=(*_PRE_NORMS, ("ln_attn", "attention"), ("ln_mlp", "mlp")),
        final_norm="ln_f",
        projections=Projections(("query_key_value",), "dense", "grouped"),
        key_value_heads=_falcon_key_value_heads,
    ),
    "MixtralForCausalLM": _LLAMA,
    "Qwen2MoeForCausalLM": _LLAMA,
    "Qwen3MoeForCausalLM": _LLAMA,
}
ATTENTION_NAMES = frozenset(entry.attention for entry in ARCHITECTURES.values())
"""Names of attention blocks in the layers of all supported classes."""
BASE_MODEL_NAMES = ("model", "transformer")
"""Prefixes that parameter names lack in checkpoints saved without the output head (GPT-2 on the Hub)."""
OUTPUT_PROJECTION = "lm_head"
"""The output projection's name in transformers."""


_SPELLINGS = {"LLaMaForCausalLM": "LlamaForCausalLM"}
"""Class names as the first conversion scripts wrote them."""


def class_name(class_names: Sequence[str] | None, own: str | None) -> str | None:
    """The class that a config means.

    Args:
        class_names: the config's `architectures`: usually one name, but there may be several or none.
        own: the class that transformers makes for the config's `model_type`, whatever `architectures` says.

    Returns:
        The one name, or `own` if there is none or it is one of several; else the first.
    """
    names = [_SPELLINGS.get(name, name) for name in class_names or ()]
    if len(names) == 1:
        return names[0]
    return own if not names or own in names else names[0]


def architecture(class_names: Sequence[str] | None, model: str) -> Architecture:
    """Look up the model class of a config.

    Args:
        class_names: the config's `architectures`.
        model: the model's name, for the message.

    Raises:
        ModelError: the class is not supported; the message lists the supported ones.
    """
    name = class_names[0] if class_names else "none"
    if name not in ARCHITECTURES:
        raise ModelError(
            f"architecture {show(name)} of {show(model)} is not supported; supported are {listing(ARCHITECTURES, 40)}",
            code="unsupported-architecture",
        )
    return ARCHITECTURES[name]


def is_norm(module: str) -> bool:
    """Whether a module's path names a norm: `input_layernorm`, GPT-2's `ln_1`, StableLM's `q_layernorm.norms.0`."""
    parents, _, last = module.rpartition(".")
    return "norm" in last or last.startswith("ln_") or parents.rpartition(".")[2] == "norms"
