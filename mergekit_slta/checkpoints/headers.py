"""Names, shapes and dtypes of a checkpoint's tensors, and their byte ranges in safetensors files. No tensor is read."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import torch

from mergekit_slta.errors import ModelError, listing, show
from mergekit_slta.libraries.mergekit import LazyTensorLoader

_PICKLED_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


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
        ModelError: a shard is missing, truncated or corrupt, or lacks a tensor that the index lists.
    """
    headers: dict[str, TensorHeader] = {}
    for shard in loader.index.shards:
        path = os.path.join(loader.index.base_path, shard.filename)
        try:
            known = getattr(loader.index, "headers", None)  # of a checkpoint on the Hub (hub.py)
            entries = _read_header(path) if known is None else known[shard.filename]
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
    return headers


def read_pickled(loader: LazyTensorLoader, name: str) -> dict[str, StoredTensor]:
    """Tensor name -> shape and dtype, for all tensors of a `.bin` checkpoint.

    Args:
        loader: the checkpoint's loader.
        name: the model's name, for messages.

    Raises:
        ModelError: a file cannot be read without running code, or holds something else than the index's tensors.
    """
    stored = {}
    for shard in loader.index.shards:
        path = os.path.join(loader.index.base_path, shard.filename)
        try:
            try:
                content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
            except RuntimeError:  # files of torch before 1.6 cannot be mapped
                content = torch.load(path, map_location="meta", weights_only=True)
            lacking = [key for key in shard.contained_keys if key not in content]
            if lacking:
                raise ValueError(f"it lacks {lacking[0]}, and holds {listing(content, 3)}")
            for key in shard.contained_keys:
                if not isinstance(content[key], torch.Tensor):  # a number of steps, for example
                    continue
                kind = content[key].dtype
                dtype = _PICKLED_DTYPES.get(kind, str(kind).removeprefix("torch.").upper())
                stored[key] = StoredTensor(tuple(content[key].shape), dtype)
        except Exception as error:  # torch and pickle raise different errors
            raise ModelError(
                f"{show(path)} of {show(name)} is missing or corrupt ({show(error)}); fetch it again",
                code="corrupt-checkpoint",
            ) from error
    return stored


def read_stored(loader: LazyTensorLoader, name: str) -> dict[str, StoredTensor]:
    """Tensor name -> shape and dtype, for any checkpoint; see `read_headers` and `read_pickled`."""
    if loader.index.is_safetensors:
        return dict(read_headers(loader, name))
    if hasattr(loader.index, "headers"):  # on the Hub: nothing is known before the download
        return {}
    return read_pickled(loader, name)


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
