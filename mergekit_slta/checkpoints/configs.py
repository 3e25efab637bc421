"""Read the models' configs, check them, and compare them with the base's.

Scope: `config.json`. No weights are read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_slta.checkpoints.adapter_base import check_base
from mergekit_slta.checkpoints.hub import adapter_folder, is_local
from mergekit_slta.checkpoints.hub_errors import hub_problem
from mergekit_slta.checkpoints.lora_adapter import merge_reason, read_adapter
from mergekit_slta.checkpoints.vocabulary import vocabulary_advice
from mergekit_slta.checkpoints.weight_files import refuse_embedded_adapter, refuse_lone_adapter, refuse_pointer
from mergekit_slta.errors import ModelError, listing, path_hint, show
from mergekit_slta.libraries.transformers import causal_lm_class
from mergekit_slta.models.architectures import class_name
from mergekit_slta.recipe.recipe import Recipe

LOG = logging.getLogger(__name__)
_MUST_MATCH = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
"""Config keys that determine tensor shapes. Every model must have the base's value."""
_MAY_DIFFER = frozenset(
    # checked elsewhere, or the output's own
    "_name_or_path name_or_path architectures model_type dtype torch_dtype vocab_size tie_word_embeddings auto_map "
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class quantization_config "
    "transformers_weights "
    # of training
    "attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop resid_dropout embd_dropout dropout "
    "classifier_dropout initializer_range router_aux_loss_coef router_jitter_noise output_router_logits "
    "gradient_checkpointing problem_type "
    # of the implementation, or of other heads
    "use_cache attn_implementation pretraining_tp chunk_size_feed_forward return_dict output_attentions "
    "output_hidden_states is_encoder_decoder id2label label2id num_labels task_specific_params finetuning_task "
    "torchscript transformers_version use_bfloat16 model_max_length "
    # of generation
    "max_length min_length max_new_tokens do_sample num_beams temperature top_k top_p typical_p repetition_penalty "
    "length_penalty no_repeat_ngram_size early_stopping num_return_sequences suppress_tokens".split()
)
"""Config keys that do not change the forward pass of a merge, or that are checked elsewhere. So are all that start with
an underscore or `unsloth`."""


def read_configs(recipe: Recipe, options: MergeOptions) -> tuple[Recipe, dict[ModelReference, PretrainedConfig]]:
    """Read the config of every model and check that it fits the base's.

    Returns:
        The recipe, in which a model whose config does not name exactly one class as transformers spells it has
        mergekit's `override_architecture`; and model -> config, in the recipe's order, base first.

    Raises:
        ModelError: a config cannot be read, the architecture is not supported or differs from the base's, sizes differ
            from the base's, or an adapter needs a merged copy on disk and there is no `--lora-merge-cache`.
    """
    read = {model: _read_config(model, recipe, options) for model in recipe.models}
    changes = {}
    for model, config in read.items():
        name = class_name(config.architectures, causal_lm_class(config.model_type))
        if name is not None and config.architectures != [name]:
            changes[model] = model.model_copy(update={"override_architecture": name})
            config.architectures = [name]
    recipe = recipe.replaced(changes)
    configs = {changes.get(model, model): config for model, config in read.items()}
    base = configs[recipe.base]
    same_vocabulary = not (
        recipe.config.tokenizer or recipe.config.tokenizer_source or options.unsafe_truncate_embeddings
    )
    for model, config in configs.items():
        name = show(recipe.names[model])
        own, expected_class = config.architectures or ["None"], base.architectures or ["None"]
        if own != expected_class and not _same_language_model(config, base):
            raise ModelError(
                f"{name} is a {show(own[0])}, the base a {show(expected_class[0])}: "
                "all models of a merge need the same architecture",
                code="differing-architectures",
            )
        for key in _MUST_MATCH:
            found, expected = (getattr(one.get_text_config(), key, None) for one in (config, base))
            if found != expected:
                raise ModelError(
                    f"{name} has {key} {show(found)}, the base {show(expected)}: "
                    "the experts must be fine-tuned from this very base",
                    code="differing-sizes",
                )
        sizes = [one.get_text_config().vocab_size for one in (config, base)]
        if same_vocabulary and sizes[0] != sizes[1]:
            raise ModelError(
                f"{name} has vocab_size {show(sizes[0])}, the base {show(sizes[1])}: "
                f"{vocabulary_advice(recipe, base, options)}",
                code="differing-vocabularies",
            )
    _warn_of_differing_configs(configs, recipe.names)
    return recipe, configs


