"""peft's LoRA adapters: their files, the update of each weight, and the adapters that are more than such updates.

Scope: settings, names and shapes. `lora_loader.py` reads the matrices.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import safetensors
import torch
from huggingface_hub import DryRunFileInfo, constants, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from mergekit.common import ModelPath

from mergekit_slta.checkpoints.headers import read_headers
from mergekit_slta.checkpoints.hub import Download, is_local, read_header
from mergekit_slta.checkpoints.hub_errors import hub_problem
from mergekit_slta.checkpoints.weight_files import refuse_pointer
from mergekit_slta.errors import ModelError, listing, show
from mergekit_slta.files.names import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAMES
from mergekit_slta.libraries.mergekit import LazyTensorLoader
from mergekit_slta.libraries.peft import is_target, pattern_key
from mergekit_slta.libraries.transformers import is_built_in
from mergekit_slta.models.architectures import BASE_MODEL_NAMES, OUTPUT_PROJECTION, TRANSPOSED

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_UNDERSTOOD = frozenset(
    "peft_type r lora_alpha use_rslora rank_pattern alpha_pattern fan_in_fan_out bias init_lora_weights "
    "target_modules exclude_modules layers_to_transform layers_pattern".split()
)
# These describe where the adapter comes from, or matter only in training or at initialization.
_WITHOUT_EFFECT = frozenset(
    "auto_mapping base_model_name_or_path inference_mode lora_dropout peft_version revision runtime_config task_type "
    "corda_config eva_config loftq_config lora_ga_config megatron_core qalora_group_size".split()
)
_DISPLAY_NAMES = {"use_dora": "DoRA", "use_qalora": "QALoRA", "lora_bias": "lora_bias"}
# Other initializations (PiSSA, OLoRA, LoftQ, ...) change the base's weights, also when peft loads the adapter.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LowRank:
    """The update of one weight by an adapter: `scaling * B @ A`.

    Attributes:
        module: the adapted module's path in the adapter.
        a, b: names of the matrices A [rank, in] and B [out, rank] in the adapter's file.
        shape: (out, in).
        scaling: lora_alpha / rank, or lora_alpha / sqrt(rank) for rsLoRA.
        transposed: whether linear layers of this model class store [in, out].
    """

    module: str
    a: str
    b: str
    shape: tuple[int, int]
    scaling: float
    transposed: bool

    def is_transposed(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a base tensor of this shape is stored as [in, out].

        Raises:
            ModelError: the product fits neither [in, out] nor [out, in].
        """
        if self.transposed and shape == self.shape[::-1]:
            return True
        if shape == self.shape:  # also in a transposed class, whose output projection is an nn.Linear
            return False
        raise ModelError(
            f"the adapter's product for {show(self.module)} is {list(self.shape)}, {show(name)} of its base "
            f"{list(shape)}: the adapter belongs to another base",
            code="other-base",
        )


@dataclass(frozen=True)
class Adapter:
    """An adapter: its files, its settings, and the shapes of its tensors by name.

    Attributes:
        lora: the adapter's path or id.
        config_file, weights_file: paths; that of the weights is where they will be once they have been downloaded.
        config: the settings.
        shapes: tensor name -> shape.
        download: the weights' download; None if they are on this machine.
    """

    lora: ModelPath
    config_file: str
    weights_file: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    download: Download | None = None

    @property
    def name(self) -> str:
        """The adapter's name in messages."""
        return str(self.lora)

    def modules(self) -> dict[str, dict[str, str]]:
        """Adapted module -> "A" and "B" -> name in the file."""
        found: dict[str, dict[str, str]] = {}
        for key in self.shapes:
            if match := _KEY.fullmatch(key):
                found.setdefault(match["module"], {})[match["side"]] = key
        return found


