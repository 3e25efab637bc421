"""Find the files that hold a model's weights, as transformers does, and open them.

Scope: file names, indexes and the first bytes of files. mergekit prefers an index to a whole file beside it and
transformers does not, so the choice is made here.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_slta.checkpoints.hub import HubFiles, fetch, find_files, read_index
from mergekit_slta.checkpoints.merged_copy import existing_copy, make_copy
from mergekit_slta.errors import ModelError, SltaError, listing, show
from mergekit_slta.files.names import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAMES,
    CONFIG_NAME,
    INDEX_ENDING,
    WEIGHTS_NAMES,
)
from mergekit_slta.libraries.mergekit import LazyTensorLoader, open_file, open_shards

LOG = logging.getLogger(__name__)
_WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5", ".msgpack", ".onnx", INDEX_ENDING)
_LFS_POINTER = b"version https://git-lfs.github.com/spec"


def open_checkpoint(
    model: ModelReference, options: MergeOptions, name: str, *, planning: bool = False
) -> LazyTensorLoader:
    """Open the weights that transformers would load for a model. An adapter is merged into a copy on disk by mergekit.

    Args:
        model: the model; from the Hub it is downloaded.
        options: mergekit's options: caches, `lazy_unpickle` and `lora_merge_dtype` are used.
        name: the model's name in the recipe, for messages.
        planning: download no weights, and merge no adapter. If weights are missing, the loader gives names and headers
            and no tensors; that of an adapter without a copy is its base's.

    Raises:
        ModelError: there are no weights, only an adapter's or those of another format; or a file is missing, empty or
            corrupt.
    """
    try:
        copy = existing_copy(model, options, name)
        if model.lora and copy is None and not planning:
            copy = make_copy(model, options, name)
        if copy is not None:
            return _open_folder(copy, options.lazy_unpickle, name)
        found = find_files(model.model, options.transformers_cache)
        if isinstance(found, HubFiles) and planning:
            return LazyTensorLoader(read_index(found), options.lazy_unpickle)
        folder = fetch(found) if isinstance(found, HubFiles) else found
        return _open_folder(folder, options.lazy_unpickle, name)
    except SltaError:
        raise
    except Exception as error:  # mergekit, peft, the Hub and the file system raise different errors
        raise ModelError(
            f"cannot open the checkpoint of {show(name)} ({show(error)}): a file is missing or corrupt, fetch it again",
            code="unreadable-checkpoint",
        ) from error


def _open_folder(folder: str, lazy_unpickle: bool, name: str) -> LazyTensorLoader:
    chosen = _weights_file(folder, name)
    path = os.path.join(folder, chosen)
    if _is_outside(chosen):
        raise _corrupt(path, name, "its config names it, and it is outside of its folder")
    refuse_pointer(path, name)
    if not chosen.endswith(INDEX_ENDING):
        _check_file(path, name)
        return open_file(path, lazy_unpickle=lazy_unpickle)
    tensor_files = _read_index(path, name)
    for file in sorted(set(tensor_files.values())):
        _check_file(os.path.join(folder, file), name)
    return open_shards(folder, tensor_files, lazy_unpickle=lazy_unpickle)


def _indexes_only(index: str, whole: str) -> bool:
    """Whether an index names the file `whole` and no other, as the one that a merge writes."""
    try:
        with open(index, encoding="utf-8") as file:
            return set(json.load(file)["weight_map"].values()) == {whole}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _weights_file(folder: str, name: str) -> str:
    """The file or index that transformers would load.

    Raises:
        ModelError: there is none.
    """
    present = set(os.listdir(folder))
    if stated := _stated_file(folder):
        return stated
    for whole in WEIGHTS_NAMES:
        found = [file for file in (whole, whole + INDEX_ENDING) if file in present]
        if len(found) > 1 and not _indexes_only(os.path.join(folder, found[1]), whole):
            LOG.warning(
                "%s holds two checkpoints, %s and %s: %s is read, as transformers does; remove the other if that is "
                "wrong",
                show(name), *found, whole,
            )  # fmt: skip
        if found:
            return found[0]
    refuse_lone_adapter(folder, name)
    others = sorted(file for file in present if file.endswith(_WEIGHT_ENDINGS))
    inside = sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and any(os.path.isfile(os.path.join(entry.path, whole)) for whole in WEIGHTS_NAMES)
    )
    remedy = "fetch its weights"
    if any(file.endswith(".gguf") for file in others):
        remedy = "load it with transformers (`gguf_file=`) and save it with `save_pretrained`, or name the 16-bit model"
    elif any("-of-" in file for file in others):
        remedy = "fetch the index of its shards"
    elif inside:
        remedy = f"name the folder {show(os.path.join(name, inside[-1]))}"
    elif others:
        remedy = "load it with transformers and save it with `save_pretrained`"
    raise ModelError(
        f"cannot open the checkpoint of {show(name)} (it has no {' and no '.join(WEIGHTS_NAMES)}, nor an index of one; "
        f"it holds {listing([*others, *inside], 4)}): {remedy}",
        code="unreadable-checkpoint",
    )


def _stated_file(folder: str) -> str | None:
    """The weights file, or its index, that a model's config names; transformers then loads no other."""
    try:
        with open(os.path.join(folder, CONFIG_NAME), encoding="utf-8") as file:
            found = json.load(file).get("transformers_weights")
    except (OSError, ValueError, AttributeError, RecursionError):  # a config that is needed is read elsewhere
        return None
    return str(found) if found else None


