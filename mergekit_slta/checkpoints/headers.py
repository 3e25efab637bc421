"""Names, shapes and dtypes of a checkpoint's tensors, and their byte ranges in safetensors files. No tensor is read."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from mergekit_slta.errors import ModelError, listing, show
from mergekit_slta.libraries.mergekit import LazyTensorLoader

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Names of floating dtypes in safetensors headers."""


@dataclass(frozen=True)
class StoredTensor:
    """Shape and dtype of one tensor of a checkpoint; the dtype's name is that of safetensors files."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class TensorHeader(StoredTensor):
    """One tensor in a safetensors file; its byte range is [start, stop)."""

    start: int
    stop: int


def read_headers(loader: LazyTensorLoader, name: str) -> dict[str, TensorHeader]:
    """Tensor name -> header, for all tensors of a safetensors checkpoint.

    Args:
        loader: the checkpoint's loader.
        name: the model's name, for messages.

    Raises:
        ModelError: a shard is missing, truncated or corrupt, lacks a tensor that the index lists, or holds a tensor
            that the index lists in another shard.
    """
    headers: dict[str, TensorHeader] = {}
    held: dict[str, Collection[str]] = {}
    for shard in loader.index.shards:
        path = os.path.join(loader.index.base_path, shard.filename)
        try:
            entries = held[shard.filename] = _entries(loader, shard.filename)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{show(path)} of {show(name)} is missing or corrupt ({show(error)}); fetch it again",
                code="corrupt-checkpoint",
            ) from error
        lacking = [key for key in shard.contained_keys if key not in entries]
        if lacking:
            raise ModelError(
                f"{show(path)} of {show(name)} lacks {listing(lacking, 3)}, which its index promises; fetch it again",
                code="corrupt-checkpoint",
            )
        headers |= {key: entries[key] for key in shard.contained_keys}
    _refuse_doubled(loader, held, name)
    return headers


def refuse_unlisted(loader: LazyTensorLoader, tensor: str, name: str) -> None:
    """Refuse a safetensors checkpoint with a shard that holds a tensor which its index does not list.

    Args:
        loader: the checkpoint's loader.
        tensor: the tensor's name.
        name: the model's name, for messages.

    Raises:
        ModelError: see above.
    """
    folder = loader.index.base_path
    files = {shard.filename for shard in loader.index.shards}
    if os.path.isdir(folder):  # the index may lack all tensors of a shard
        files |= {file for file in os.listdir(folder) if "-of-" in file}
    for file in sorted(files) if tensor not in loader.index.tensor_paths else ():
        try:
            holds = file.endswith(".safetensors") and tensor in _entries(loader, file)
        except (OSError, ValueError, KeyError, TypeError):  # not a file of this checkpoint
            continue
        if holds:
            raise ModelError(
                f"{show(os.path.join(folder, file))} of {show(name)} holds {show(tensor)}, which its index does not "
                "list; fetch it again",
                code="corrupt-checkpoint",
            )


def _refuse_doubled(loader: LazyTensorLoader, held: Mapping[str, Collection[str]], name: str) -> None:
    """Refuse a tensor that is in the shard of the index and in another: transformers loads the last one.

    Args:
        loader: the checkpoint's loader.
        held: file name of each shard -> names of all tensors in it.
        name: the model's name, for messages.

    Raises:
        ModelError: see above.
    """
    for file, keys in held.items():
        for key in keys:
            listed = loader.index.tensor_paths.get(key, file)
            if listed != file:
                paths = [os.path.join(loader.index.base_path, each) for each in (listed, file)]
                raise ModelError(
                    f"{show(paths[0])} of {show(name)} holds {show(key)}, and so does {show(paths[1])}; fetch it again",
                    code="corrupt-checkpoint",
                )


def read_pickled(loader: LazyTensorLoader, name: str) -> dict[str, StoredTensor]:
    """Tensor name -> shape and dtype, for all tensors of a `.bin` checkpoint.

    Args:
        loader: the checkpoint's loader.
        name: the model's name, for messages.

    Raises:
        ModelError: a file cannot be read without running code, or holds something else than the index's tensors.
    """
    stored = {}
    held: dict[str, Collection[str]] = {}
    for shard in loader.index.shards:
        path = os.path.join(loader.index.base_path, shard.filename)
        try:
            try:
                content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
            except RuntimeError:  # files of torch before 1.6 cannot be mapped
                content = torch.load(path, map_location="meta", weights_only=True)
            held[shard.filename] = list(content)
            lacking = [key for key in shard.contained_keys if key not in content]
            if lacking:
                raise ValueError(f"it lacks {lacking[0]}, and holds {listing(content, 3)}")
            for key in shard.contained_keys:
                if not isinstance(content[key], torch.Tensor):  # a number of steps, for example
                    continue
                kind = content[key].dtype
                dtype = DTYPE_NAMES.get(kind, str(kind).removeprefix("torch.").upper())
                stored[key] = StoredTensor(tuple(content[key].shape), dtype)
        except Exception as error:  # torch and pickle raise different errors
            raise ModelError(
                f"{show(path)} of {show(name)} is missing or corrupt ({show(error)}); fetch it again",
                code="corrupt-checkpoint",
            ) from error
    _refuse_doubled(loader, held, name)
    return stored


def read_stored(loader: LazyTensorLoader, name: str) -> dict[str, StoredTensor]:
    """Tensor name -> shape and dtype, for any checkpoint; see `read_headers` and `read_pickled`."""
    if loader.index.is_safetensors:
        return dict(read_headers(loader, name))
    if hasattr(loader.index, "headers"):  # on the Hub: nothing is known before the download
        return {}
    return read_pickled(loader, name)


def _entries(loader: LazyTensorLoader, file: str) -> dict[str, TensorHeader]:
    known = getattr(loader.index, "headers", None)  # of a checkpoint on the Hub (hub.py)
    return _read_header(os.path.join(loader.index.base_path, file)) if known is None else known[file]


def _read_header(path: str) -> dict[str, TensorHeader]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            raise ValueError("its header is longer than the file")
        entries = json.loads(file.read(length))
    start = 8 + length
    headers = {}
    for key, entry in entries.items():
        if key != "__metadata__":
            first, last = entry["data_offsets"]
            headers[key] = TensorHeader(tuple(entry["shape"]), entry["dtype"], start + first, start + last)
    if headers and max(header.stop for header in headers.values()) > size:
        raise ValueError("it is shorter than its header says")
    return headers