def read_adapter(lora: ModelPath) -> Adapter:
    """Read an adapter's settings and the shapes of its tensors, from a folder or the Hub.

    safetensors weights on the Hub are not downloaded: only their header is read.

    Raises:
        ModelError: a file is missing or damaged.
    """
    config_file = _file(lora, (ADAPTER_CONFIG_NAME,))
    refuse_pointer(config_file, str(lora))
    try:
        with open(config_file, encoding="utf-8") as file:
            config = json.load(file)
        if not isinstance(config, dict):
            raise TypeError("it is no JSON object")
    except (OSError, ValueError, TypeError) as error:
        raise _corrupt(config_file, error) from error
    remote = _weights_on_the_hub(lora)
    if remote is not None:
        headers = read_header(lora, remote.filename, remote.commit_hash, remote.file_size or 0)
        shapes = {key: header.shape for key, header in headers.items()}
        download = Download(str(lora), remote.file_size or 0, constants.HF_HUB_CACHE)
        return Adapter(lora, config_file, remote.local_path, config, shapes, download)
    weights_file = _file(lora, ADAPTER_WEIGHTS_NAMES)
    refuse_pointer(weights_file, str(lora))
    try:
        shapes = _shapes(weights_file)
    except Exception as error:  # safetensors, torch and pickle raise different errors
        raise _corrupt(weights_file, error) from error
    return Adapter(lora, config_file, weights_file, config, shapes)


def fetch_weights(adapter: Adapter) -> Adapter:
    """Download an adapter's weights unless they are on this machine.

    Raises:
        ModelError: the Hub cannot be reached, or refuses.
    """
    if adapter.download is None:
        return adapter
    return replace(adapter, weights_file=_file(adapter.lora, ADAPTER_WEIGHTS_NAMES), download=None)


def _weights_on_the_hub(lora: ModelPath) -> DryRunFileInfo | None:
    """An adapter's safetensors weights if they are on the Hub and not in the cache."""
    if is_local(lora):
        return None
    try:
        found = hf_hub_download(lora.path, ADAPTER_WEIGHTS_NAMES[0], revision=lora.revision, dry_run=True)
    except Exception:  # `_file` reads other weights, or says what is wrong
        return None
    return found if found.will_download else None


def _corrupt(path: str, error: Exception) -> ModelError:
    return ModelError(f"{show(path)} cannot be read ({show(error)}): fetch the adapter again", code="corrupt-adapter")


def _file(lora: ModelPath, names: tuple[str, ...]) -> str:
    error: Exception | None = None
    if is_local(lora):
        paths = [os.path.join(lora.path, name) for name in names]
        if found := next((path for path in paths if os.path.isfile(path)), None):
            return found
    else:
        for name in names:
            try:
                return hf_hub_download(lora.path, name, revision=lora.revision)
            except RemoteEntryNotFoundError as missing:  # the next name may exist
                error = missing
            except Exception as other:  # no such repository, no network, or an invalid repository name
                error = other
                break
        if problem := hub_problem(lora, error):
            raise problem from error
    detail = f" ({show(error)})" if error else ""
    raise ModelError(
        f"the adapter {show(lora)} has no {names[0]}{detail}: check the path or Hub id", code="missing-adapter"
    ) from error


def _shapes(path: str) -> dict[str, tuple[int, ...]]:
    if path.endswith(".safetensors"):
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a mapping
    tensors = torch.load(path, map_location="meta", weights_only=True)
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def merge_reason(adapter: Adapter) -> str | None:
    """Why an adapter is more than `scaling * B @ A` added to weights, in a few words; None if it is only that.

    Raises:
        ModelError: its settings are invalid.
    """
    config = adapter.config
    kind = config.get("peft_type")
    if kind != "LORA":
        return f"peft_type: {show(kind, 40)}"
    for key, value in config.items():
        if key in _UNDERSTOOD or key in _WITHOUT_EFFECT or not value:
            continue
        if key in _DISPLAY_NAMES:
            return _DISPLAY_NAMES[key]
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
    targets = adapter.config.get("target_modules")
    if targets in (None, "all-linear"):  # these settings do not name the modules
        return None
    try:
        idle = [module for module in adapter.modules() if not is_target(adapter.config, module)]
    except (re.error, TypeError, AttributeError) as error:
        raise ModelError(
            f"{show(adapter.config_file)} has target_modules {show(targets, 80)}, which peft cannot "
            f"match ({show(error)}): fetch the adapter again",
            code="corrupt-adapter",
        ) from error
    return f"tensors outside of target_modules: {listing(idle, 2)}" if idle else None