def _read_index(path: str, name: str) -> dict[str, str]:
    """Read an index: tensor name -> file, relative to the index's folder.

    Raises:
        ModelError: it is damaged, or names files outside of its folder.
    """
    try:
        with open(path, encoding="utf-8") as file:
            found: Any = json.load(file)["weight_map"]
        if not isinstance(found, Mapping) or not all(isinstance(value, str) for value in found.values()):
            raise TypeError("its `weight_map` is not a mapping of tensors to files")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _corrupt(path, name, str(error)) from error
    for value in found.values():
        if _is_outside(value):
            raise _corrupt(path, name, f"it names {value}, which is outside of its folder")
    return dict(found)


def _is_outside(file: str) -> bool:
    """Whether a relative path leads out of the folder that it starts in."""
    return os.path.isabs(file) or os.path.normpath(file).split(os.sep)[0] == os.pardir


def _check_file(path: str, name: str) -> None:
    if not os.path.isfile(path):
        raise _corrupt(path, name, "no such file")
    if not os.path.getsize(path):
        raise _corrupt(path, name, "it is empty")
    refuse_pointer(path, name)


def _corrupt(path: str, name: str, reason: str) -> ModelError:
    return ModelError(
        f"{show(path)} of {show(name)} is missing or corrupt ({show(reason)}); fetch it again",
        code="corrupt-checkpoint",
    )


def refuse_pointer(path: str, name: str) -> None:
    """Refuse a file that Git has left as a pointer to its content.

    Args:
        path: any file; need not exist.
        name: the model that it belongs to, for the message.

    Raises:
        ModelError: it is a Git LFS pointer.
    """
    if not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) != _LFS_POINTER:
            return
    raise ModelError(
        f"{show(path)} of {show(name)} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder",
        code="git-lfs-pointer",
    )


def refuse_lone_adapter(folder: str, name: str) -> None:
    """Refuse a folder with an adapter and no model.

    Raises:
        ModelError: it holds an adapter's config.
    """
    path = os.path.join(folder, ADAPTER_CONFIG_NAME)
    if not os.path.isfile(path):
        return
    try:
        with open(path, encoding="utf-8") as file:
            base = json.load(file).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        base = None
    written = f"{show(base or 'BASE')}+{show(name)}"
    raise ModelError(
        f"{show(name)} is an adapter without its base: write `{written}`" + ("" if base else ", BASE being its base"),
        code="adapter-without-base",
    )


def refuse_embedded_adapter(model: ModelReference, name: str) -> None:
    """Refuse a folder that holds a model and an adapter: transformers loads both, mergekit only the model.

    Raises:
        ModelError: it does, and the reference does not name this adapter.
    """
    folder = model.model.path
    if not os.path.isfile(os.path.join(folder, CONFIG_NAME)) or (model.lora and model.lora.path == folder):
        return
    adapters = [file for file in ADAPTER_WEIGHTS_NAMES if os.path.isfile(os.path.join(folder, file))]
    names = [file + end for end in ("", INDEX_ENDING) for file in WEIGHTS_NAMES]
    whole = [file for file in names if os.path.isfile(os.path.join(folder, file))]
    if adapters and whole and os.path.isfile(os.path.join(folder, ADAPTER_CONFIG_NAME)):
        raise ModelError(
            f"{show(name)} holds a model ({whole[0]}) and an adapter ({adapters[0]}), of which transformers loads both "
            f"and mergekit the model: write `{show(folder)}+{show(folder)}` for both, or move the adapter away",
            code="model-and-adapter",
        )
