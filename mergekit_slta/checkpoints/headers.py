"""Headers of safetensors files: names, shapes and byte ranges of tensors. No tensor is read."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from mergekit_slta.errors import ModelError, listing, show
from mergekit_slta.libraries.mergekit import LazyTensorLoader


@dataclass(frozen=True)
class TensorHeader:
    """Shape, dtype name and byte range [start, stop) of one tensor in a safetensors file."""

    shape: tuple[int, ...]
    dtype: str
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
            entries = _read_header(path)
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
