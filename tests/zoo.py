"""Tiny configurations of every decoder that mergekit or people merge, and by hand what their layers are made of.

`python tests/zoo.py` prints the README's table from this list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby

import transformers as t

GRANULARITIES = ("model", "layer", "attn_mlp", "head_mlp", "linear")


@dataclass(frozen=True)
class Heads:
    """Where the heads of an attention block come together: `groups` key/value groups, each with `queries` heads."""

    output: str = "self_attn.o_proj"
    groups: int = 2
    queries: int = 2


@dataclass(frozen=True)
class Layer:
    """What a decoder layer is made of, as its code says. Paths are within the layer; the default is Llama's.

    Attributes:
        mixers, mlps: modules of the attention block, and of the MLP block.
        norms: norm -> its block; None: it feeds both.
        entry: the first module of the MLP block that is called, or its norm.
        parallel: both blocks read the layer's input.
        heads: None if the attention block is not divided.
        own: parameters of the layer itself, which belong to its MLP block.
    """

    mixers: tuple[str, ...] = ("self_attn",)
    mlps: tuple[str, ...] = ("mlp",)
    norms: Mapping[str, str | None] = field(
        default_factory=lambda: {"input_layernorm": "attention", "post_attention_layernorm": "mlp"}
    )
    entry: str = "post_attention_layernorm"
    parallel: bool = False
    heads: Heads | None = Heads()
    own: tuple[str, ...] = ()


@dataclass(frozen=True)
class Species:
    """A model class with a configuration.

    Attributes:
        family: for the table.
        model: name of the class.
        kind: class of its config.
        settings: the config's values.
        layers: its layers, in their order; one stands for all.
        path: path of the list of layers.
        head: path of the output projection.
        carried: beginnings of the names of what text does not run through.
        note: for the table, if the class has several species.
        refused: why it cannot be merged.
        full_qk_norm: q/k norms run over all heads together.
    """

    family: str
    model: str
    kind: type
    settings: dict
    layers: tuple[Layer, ...] = (Layer(),)
    path: str = "model.layers"
    head: str = "lm_head"
    carried: tuple[str, ...] = ()
    note: str = ""
    refused: str | None = None
    full_qk_norm: bool = False

    def layer(self, index: int) -> Layer:
        return self.layers[index % len(self.layers)]


PLAIN = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
GATED = {**PLAIN, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
SIZED = {**GATED, "head_dim": 8}
TIED = {**SIZED, "tie_word_embeddings": True}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 320, "n_positions": 128, "bos_token_id": 0,
       "eos_token_id": 1}  # fmt: skip
NEOX = {**PLAIN, "intermediate_size": 48, "max_position_embeddings": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MAMBA = {"mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
INTERLEAVED = {"rope_parameters": {**MROPE["rope_parameters"], "mrope_interleaved": True}}
GEMMA4 = {**TIED, **WINDOWS, "global_head_dim": 8, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
LLAMA4 = {**SIZED, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1, "moe_layers": [1],
          "attention_chunk_size": 8, "no_rope_layers": [1, 0]}  # fmt: skip

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
          "image_size": 28, "patch_size": 14}  # fmt: skip
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "patch_size": 4,
               "out_hidden_size": 32, "num_position_embeddings": 16}  # fmt: skip
DEEPSTACK = {**QWEN_VISION, "deepstack_visual_indexes": [0]}
QWEN_TOKENS = {"image_token_id": 310, "video_token_id": 311, "vision_start_token_id": 312, "vision_end_token_id": 313}
GEMMA_TOKENS = {"boi_token_index": 311, "eoi_token_index": 312, "image_token_index": 310}

LLAMA = Layer()
WHOLE = replace(LLAMA, heads=None)
SHARED = Layer(norms={"input_layernorm": None}, entry="mlp", parallel=True)
POST_NORMS = Layer(norms={"post_attention_layernorm": "attention", "post_feedforward_layernorm": "mlp"}, entry="mlp")
SANDWICH = Layer(
    norms={"input_layernorm": "attention", "post_attention_layernorm": "attention",
           "pre_feedforward_layernorm": "mlp", "post_feedforward_layernorm": "mlp"},
    entry="pre_feedforward_layernorm",
)  # fmt: skip
GEMMA4_LAYER = replace(SANDWICH, own=("layer_scalar",))
GEMMA4_MOE = replace(
    GEMMA4_LAYER,
    mlps=("mlp", "router", "experts"),
    norms={**SANDWICH.norms, "post_feedforward_layernorm_1": "mlp", "post_feedforward_layernorm_2": "mlp",
           "pre_feedforward_layernorm_2": "mlp"},
)  # fmt: skip
AFMOE = replace(
    SANDWICH,
    norms={"input_layernorm": "attention", "post_attention_layernorm": "attention", "pre_mlp_layernorm": "mlp",
           "post_mlp_layernorm": "mlp"},
    entry="pre_mlp_layernorm",
)  # fmt: skip
GLM4 = replace(LLAMA, norms={**LLAMA.norms, "post_self_attn_layernorm": "attention", "post_mlp_layernorm": "mlp"})
LN = Layer(("attn",), ("mlp",), {"ln_1": "attention", "ln_2": "mlp"}, "ln_2", heads=Heads("attn.c_proj", 4, 1))
NEOX_HEADS = Heads("attention.dense", 4, 1)
LINEAR_ATTENTION = replace(WHOLE, mixers=("linear_attn",))
FEED_FORWARD = replace(LLAMA, mlps=("feed_forward",))
PRE_FF = replace(
    FEED_FORWARD, norms={"input_layernorm": "attention", "pre_ff_layernorm": "mlp"}, entry="pre_ff_layernorm"
)
PRE_FF_MAMBA = replace(PRE_FF, mixers=("mamba",), heads=None)
LFM2 = replace(
    FEED_FORWARD, norms={"operator_norm": "attention", "ffn_norm": "mlp"}, entry="ffn_norm",
    heads=Heads("self_attn.out_proj"),
)  # fmt: skip
SPARSE = replace(LLAMA, mlps=("block_sparse_moe",))
GRANITE_HYBRID = replace(LLAMA, mlps=("block_sparse_moe", "shared_mlp"))
ONE_MIXER = Layer(("mixer",), (), {"norm": "attention"}, "", heads=None)
ONE_MLP = Layer((), ("mixer",), {"norm": "mlp"}, "", heads=None)
FALCON = Layer(("self_attention",), norms={"ln_attn": "attention", "ln_mlp": "mlp"}, entry="ln_mlp", parallel=True,
               heads=Heads("self_attention.dense"))  # fmt: skip
OPT = Layer(mlps=("fc1", "fc2"), norms={"self_attn_layer_norm": "attention", "final_layer_norm": "mlp"},
            entry="final_layer_norm", heads=Heads("self_attn.out_proj", 4, 1))  # fmt: skip

QWEN_VL = {"path": "model.language_model.layers", "carried": ("model.visual.",)}
TOWER = {"path": "model.language_model.layers", "carried": ("model.vision_tower.", "model.multi_modal_projector.")}


def of(family: str, kind: type, settings: dict, *layers: Layer, model: str = "", **facts: object) -> Species:
    """A species whose class has the name of its config's."""
    name = model or kind.__name__.removesuffix("Config").removesuffix("Text") + "ForCausalLM"
    return Species(family, name, kind, settings, layers or (LLAMA,), **facts)  # type: ignore[arg-type]


