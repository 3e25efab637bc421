"""peft's LoRA adapters: their files, what they add to which weight, and what cannot be said as such a sum.

Scope: config and names, shapes; the matrices themselves are read by `adapters.py`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import safetensors
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from mergekit.common import ModelPath
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from mergekit_slta.errors import ModelError, listing, show

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAMES = ("adapter_model.safetensors", "adapter_model.bin")

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_USED = frozenset(
    "peft_type r lora_alpha use_rslora rank_pattern alpha_pattern fan_in_fan_out bias init_lora_weights "
    "target_modules exclude_modules layers_to_transform layers_pattern".split()
)
# They say where the adapter comes from, or act in training or in the initialization only.
_WITHOUT_EFFECT = frozenset(
    "auto_mapping base_model_name_or_path inference_mode lora_dropout peft_version revision runtime_config task_type "
    "corda_config eva_config loftq_config lora_ga_config megatron_core qalora_group_size".split()
)
_IN_WORDS = {"use_dora": "DoRA", "use_qalora": "QALoRA", "lora_bias": "lora_bias"}
# Other initializations (PiSSA, OLoRA, LoftQ, ...) change the base's weights, and peft repeats that when it loads.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# Classes built of transformers' Conv1D, which stores [in, out]; peft goes by the layer's class, not by the flag.
_CONV1D = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp_decoder", "clvp"))
# Checkpoints saved without their head (the Hub's GPT-2) lack this part of the names; transformers adds it on loading.
_PREFIXES = ("model", "transformer")


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one weight: `scaling * B @ A`.

    Attributes:
        module: the adapted module's path, as the adapter has it.
        a, b: names of the matrices [rank, in] and [out, rank] in the adapter's file.
        shape: (out, in).
        scaling: lora_alpha / rank, or / sqrt(rank) for rsLoRA.
        conv1d: the model is built of layers that store [in, out].
    """

    module: str
    a: str
    b: str
    shape: tuple[int, int]
    scaling: float
    conv1d: bool

    def is_transposed(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a base tensor of this shape stores [in, out].

        Raises:
            ModelError: the product fits it neither way.
        """
        if self.conv1d and shape == self.shape[::-1]:
            return True
        if shape == self.shape:  # also the one nn.Linear among Conv1Ds, the output projection
            return False
        raise ModelError(
            f"the adapter's product for {show(self.module)} is {list(self.shape)}, {show(name)} of its base "
            f"{list(shape)}: the adapter belongs to another base"
        )


@dataclass(frozen=True)
class Adapter:
    """An adapter's settings, and name -> shape of its tensors."""

    name: str
    config_file: str
    weights_file: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    def modules(self) -> dict[str, dict[str, str]]:
        """Adapted module -> "A" and "B" -> name in the file."""
        found: dict[str, dict[str, str]] = {}
        for key in self.shapes:
            if match := _KEY.fullmatch(key):
                found.setdefault(match["module"], {})[match["side"]] = key
        return found


def read_adapter(lora: ModelPath) -> Adapter:
    name = str(lora)
    config_file = _file(lora, (CONFIG_NAME,))
    weights_file = _file(lora, WEIGHTS_NAMES)
    try:
        with open(config_file, encoding="utf-8") as file:
            config = json.load(file)
        if not isinstance(config, dict):
            raise TypeError("it is no JSON object")
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{show(config_file)} cannot be read ({show(error)}): fetch the adapter again") from error
    try:
        shapes = _shapes(weights_file)
    except Exception as error:  # safetensors, torch and pickle each have their own
        raise ModelError(f"{show(weights_file)} cannot be read ({show(error)}): fetch the adapter again") from error
    return Adapter(name, config_file, weights_file, config, shapes)


def _file(lora: ModelPath, names: tuple[str, ...]) -> str:
    error: Exception | None = None
    if os.path.isdir(lora.path):
        paths = [os.path.join(lora.path, name) for name in names]
        if found := next((path for path in paths if os.path.isfile(path)), None):
            return found
    else:
        for name in names:
            try:
                return hf_hub_download(lora.path, name, revision=lora.revision)
            except EntryNotFoundError as missing:  # also what an offline cache lacks
                error = missing
            except Exception as other:  # no such repository, no network, no valid name of one
                error = other
                break
    detail = f" ({show(error)})" if error else ""
    raise ModelError(f"the adapter {show(lora)} has no {names[0]}{detail}: check the path or Hub id") from error


def _shapes(path: str) -> dict[str, tuple[int, ...]]:
    if path.endswith(".safetensors"):
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
    tensors = torch.load(path, map_location="meta", weights_only=True)
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def merge_reason(adapter: Adapter) -> str | None:
    config = adapter.config
    kind = config.get("peft_type")
    if kind != "LORA":
        return f"peft_type: {show(kind, 40)}"
    for key, value in config.items():
        if key in _USED or key in _WITHOUT_EFFECT or not value:
            continue
        if key in _IN_WORDS:
            return _IN_WORDS[key]
        return f"{show(key, 40)}: {listing(value, 4) if isinstance(value, list) else show(value, 80)}"
    if config.get("bias", "none") != "none":
        return f"bias: {show(config['bias'], 40)}"
    start = config.get("init_lora_weights")
    if (start.lower() if isinstance(start, str) else start) not in _PLAIN_INITS:
        return f"init_lora_weights: {show(start, 40)}"
    return _foreign_tensors(adapter)


def _foreign_tensors(adapter: Adapter) -> str | None:
    others = [key for key in adapter.shapes if not _KEY.fullmatch(key) or ".base_layer." in key]
    embeddings = [key for key in others if ".lora_embedding_" in key]
    if embeddings:
        return f"LoRA on embeddings: {listing(embeddings, 2)}"
    if others:
        return f"tensors besides LoRA's: {listing(others, 2)}"
    odd = [key for key, shape in adapter.shapes.items() if len(shape) != 2]
    if odd:
        return f"LoRA on convolutions: {listing(odd, 2)}"
    # peft ignores tensors of modules that the config does not target; not every config tells which they are.
    settings = SimpleNamespace(
        target_modules=adapter.config.get("target_modules"),
        exclude_modules=adapter.config.get("exclude_modules"),
        layers_to_transform=adapter.config.get("layers_to_transform"),
        layers_pattern=adapter.config.get("layers_pattern"),
    )
    if settings.target_modules in (None, "all-linear"):
        return None
    try:
        idle = [module for module in adapter.modules() if not check_target_module_exists(settings, module)]
    except (re.error, TypeError, AttributeError) as error:
        raise ModelError(
            f"{show(adapter.config_file)} has target_modules {show(settings.target_modules, 80)}, which peft cannot "
            f"match ({show(error)}): fetch the adapter again"
        ) from error
    return f"tensors outside of target_modules: {listing(idle, 2)}" if idle else None


def find_updates(adapter: Adapter, base: LazyTensorLoader, config: Any) -> dict[str, LowRank]:
    """Name in the base checkpoint -> what is added to it."""
    modules = adapter.modules()
    if not modules:
        raise ModelError(f"{show(adapter.weights_file)} holds no LoRA tensors: is {show(adapter.name)} an adapter?")
    standard = type(config).__module__.startswith("transformers.")
    conv1d = config.model_type in _CONV1D if standard else bool(adapter.config.get("fan_in_fan_out"))
    tied = bool(getattr(config, "tie_word_embeddings", False))
    updates: dict[str, LowRank] = {}
    for module, sides in modules.items():
        if len(sides) != 2:
            raise ModelError(
                f"{show(adapter.weights_file)} has only {listing(sides.values())} of the two matrices of "
                f"{show(module)}: fetch the adapter again"
            )
        rank, scaling = _rank_and_scaling(adapter, module)
        (rank_a, inputs), (outputs, rank_b) = adapter.shapes[sides["A"]], adapter.shapes[sides["B"]]
        if not rank_a == rank_b == rank:
            raise ModelError(
                f"the matrices of {show(module)} in {show(adapter.weights_file)} have ranks {rank_a} and {rank_b}, "
                f"its {CONFIG_NAME} says {rank}: fetch the adapter again"
            )
        if tied and module.rpartition(".")[2] == "lm_head":
            raise ModelError(
                f"the adapter {show(adapter.name)} adapts {show(module)}, which its base ties to the embeddings: "
                "no checkpoint can hold the sum; merge without this adapter"
            )
        name = _name_in_base(module, base)
        if name is None:
            raise ModelError(
                f"the adapter {show(adapter.name)} adapts {show(module)}, and its base has no tensor "
                f"{show(module)}.weight: the adapter belongs to another base"
            )
        updates[name] = LowRank(module, sides["A"], sides["B"], (outputs, inputs), scaling, conv1d)
    return updates


def _rank_and_scaling(adapter: Adapter, module: str) -> tuple[int, float]:
    config = adapter.config
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    try:
        rank = int(ranks.get(get_pattern_key(list(ranks), module), config.get("r", 8)))
        alpha = float(alphas.get(get_pattern_key(list(alphas), module), config.get("lora_alpha", 8)))
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if rank < 1 or not math.isfinite(scaling):
            raise ValueError(f"rank {rank}, alpha {alpha}")
    except (AttributeError, TypeError, ValueError, ArithmeticError, re.error) as error:
        raise ModelError(
            f"{show(adapter.config_file)} has no usable rank and alpha for {show(module)} ({show(error)}): "
            "fetch the adapter again"
        ) from error
    return rank, scaling


def _name_in_base(module: str, base: LazyTensorLoader) -> str | None:
    names = [f"{module}.weight"]
    prefix, _, rest = module.partition(".")
    if prefix in _PREFIXES:
        names.append(f"{rest}.weight")
    return next((name for name in names if name in base.index.tensor_paths), None)


def check_shapes(base: LazyTensorLoader, updates: Mapping[str, LowRank]) -> None:
    """Refuse an adapter before anything is computed; pickled shards have no header, and are checked when read."""
    if not base.index.is_safetensors:
        return
    for shard in base.index.shards:
        names = [name for name in shard.contained_keys if name in updates]
        if not names:
            continue
        path = os.path.join(base.index.base_path, shard.filename)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except (OSError, safetensors.SafetensorError) as error:
            raise ModelError(f"{show(path)} is missing or corrupt ({show(error)}); fetch it again") from error
        for name, shape in shapes.items():
            updates[name].is_transposed(name, shape)
