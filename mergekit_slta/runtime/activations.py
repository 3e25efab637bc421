"""Store the features of all rows between layers, and gradients with respect to them, in memory or in a mapped file.

Scope: storage. The size depends on tokens, width and stored depths, not on the model's weights. The file outlives a
killed run; the next run continues after the last finished depth or layer.
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
from mergekit_slta.files.atomic import write_error_code, write_text_atomically
from mergekit_slta.files.names import ACTIVATIONS_MARKER_NAME, ACTIVATIONS_NAME


def activation_bytes(tokens: int, depths: int, samples: int, width: int, dtype: torch.dtype) -> int:
    """Bytes of an `ActivationStore` for `tokens` tokens of all rows; the other arguments are those of the store."""
    return tokens * (depths + 2 * samples) * width * dtype.itemsize


class ActivationStore:
    """Features of every row at several depths, and gradients with respect to them.

    Depth 0 is the output of the embeddings, depth n the output of layer n - 1.

    Args:
        lengths: tokens of each row.
        depths: number of stored depths: layers + 1 for a backward pass, 2 (ping-pong) for a forward pass, 1 to
            overwrite in place.
        samples: S, number of gradients per row; 0 for a forward pass.
        width: d, the model's hidden size.
        dtype: dtype of features and gradients.
        folder: folder for the file; None keeps everything in memory.

    Attributes:
        depths_done: number of depths at which every row's features are stored.
        layers_done: number of layers (head and embeddings included) whose backward pass is finished.

    Raises:
        OutputError: the file cannot be created.
    """

    def __init__(
        self, lengths: Sequence[int], depths: int, samples: int, width: int, dtype: torch.dtype, folder: Path | None
    ) -> None:
        self._tokens, total = [], 0  # every row's slice of the token axis
        for length in lengths:
            self._tokens.append(slice(total, total + length))
            total += length
        self._folder = folder
        self.depths_done, self.layers_done = 0, 0
        count = depths + 2 * samples  # gradients of two layers: one is read while the other is written
        if folder is None:
            stored = torch.empty((count, total, width), dtype=dtype, device="cpu")
        else:
            layout = json.dumps([list(lengths), depths, samples, width, str(dtype)])
            self._layout = hashlib.sha256(layout.encode()).hexdigest()
            path, shape = folder / ACTIVATIONS_NAME, (count * total, width * dtype.itemsize)
            if path.is_file() and path.stat().st_size == shape[0] * shape[1]:
                with suppress(OSError, ValueError, KeyError, TypeError):
                    marker = json.loads((folder / ACTIVATIONS_MARKER_NAME).read_text(encoding="utf-8"))
                    if marker["layout"] == self._layout:
                        self.depths_done, self.layers_done = int(marker["depths_done"]), int(marker["layers_done"])
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._file = mapped(path, shape)
            except OSError as error:
                raise OutputError(
                    f"cannot keep {shape[0] * shape[1] / 2**30:.1f} GiB of features in {show(folder)} "
                    f"({error.strerror or error}): free some room, or use fewer rows",
                    code=write_error_code(error),
                ) from error
            stored = torch.from_numpy(self._file).view(dtype).view(count, total, width)
        self._features = stored[:depths]
        self._gradients = stored[depths:].view(2, samples, total, width)

    def features(self, depth: int, row: int) -> Tensor:
        """[tokens, d] features of a row at a depth."""
        return self._features[depth % len(self._features), self._tokens[row]]

    def put_features(self, depth: int, row: int, features: Tensor) -> None:
        """Store a row's features [tokens, d] at a depth."""
        self._features[depth % len(self._features), self._tokens[row]] = features.cpu()

    def finish_depth(self) -> None:
        """Record that every row's features at the next depth are stored."""
        self.depths_done += 1
        self._mark()

    def gradients(self, row: int) -> Tensor:
        """[S, tokens, d] gradients of a row with respect to the output of the current layer."""
        return self._gradients[self.layers_done % 2, :, self._tokens[row]]

    def put_gradients(self, row: int, gradients: Tensor) -> None:
        """Store a row's gradients [S, tokens, d] with respect to the layer's input; read them after `finish_layer`."""
        self._gradients[(self.layers_done + 1) % 2, :, self._tokens[row]] = gradients.cpu()

    def finish_layer(self) -> None:
        """Record that a layer's backward pass is finished and its results are saved."""
        self.layers_done += 1
        self._mark()

    def rewind(self) -> None:
        """Restart the backward pass; the features stay."""
        self.layers_done = 0
        self._mark()

    def _mark(self) -> None:
        if self._folder is not None:
            self._file.flush()
            content = {"layout": self._layout, "depths_done": self.depths_done, "layers_done": self.layers_done}
            write_text_atomically(self._folder / ACTIVATIONS_MARKER_NAME, json.dumps(content))


def mapped(path: Path, shape: tuple[int, int]) -> np.memmap:
    """Map a file of `shape` bytes; a new file holds zeros, an existing file of that size keeps its content.

    All disk space is allocated now, because running out of space while writing to a mapped page kills the process.
    """
    size = shape[0] * shape[1]
    with open(path, "ab") as file:
        if file.tell() != size:
            file.truncate(size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, max(1, size))
    return np.memmap(path, dtype=np.uint8, mode="r+", shape=shape)
