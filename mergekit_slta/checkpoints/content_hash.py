"""Hash of a checkpoint's contents: headers, file sizes, and a sample of each tensor's bytes.

Hashing 100 GB takes seconds. Training changes nearly all weights, so it changes the hash. An edit of a few elements
between the samples is not detected.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

from mergekit_slta.checkpoints.headers import TensorHeader
from mergekit_slta.libraries.mergekit import LazyTensorLoader

_SAMPLES = 4
"""Number of samples of a tensor's bytes."""
_FILE_SAMPLES = 64
"""Number of samples of a shard that is not safetensors."""
_SAMPLE_BYTES = 1024
_BLOCK_BYTES = 2**20
"""Bytes per read, for files that are hashed completely."""


def checkpoint_fingerprint(loader: LazyTensorLoader, headers: Mapping[str, TensorHeader] | None) -> str:
    """SHA-256 of the size and sampled bytes of every shard (safetensors: of every tensor), as hexadecimal digits.

    An adapter's files are hashed completely, together with the dtype to which its sums are rounded.

    Args:
        loader: mergekit's loader, or an adapter's.
        headers: tensor name -> header; None for checkpoints that are not safetensors.
    """
    digest = hashlib.sha256(str(getattr(loader, "dtype", None)).encode())
    for path in getattr(loader, "fingerprint_files", ()):  # only adapters have these
        with open(path, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    for shard in sorted(loader.index.shards, key=lambda shard: shard.filename):
        path = os.path.join(loader.index.base_path, shard.filename)
        size = os.path.getsize(path)
        digest.update(f"{size};".encode())
        with open(path, "rb", buffering=0) as file:
            if headers is None:
                ranges = [(0, size, _FILE_SAMPLES)]
            else:
                ranges = []
                for name in sorted(shard.contained_keys):
                    header = headers[name]
                    digest.update(f"{name};{header.dtype};{header.shape};".encode())
                    ranges.append((header.start, header.stop, _SAMPLES))
            for start, stop, samples in ranges:
                stride = max(_SAMPLE_BYTES, (stop - start - _SAMPLE_BYTES) // max(1, samples - 1))
                for offset in range(start, stop, stride):
                    file.seek(offset)
                    digest.update(file.read(min(_SAMPLE_BYTES, stop - offset)))
    return digest.hexdigest()