def find_updates(
    adapter: Adapter, base: LazyTensorLoader, config: Any, names: Mapping[str, str] | None = None
) -> dict[str, LowRank]:
    """Find the updates of an adapter: tensor name in the base checkpoint -> update.

    Args:
        adapter: the adapter.
        base: loader of the base's checkpoint; only its tensor names are used.
        config: the base's config.
        names: name in the base's model -> name in its checkpoint, where transformers renames tensors.

    Raises:
        ModelError: the adapter has no LoRA tensors, is damaged, belongs to another base, or adapts an output projection
            that is tied to the embeddings.
    """
    modules = adapter.modules()
    if not modules:
        raise ModelError(
            f"{show(adapter.weights_file)} holds no LoRA tensors: is {show(adapter.name)} an adapter?",
            code="corrupt-adapter",
        )
    if is_built_in(config):  # as in peft, which for these classes uses the layer's class and not the flag
        transposed = (config.architectures or [""])[0] in TRANSPOSED
    else:
        transposed = bool(adapter.config.get("fan_in_fan_out"))
    tied = bool(getattr(config, "tie_word_embeddings", False))
    updates: dict[str, LowRank] = {}
    for module, sides in modules.items():
        if len(sides) != 2:
            raise ModelError(
                f"{show(adapter.weights_file)} has only {listing(sides.values())} of the two matrices of "
                f"{show(module)}: fetch the adapter again",
                code="corrupt-adapter",
            )
        rank, scaling = _rank_and_scaling(adapter, module)
        (rank_a, inputs), (outputs, rank_b) = adapter.shapes[sides["A"]], adapter.shapes[sides["B"]]
        if not rank_a == rank_b == rank:
            raise ModelError(
                f"the matrices of {show(module)} in {show(adapter.weights_file)} have ranks {rank_a} and {rank_b}, "
                f"its {ADAPTER_CONFIG_NAME} says {rank}: fetch the adapter again",
                code="corrupt-adapter",
            )
        if tied and module.rpartition(".")[2] == OUTPUT_PROJECTION:
            raise ModelError(
                f"the adapter {show(adapter.name)} adapts {show(module)}, which its base ties to the embeddings: "
                "no checkpoint can hold the sum; merge without this adapter",
                code="adapter-on-tied-head",
            )
        name = _name_in_base(module, base) or (names or {}).get(f"{module}.weight")
        if name is None:
            raise ModelError(
                f"the adapter {show(adapter.name)} adapts {show(module)}, and its base has no tensor "
                f"{show(module)}.weight: the adapter belongs to another base",
                code="other-base",
            )
        updates[name] = LowRank(module, sides["A"], sides["B"], (outputs, inputs), scaling, transposed)
    return updates


def _rank_and_scaling(adapter: Adapter, module: str) -> tuple[int, float]:
    config = adapter.config
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    try:
        rank = int(ranks.get(pattern_key(list(ranks), module), config.get("r", 8)))
        alpha = float(alphas.get(pattern_key(list(alphas), module), config.get("lora_alpha", 8)))
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if rank < 1 or not math.isfinite(scaling):
            raise ValueError(f"rank {rank}, alpha {alpha}")
    except (AttributeError, TypeError, ValueError, ArithmeticError, re.error) as error:
        raise ModelError(
            f"{show(adapter.config_file)} has no usable rank and alpha for {show(module)} ({show(error)}): "
            "fetch the adapter again",
            code="corrupt-adapter",
        ) from error
    return rank, scaling


def _name_in_base(module: str, base: LazyTensorLoader) -> str | None:
    names = [f"{module}.weight"]
    prefix, _, rest = module.partition(".")
    if prefix in BASE_MODEL_NAMES:  # transformers adds this prefix when it loads such a checkpoint
        names.append(f"{rest}.weight")
    return next((name for name in names if name in base.index.tensor_paths), None)


def check_shapes(base: LazyTensorLoader, updates: Mapping[str, LowRank]) -> None:
    """Check an adapter's shapes against its base's headers.

    Pickled checkpoints have no headers; their shapes are checked when the tensors are read.

    Raises:
        ModelError: a product does not fit its weight, or a file of the base is missing or corrupt.
    """
    if base.index.is_safetensors:
        headers = read_headers(base, base.index.base_path)
        for name, update in updates.items():
            update.is_transposed(name, headers[name].shape)