def _same_language_model(config: PretrainedConfig, base: PretrainedConfig) -> bool:
    """Whether one model is the language model of the other, which also has a vision tower or the like."""
    texts = [one.get_text_config() for one in (config, base)]
    is_part = [text is not one for text, one in zip(texts, (config, base), strict=True)]
    return any(is_part) and texts[0].model_type == texts[1].model_type


def _read_config(model: ModelReference, recipe: Recipe, options: MergeOptions) -> PretrainedConfig:
    name = show(recipe.names[model])
    if os.path.isdir(recipe.names[model]) and not os.path.isdir(model.model.path):
        raise ModelError(
            f"mergekit reads `@` and `+` in {name} as a revision and an adapter: rename the folder",
            code="missing-model",
        )
    adapter = read_adapter(model.lora) if model.lora else None
    path = model.model.path
    refuse_embedded_adapter(model, recipe.names[model])
    try:
        config = model.config(trust_remote_code=options.trust_remote_code)
    except Exception as error:  # missing folder, no config.json, unknown model type, the Hub's errors
        if not is_local(model.model):
            if problem := hub_problem(model.model, error):
                raise problem from error
            path = adapter_folder(model.model) or path
        refuse_pointer(os.path.join(path, "config.json"), recipe.names[model])
        if not os.path.isfile(os.path.join(path, "config.json")):
            refuse_lone_adapter(path, recipe.names[model])
        if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not os.path.isdir(path):
            raise ModelError(
                f"there is no model folder {name} {path_hint(path)}: check the path", code="missing-model"
            ) from error
        raise ModelError(
            f"cannot read the config of {name}: {show(error)}; check the path or Hub id", code="unreadable-config"
        ) from error
    if adapter is not None:
        check_base(adapter, path, config, recipe.names[model])
        reason = "it is the base" if model == recipe.base else merge_reason(adapter)
        if reason and not options.lora_merge_cache:
            raise ModelError(
                f"the adapter {name} can only be merged into a full copy on disk ({show(reason)}): "
                "add --lora-merge-cache DIR",
                code="adapter-needs-copy",
            )
    return config


def _warn_of_differing_configs(configs: Mapping[ModelReference, PretrainedConfig], names: Mapping[Any, str]) -> None:
    """Warn of config keys that differ: the merged model runs with the base's config, which may not suit an expert."""
    models = list(configs)
    base = configs[models[0]].to_dict()
    for model in models[1:]:
        other = configs[model].to_dict()
        keys = sorted(
            key
            for key in (base.keys() | other.keys()) - _MAY_DIFFER
            if base.get(key) != other.get(key) and not key.startswith(("_", "unsloth"))
        )
        if keys:
            LOG.warning("the config of %s has other %s; the base's is used", show(names[model]), listing(keys))


def ties_embeddings(config: PretrainedConfig) -> bool:
    """Whether the config says that the output projection is the embedding table."""
    return bool(getattr(config, "tie_word_embeddings", False))


def stored_settings(model: ModelReference) -> dict[str, Any]:
    """Read a checkpoint's `config.json` without the defaults that transformers adds when it loads the file.

    Keys that start with `_` and the version of transformers are left out: they do not describe the model.
    """
    settings, _ = PretrainedConfig.get_config_dict(model.model.path, revision=model.model.revision)
    if model.override_architecture:
        settings["architectures"] = [model.override_architecture]
    return {key: value for key, value in settings.items() if not key.startswith(("_", "transformers_version"))}