def seeing(family: str, kind: type, text: dict, vision: dict, *layers: Layer, **facts: object) -> Species:
    """A species with a vision tower; facts in lower case are the species', `config` the other values of its config."""
    name = kind.__name__.removesuffix("Config") + "ForConditionalGeneration"
    tied = {"tie_word_embeddings": text["tie_word_embeddings"]}
    settings = {"text_config": text, "vision_config": vision, **tied, **facts.pop("config")}  # type: ignore[dict-item]
    return Species(family, name, kind, settings, layers or (LLAMA,), **facts)  # type: ignore[arg-type]


ZOO: dict[str, Species] = {
    "llama": of("Llama", t.LlamaConfig, GATED),
    "llama_bias": of("Llama", t.LlamaConfig, {**GATED, "attention_bias": True, "mlp_bias": True}, note="with biases"),
    "llama4": of("Llama", t.Llama4TextConfig, LLAMA4, FEED_FORWARD),
    "llama4_vl": seeing("Llama", t.Llama4Config, LLAMA4,
                        {**VISION, "intermediate_size": 64, "projector_input_dim": 32, "projector_output_dim": 32,
                         "vision_output_dim": 32, "pixel_shuffle_ratio": 0.5}, FEED_FORWARD,
                        path="language_model.model.layers", head="language_model.lm_head",
                        carried=("vision_model.", "multi_modal_projector."), config=GEMMA_TOKENS),
    "mistral": of("Mistral", t.MistralConfig, {**SIZED, "sliding_window": 8}),
    "mixtral": of("Mistral", t.MixtralConfig, {**SIZED, **LOCAL}),
    "mistral3": seeing("Mistral", t.Mistral3Config, {"model_type": "mistral", **SIZED},
                       {"model_type": "pixtral", **VISION, "head_dim": 8}, **TOWER,
                       config={"image_token_index": 310}),
    "qwen2": of("Qwen", t.Qwen2Config, GATED),
    "qwen3": of("Qwen", t.Qwen3Config, TIED),
    "qwen2_moe": of("Qwen", t.Qwen2MoeConfig, {**GATED, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": of("Qwen", t.Qwen3MoeConfig, {**SIZED, **EXPERTS}),
    "qwen3_moe_dense": of("Qwen", t.Qwen3MoeConfig, {**SIZED, **EXPERTS, "mlp_only_layers": [0]},
                          note="with dense layers"),
    "qwen2_vl": seeing("Qwen", t.Qwen2VLConfig, {**GATED, **MROPE, "tie_word_embeddings": True},
                       {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4,
                        "mlp_ratio": 1}, **QWEN_VL, config=QWEN_TOKENS),
    "qwen2_5_vl": seeing("Qwen", t.Qwen2_5_VLConfig, {**GATED, **MROPE},
                         {"depth": 1, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 32,
                          "num_heads": 4, "patch_size": 4, "fullatt_block_indexes": [0]}, **QWEN_VL,
                         config=QWEN_TOKENS),
    "qwen3_vl": seeing("Qwen", t.Qwen3VLConfig, {**SIZED, **INTERLEAVED}, DEEPSTACK, **QWEN_VL, config=QWEN_TOKENS),
    "qwen3_vl_moe": seeing("Qwen", t.Qwen3VLMoeConfig, {**SIZED, **INTERLEAVED, **EXPERTS}, DEEPSTACK, **QWEN_VL,
                           config=QWEN_TOKENS),
    "qwen3_next": of("Qwen", t.Qwen3NextConfig, {**SIZED, **DELTA, **EXPERTS, "shared_expert_intermediate_size": 16},
                     LINEAR_ATTENTION, WHOLE),
    "qwen3_5_text": of("Qwen", t.Qwen3_5TextConfig, {**TIED, **DELTA, **INTERLEAVED}, LINEAR_ATTENTION, WHOLE),
    "qwen3_5": seeing("Qwen", t.Qwen3_5Config, {**SIZED, **DELTA, **INTERLEAVED}, QWEN_VISION, LINEAR_ATTENTION,
                      WHOLE, **QWEN_VL, config=QWEN_TOKENS),
    "qwen3_5_moe_text": of("Qwen", t.Qwen3_5MoeTextConfig, {**SIZED, **DELTA, **INTERLEAVED, **EXPERTS,
                                                            "shared_expert_intermediate_size": 16},
                           LINEAR_ATTENTION, WHOLE),
    "qwen3_5_moe": seeing("Qwen", t.Qwen3_5MoeConfig, {**SIZED, **DELTA, **INTERLEAVED, **EXPERTS,
                                                      "shared_expert_intermediate_size": 16}, QWEN_VISION,
                          LINEAR_ATTENTION, WHOLE, **QWEN_VL, config=QWEN_TOKENS),
    "gemma": of("Gemma", t.GemmaConfig, {**TIED, "attention_bias": True}),
    "gemma2": of("Gemma", t.Gemma2Config, {**TIED, "sliding_window": 8, "query_pre_attn_scalar": 8}, SANDWICH),
    "gemma3": of("Gemma", t.Gemma3TextConfig, {**TIED, **WINDOWS, "query_pre_attn_scalar": 8}, SANDWICH),
    "gemma3_vl": seeing("Gemma", t.Gemma3Config, {**TIED, **WINDOWS, "query_pre_attn_scalar": 8}, VISION, SANDWICH,
                        **TOWER, config={**GEMMA_TOKENS, "mm_tokens_per_image": 4}),
    "gemma4": of("Gemma", t.Gemma4TextConfig, GEMMA4, GEMMA4_LAYER),
    "gemma4_moe": of("Gemma", t.Gemma4TextConfig, {**GEMMA4, "enable_moe_block": True, "num_experts": 4,
                                                   "top_k_experts": 2, "moe_intermediate_size": 16},
                     GEMMA4_MOE, note="with experts"),
    "gemma4_vl": seeing("Gemma", t.Gemma4Config, {**GEMMA4, "pad_token_id": 0},
                        {**VISION, "head_dim": 8, "num_key_value_heads": 4, "position_embedding_size": 16},
                        GEMMA4_LAYER,
                        path="model.language_model.layers", carried=("model.vision_tower.", "model.embed_vision."),
                        config={"audio_config": None, "image_token_id": 310, "boi_token_id": 311,
                                "eoi_token_id": 312}),
    "gemma4_e": of("Gemma", t.Gemma4TextConfig, {**GEMMA4, "hidden_size_per_layer_input": 8,
                                                 "vocab_size_per_layer_input": 320, "num_kv_shared_layers": 2,
                                                 "num_hidden_layers": 4,
                                                 "layer_types": 2 * WINDOWS["layer_types"]},
                   GEMMA4_LAYER, note="E2B, E4B", refused="per-layer embeddings"),
    "phi": of("Phi", t.PhiConfig, {**GATED, "partial_rotary_factor": 0.5},
              replace(SHARED, heads=Heads("self_attn.dense"))),
    "phi3": of("Phi", t.Phi3Config, GATED),
    "phi3_tied": of("Phi", t.Phi3Config, {**GATED, "tie_word_embeddings": True}, note="tied"),
    "olmo": of("OLMo", t.OlmoConfig, GATED),  # its norms have no tensors; so have nanochat's
    "olmo2": of("OLMo", t.Olmo2Config, {**GATED, "attention_bias": True}, POST_NORMS, full_qk_norm=True),
    "olmo3": of("OLMo", t.Olmo3Config, {**GATED, **WINDOWS}, POST_NORMS, full_qk_norm=True),
    "glm": of("GLM", t.GlmConfig, {**SIZED, "attention_bias": True}),
    "glm4": of("GLM", t.Glm4Config, {**SIZED, "attention_bias": True}, GLM4),
    "glm4_moe": of("GLM", t.Glm4MoeConfig, {**SIZED, **ROUTED, "attention_bias": True, "use_qk_norm": True}),
    "granite": of("Granite", t.GraniteConfig, {**GATED, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "granite_moe": of("Granite", t.GraniteMoeConfig, {**GATED, **LOCAL}, SPARSE),
    "granite_moe_hybrid": of("Granite", t.GraniteMoeHybridConfig,
                             {**GATED, **LOCAL, **MAMBA, "mamba_n_heads": 8, "mamba_expand": 2,
                              "shared_intermediate_size": 16, "layer_types": ["mamba", "attention"]},
                             replace(GRANITE_HYBRID, mixers=("mamba",), heads=None), GRANITE_HYBRID),
    "granite_hybrid_dense": of("Granite", t.GraniteMoeHybridConfig,
                               {**TIED, **MAMBA, "num_local_experts": 0, "num_experts_per_tok": 0,
                                "mamba_n_heads": 8, "mamba_expand": 2, "shared_intermediate_size": 16,
                                "layer_types": ["mamba", "attention"]},
                               replace(LLAMA, mlps=("shared_mlp",), mixers=("mamba",), heads=None),
                               replace(LLAMA, mlps=("shared_mlp",)), note="without experts"),
    "cohere": of("Cohere", t.CohereConfig, {**GATED, "use_qk_norm": True, "tie_word_embeddings": True}, SHARED,
                 note="with q/k norm"),
    "cohere_plain": of("Cohere", t.CohereConfig, {**GATED, "tie_word_embeddings": True}, SHARED),
    "cohere2": of("Cohere", t.Cohere2Config, {**TIED, **WINDOWS}, SHARED),
    "gpt_oss": of("gpt-oss", t.GptOssConfig, {**SIZED, **LOCAL, **WINDOWS}),
    "deepseek_v3": of("DeepSeek", t.DeepseekV3Config,
                      {**GATED, **ROUTED, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8,
                       "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}, WHOLE),
    "minimax_m2": of("MiniMax", t.MiniMaxM2Config, {**SIZED, **LOCAL}, full_qk_norm=True),
    "smollm3": of("SmolLM", t.SmolLM3Config, {**GATED, "no_rope_layers": [1, 0], "tie_word_embeddings": True}),
    "exaone4": of("EXAONE", t.Exaone4Config, {**GATED, **WINDOWS}, POST_NORMS),
    "seed_oss": of("Seed-OSS", t.SeedOssConfig, SIZED),
    "ernie4_5": of("ERNIE", t.Ernie4_5Config, {**TIED, "use_bias": True}),
    "ernie4_5_moe": of("ERNIE", t.Ernie4_5_MoeConfig,
                       {**SIZED, "moe_intermediate_size": 16, "moe_k": 2, "moe_num_experts": 4,
                        "moe_num_shared_experts": 1, "moe_layer_start_index": 1}),
    "nanochat": of("nanochat", t.NanoChatConfig, SIZED),
    "hunyuan": of("Hunyuan", t.HunYuanDenseV1Config, SIZED),
    "hunyuan_moe": of("Hunyuan", t.HunYuanMoEV1Config,
                      {**SIZED, "num_experts": 4, "moe_topk": [2, 2], "moe_intermediate_size": [16, 16]}),
    "lfm2": of("LFM2", t.Lfm2Config, {**GATED, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8,
                                      "conv_bias": True, "tie_word_embeddings": True},
               replace(LFM2, mixers=("conv",), heads=None), LFM2),
    "lfm2_moe": of("LFM2", t.Lfm2MoeConfig, {**GATED, **EXPERTS, "num_dense_layers": 1, "layer_types":
                                             ["conv", "full_attention"]},
                   replace(LFM2, mixers=("conv",), heads=None), LFM2),
    "apertus": of("Apertus", t.ApertusConfig, SIZED,
                  replace(LLAMA, norms={"attention_layernorm": "attention", "feedforward_layernorm": "mlp"},
                          entry="feedforward_layernorm")),
    "arcee": of("Arcee", t.ArceeConfig, {**SIZED, "attention_bias": True, "mlp_bias": True}),
    "afmoe": of("Arcee", t.AfmoeConfig, {**SIZED, **EXPERTS, **WINDOWS, "num_dense_layers": 1,
                                         "num_shared_experts": 1, "global_attn_every_n_layers": 2}, AFMOE),
    "stablelm": of("StableLM", t.StableLmConfig, {**GATED, "use_qkv_bias": True}),
    "stablelm_parallel": of("StableLM", t.StableLmConfig, {**GATED, "use_parallel_residual": True,
                                                           "qk_layernorm": True}, SHARED, note="parallel"),
    "starcoder2": of("StarCoder", t.Starcoder2Config, {**GATED, "sliding_window": 8}),
    "gpt_bigcode": of("StarCoder", t.GPTBigCodeConfig, GPT, replace(LN, heads=None), path="transformer.h"),
    "falcon": of("Falcon", t.FalconConfig, {**PLAIN, "new_decoder_architecture": True, "num_kv_heads": 2}, FALCON,
                 path="transformer.h", note="40B, Falcon 2"),
    "falcon_7b": of("Falcon", t.FalconConfig, {**PLAIN, "multi_query": True, "bias": True},
                    replace(SHARED, mixers=("self_attention",), heads=Heads("self_attention.dense", 1, 4)),
                    path="transformer.h", note="7B, multi-query"),
    "falcon_h1": of("Falcon", t.FalconH1Config, {**GATED, **MAMBA, "mamba_d_ssm": 32, "mamba_n_heads": 4},
                    replace(PRE_FF, mixers=("mamba", "self_attn"), heads=None)),
    "gpt_neox": of("GPT-NeoX, Pythia", t.GPTNeoXConfig, NEOX,
                   Layer(("attention",), parallel=True, heads=NEOX_HEADS), path="gpt_neox.layers"),
    "gpt_neox_sequential": of("GPT-NeoX, Pythia", t.GPTNeoXConfig, {**NEOX, "use_parallel_residual": False},
                              Layer(("attention",), heads=NEOX_HEADS), path="gpt_neox.layers", note="sequential"),
    "gpt2": of("GPT-2", t.GPT2Config, GPT, LN, model="GPT2LMHeadModel", path="transformer.h"),
    "opt": of("OPT", t.OPTConfig, {**PLAIN, "ffn_dim": 48, "max_position_embeddings": 128, "word_embed_proj_dim": 32},
              OPT, path="model.decoder.layers"),
    "opt_350m": of("OPT", t.OPTConfig,
                   {**PLAIN, "ffn_dim": 48, "max_position_embeddings": 128, "word_embed_proj_dim": 16,
                    "do_layer_norm_before": False},
                   replace(OPT, norms={"self_attn_layer_norm": "mlp", "final_layer_norm": "mlp"},
                           entry="self_attn_layer_norm"), path="model.decoder.layers", note="norms after, 350M"),
    "nemotron": of("Nemotron", t.NemotronConfig, {**SIZED, "attention_bias": True, "mlp_bias": True}),
    "nemotron_h": of("Nemotron", t.NemotronHConfig,
                     {**SIZED, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
                      "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 8,
                      "n_routed_experts": 4, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
                      "num_experts_per_tok": 2},
                     ONE_MIXER, ONE_MLP, replace(ONE_MIXER, heads=Heads("mixer.o_proj")), ONE_MLP),
    "bamba": of("Mamba", t.BambaConfig, {**GATED, **MAMBA, "attn_layer_indices": [1], "mamba_n_heads": 8},
                PRE_FF_MAMBA, PRE_FF),
    "jamba": of("Mamba", t.JambaConfig, {**GATED, "attn_layer_period": 2, "attn_layer_offset": 1,
                                         "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4,
                                         "num_experts_per_tok": 2, "use_mamba_kernels": False, "mamba_d_state": 8,
                                         "mamba_dt_rank": 4}, PRE_FF_MAMBA, PRE_FF),
    "mamba": of("Mamba", t.MambaConfig, {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 320,
                                         "state_size": 8, "time_step_rank": 4, "bos_token_id": 0, "eos_token_id": 1,
                                         "pad_token_id": None, "tie_word_embeddings": False}, ONE_MIXER,
                path="backbone.layers"),
}  # fmt: skip
MERGED = [name for name, species in ZOO.items() if species.refused is None]
TYPICAL = ("llama", "gemma2", "gpt2", "falcon_7b", "mixtral", "granite_moe_hybrid", "qwen3_5")
"""One of each kind, for tests that would take too long with all: plain; post-norms, tied; [in, out] matrices; a norm
that feeds both blocks; experts one by one in the checkpoint; a hybrid with experts fused; a vision tower."""


def heads_of(species: Species) -> str:
    """What `head_mlp` does."""
    divided = [layer.heads is not None for layer in species.layers]
    if not any(divided):
        return "by block"
    return "by head" if all(divided) else "attention by head, other mixers by block"


def table() -> str:
    """The table of docs/models.md: classes of one family and with one answer are a row."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for species in ZOO.values():
        merge = f"no: {species.refused}" if species.refused else "yes"
        names = rows.setdefault((species.family, heads_of(species), merge), [])
        names.append(f"`{species.model}`" + f" ({species.note})" * bool(species.note))
    lines = ["| family | classes | `head_mlp` | merge |", "| --- | --- | --- | --- |"]
    ordered = sorted(rows.items(), key=lambda row: [*dict.fromkeys(s.family for s in ZOO.values())].index(row[0][0]))
    for (family, heads, merge), names in ordered:
        models = [(name, [each.partition(" ")[2] for each in notes]) for name, notes in
                  groupby(names, key=lambda each: each.partition(" ")[0])]  # fmt: skip
        listed = []
        for name, notes in models:
            kinds = [note.strip("()") for note in notes if note]
            listed.append(name + (f" ({'also ' * ('' in notes)}{', '.join(kinds)})" if kinds else ""))
        lines.append(f"| {family} | {', '.join(listed)} | {heads} | {merge} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
