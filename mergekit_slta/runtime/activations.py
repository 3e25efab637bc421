"""What a backward pass needs of the forward: every layer's input of every row, and the gradients on their way back.

Scope: storage, in memory or in one mapped file that a killed run goes on from. Its size grows with rows, tokens, width
and depth, not with the model's weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mergekit_slta.errors import OutputError, show
from mergekit_slta.files.atomic import write_text_atomically

_MARKER = "tape.json"


def activation_bytes(tokens: int, depths: int, samples: int, width: int, dtype: torch.dtype) -> int:
    """Bytes that a tape of so many tokens takes."""
    return tokens * (depths + 2 * samples) * width * dtype.itemsize


class ActivationStore:
    """Features between layers, and gradients of the loss by them.

    Args:
        lengths: tokens of each row.
        depths: places between layers: one more than there are layers; 2 are enough to go forward, in turn.
        samples: S gradients per row.
        width: d.
        dtype: of features and gradients.
        folder: where the file is kept; in memory if None.

    Attributes:
        depths_done: so many depths hold every row's features.
        layers_done: so many steps of the backward pass are done; their gradients are there.

    Raises:
        OutputError: the file cannot be made.
    """

    def __init__(
        self, lengths: Sequence[int], depths: int, samples: int, width: int, dtype: torch.dtype, folder: Path | None
    ) -> None:
        self._samples = samples
        self._places, total = [], 0
        for length in lengths:
            self._places.append(slice(total, total + length))
            total += length
        self._folder = folder
        self.depths_done, self.layers_done = 0, 0
        count = depths + 2 * samples  # gradients are read from one side while the other is written
        if folder is None:
            every = torch.empty((count, total, width), dtype=dtype, device="cpu")
        else:
            layout = json.dumps([list(lengths), depths, samples, width, str(dtype)])
            self._layout = hashlib.sha256(layout.encode()).hexdigest()
            path, shape = folder / "tape.bin", (count * total, width * dtype.itemsize)
            if path.is_file() and path.stat().st_size == shape[0] * shape[1]:
                with suppress(OSError, ValueError, KeyError, TypeError):
                    marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
                    if marker["layout"] == self._layout:
                        self.depths_done, self.layers_done = int(marker["depths"]), int(marker["stages"])
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._file = _mapped(path, shape)
            except OSError as error:
                raise OutputError(
                    f"cannot keep {shape[0] * shape[1] / 2**30:.1f} GiB of features in {show(folder)} "
                    f"({error.strerror or error}): free some room, or use fewer rows"
                ) from error
            every = torch.from_numpy(self._file).view(dtype).view(count, total, width)
        self._features = every[:depths]
        self._gradients = every[depths:].view(2, samples, total, width)

    def features(self, depth: int, row: int) -> Tensor:
        """[tokens, d] of a row at a depth; 0 is behind the embeddings."""
        return self._features[depth % len(self._features), self._places[row]]

    def put_features(self, depth: int, row: int, features: Tensor) -> None:
        """Keep a row's features at a depth."""
        self._features[depth % len(self._features), self._places[row]] = features.cpu()

    def finish_depth(self) -> None:
        """All rows have reached one depth more."""
        self.depths_done += 1
        self._mark()

    def gradients(self, row: int) -> Tensor:
        """[S, tokens, d] as the step before has left them."""
        return self._gradients[self.layers_done % 2, :, self._places[row]]

    def put_gradients(self, row: int, gradients: Tensor) -> None:
        """Hand a row's gradients to the next step; they are read after `finish_layer`."""
        self._gradients[(self.layers_done + 1) % 2, :, self._places[row]] = gradients.cpu()

    def finish_layer(self) -> None:
        """One step more of the backward pass is done, and what it found has been kept."""
        self.layers_done += 1
        self._mark()

    def rewind(self) -> None:
        """Take the backward pass as not begun; features stay."""
        self.layers_done = 0
        self._mark()

    def _mark(self) -> None:
        if self._folder is not None:
            self._file.flush()
            content = {"layout": self._layout, "depths": self.depths_done, "stages": self.layers_done}
            write_text_atomically(self._folder / _MARKER, json.dumps(content))


def _mapped(path: Path, shape: tuple[int, int]) -> np.memmap:
    """A file of zeros (or what a killed run has left) of that shape, mapped. Room for it is taken at once: a full disk
    met while a mapped page is written would kill the process."""
    size = shape[0] * shape[1]
    with open(path, "ab") as file:
        if file.tell() != size:
            file.truncate(size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, max(1, size))
    return np.memmap(path, dtype=np.uint8, mode="r+", shape=shape)
