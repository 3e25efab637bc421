"""Features of many models between two layers: in memory, or in files that a killed run goes on from.

Scope: storage. In memory a stream is overwritten where it lies. In files there are two sides, read and written in
turn, and a marker that is moved when a side is whole: whatever kills a run, the last layer before it is on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Hashable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mergekit_slta.errors import OutputError, show
from mergekit_slta.files import write_text_atomically

_MARKER = "depth.json"


class Streams:
    """One [tokens, d] tensor per key, at one depth of the model.

    Args:
        tokens: key -> its tokens; the order has to be the same when a run goes on.
        width: d.
        dtype: of the features; stored as they are.
        folder: where the files are kept; in memory if None.

    Attributes:
        depth: how many layers the features have passed; 0 behind the embeddings, -1 before anything was written.

    Raises:
        OutputError: the files cannot be made.
    """

    def __init__(self, tokens: Mapping[Hashable, int], width: int, dtype: torch.dtype, folder: Path | None) -> None:
        self._places: dict[Hashable, slice] = {}
        total = 0
        for key, count in tokens.items():
            self._places[key] = slice(total, total + count)
            total += count
        self._folder = folder
        self.depth = -1
        if folder is None:
            self._sides = [torch.empty((total, width), dtype=dtype, device="cpu")]
            return
        shape = (total, width * dtype.itemsize)
        layout = json.dumps([[repr(key), count] for key, count in tokens.items()] + [[width, str(dtype)]])
        self._layout = hashlib.sha256(layout.encode()).hexdigest()
        paths = [folder / f"side{side}.bin" for side in (0, 1)]
        size = shape[0] * shape[1]
        if all(path.is_file() and path.stat().st_size == size for path in paths):
            with suppress(OSError, ValueError, KeyError, TypeError):
                marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
                if marker["layout"] == self._layout:
                    self.depth = int(marker["depth"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.depth < 0:
                (folder / _MARKER).unlink(missing_ok=True)
            self._files = [mapped(path, shape) for path in paths]
        except OSError as error:
            raise OutputError(
                f"cannot keep {2 * size / 2**30:.1f} GiB of features in {show(folder)} ({error.strerror or error}): "
                "free some room, or use fewer rows"
            ) from error
        self._sides = [torch.from_numpy(file).view(dtype) for file in self._files]

    def read(self, key: Hashable) -> Tensor:
        """[tokens, d] behind `depth` layers."""
        return self._sides[self.depth % len(self._sides)][self._places[key]]

    def write(self, key: Hashable, features: Tensor) -> None:
        """Put features behind one layer more; they are read after `commit`."""
        self._sides[(self.depth + 1) % len(self._sides)][self._places[key]] = features.cpu()

    def commit(self) -> None:
        """All features have passed one layer more."""
        if self._folder is not None:
            self._files[(self.depth + 1) % 2].flush()
            write_text_atomically(self._folder / _MARKER, json.dumps({"depth": self.depth + 1, "layout": self._layout}))
        self.depth += 1


def mapped(path: Path, shape: tuple[int, int]) -> np.memmap:
    """A file of zeros (or what a killed run has left) of that shape, mapped. Room for it is taken at once: a full disk
    met while a mapped page is written would kill the process."""
    size = shape[0] * shape[1]
    with open(path, "ab") as file:
        if file.tell() != size:
            file.truncate(size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, max(1, size))
    return np.memmap(path, dtype=np.uint8, mode="r+", shape=shape)
