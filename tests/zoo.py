"""Tiny configurations of every supported architecture, and what becomes of each.

`python tests/zoo.py` prints the README's table from this list.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import transformers as t

GRANULARITIES = ("model", "layer", "attn_mlp", "head_mlp", "linear")


@dataclass(frozen=True)
class Species:
    """A configuration.

    Attributes:
        title: for the table.
        kind: config class; the model class is what AutoModelForCausalLM makes of it.
        settings: beside the common ones.
        refused: what the merge is refused with, where mergekit's plan cannot represent the checkpoint as transformers
            5 saves it; the alphas are computed all the same.
        parallel: attention and MLP both read the layer's input.
        shared: a norm that feeds both blocks.
        full_qk_norm: q/k norms run over all heads together.
    """

    title: str
    kind: type
    settings: dict = field(default_factory=dict)
    refused: str | None = None
    parallel: bool = False
    shared: str | None = None
    full_qk_norm: bool = False


COMMON = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
GATED = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
MOE = {"num_experts_per_tok": 2, "head_dim": 8}
DROPS = "mergekit would drop"
LACKS = "mergekit plans to merge"

ZOO: dict[str, Species] = {
    "llama": Species("Llama", t.LlamaConfig, GATED),
    "llama_bias": Species("Llama with biases", t.LlamaConfig, {**GATED, "attention_bias": True}, refused=DROPS),
    "mistral": Species("Mistral", t.MistralConfig, {**GATED, "sliding_window": 8, "head_dim": 8}),
    "qwen2": Species("Qwen2, Qwen2.5", t.Qwen2Config, GATED),
    "qwen3": Species("Qwen3", t.Qwen3Config, {**GATED, "head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": Species("Gemma 2", t.Gemma2Config, {**GATED, "head_dim": 8, "sliding_window": 8,
                                                 "tie_word_embeddings": True, "query_pre_attn_scalar": 8}),
    "gemma3": Species("Gemma 3 (text)", t.Gemma3TextConfig, {**GATED, "head_dim": 8, "sliding_window": 8,
                                                            "tie_word_embeddings": True, "query_pre_attn_scalar": 8}),
    "phi3": Species("Phi-3", t.Phi3Config, GATED),
    "phi3_tied": Species("Phi-3, tied", t.Phi3Config, {**GATED, "tie_word_embeddings": True}, refused=LACKS),
    "olmo2": Species("OLMo 2", t.Olmo2Config, GATED, full_qk_norm=True),
    "stablelm": Species("StableLM", t.StableLmConfig, {**GATED, "use_qkv_bias": True}),
    "stablelm_parallel": Species("StableLM, parallel", t.StableLmConfig, {**GATED, "use_parallel_residual": True},
                                 refused=LACKS, parallel=True, shared="input_layernorm"),
    "granite": Species("Granite", t.GraniteConfig, {**GATED, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "cohere": Species("Cohere with q/k norm", t.CohereConfig, {**GATED, "use_qk_norm": True,
                                                               "tie_word_embeddings": True},
                      parallel=True, shared="input_layernorm"),
    "cohere_plain": Species("Cohere without q/k norm", t.CohereConfig, {**GATED, "tie_word_embeddings": True},
                            refused=LACKS, parallel=True, shared="input_layernorm"),
    "gpt_neox": Species("GPT-NeoX (saved by transformers 5)", t.GPTNeoXConfig,
                        {**COMMON, "intermediate_size": 48, "max_position_embeddings": 128}, refused=LACKS,
                        parallel=True),
    "gpt_neox_sequential": Species("GPT-NeoX, sequential (saved by transformers 5)", t.GPTNeoXConfig,
                                   {**COMMON, "intermediate_size": 48, "max_position_embeddings": 128,
                                    "use_parallel_residual": False}, refused=LACKS),
    "gpt2": Species("GPT-2", t.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 320,
                                            "n_positions": 128, "bos_token_id": 0, "eos_token_id": 1}),
    "falcon": Species("Falcon, two norms (`ln_attn`)", t.FalconConfig,
                      {**COMMON, "new_decoder_architecture": True, "num_kv_heads": 2}, parallel=True),
    "falcon_7b": Species("Falcon, one norm, multi-query", t.FalconConfig, {**COMMON, "multi_query": True},
                         refused=LACKS, parallel=True, shared="input_layernorm"),
    "mixtral": Species("Mixtral", t.MixtralConfig, {**GATED, **MOE, "num_local_experts": 4}),
    "qwen2_moe": Species("Qwen2-MoE", t.Qwen2MoeConfig, {**GATED, "num_experts": 4, "num_experts_per_tok": 2,
                                                         "moe_intermediate_size": 16,
                                                         "shared_expert_intermediate_size": 16}),
    "qwen3_moe": Species("Qwen3-MoE", t.Qwen3MoeConfig, {**GATED, **MOE, "num_experts": 4,
                                                         "moe_intermediate_size": 16}),
    "qwen3_moe_dense": Species("Qwen3-MoE with dense layers", t.Qwen3MoeConfig,
                               {**GATED, **MOE, "num_experts": 4, "moe_intermediate_size": 16,
                                "mlp_only_layers": [0]}, refused=LACKS),
}  # fmt: skip


def table() -> str:
    """The README's table."""
    lines = [f"| architecture | {' | '.join(f'`{name}`' for name in GRANULARITIES)} | merge by mergekit |"]
    lines.append("| --- |" + " :-: |" * len(GRANULARITIES) + " --- |")
    for species in ZOO.values():
        verdict = f'refused: "{species.refused} …"' if species.refused else "yes"
        lines.append(f"| {species.title} |" + " ✓ |" * len(GRANULARITIES) + f" {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
