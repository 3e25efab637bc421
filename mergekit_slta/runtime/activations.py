"""Store the features of all batches between layers, and gradients with respect to them, in memory or in a mapped file.

Scope: storage. The size depends on tokens, width and stored depths, not on the model's weights. The file outlives a
killed run; the next run continues after the last finished depth or layer. On a GPU, what a layer reads and writes is
kept there, and copied once for all batches.
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
from mergekit_slta.runtime.devices import holds_features


def activation_bytes(tokens: int, depths: int, samples: int, width: int, dtype: torch.dtype) -> int:
    """Bytes of an `ActivationStore` for `tokens` tokens of all batches; the other arguments are those of the store."""
    return tokens * (depths + 2 * samples) * width * dtype.itemsize


class ActivationStore:
    """Features of every batch at several depths, and gradients with respect to them.

    Depth 0 is the output of the embeddings, depth n the output of layer n - 1.

    Args:
        lengths: tokens of each batch.
        depths: number of stored depths: layers + 1 for a backward pass, 2 (ping-pong) for a forward pass, 1 to
            overwrite in place.
        samples: S, number of gradients per token; 0 for a forward pass.
        width: d, the model's hidden size.
        dtype: dtype of features and gradients.
        folder: folder for the file; None keeps everything in memory.
        device: where the features are used. On another device than the CPU, those of a layer's input and output are
            kept there, too, if they fit.

    Attributes:
        depths_done: number of depths at which every batch's features are stored.
        layers_done: number of layers (head and embeddings included) whose backward pass is finished.

    Raises:
        OutputError: the file cannot be created.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        depths: int,
        samples: int,
        width: int,
        dtype: torch.dtype,
        folder: Path | None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._tokens, total = [], 0  # every batch's slice of the token axis
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
        pages = total * width * dtype.itemsize * 2 * (1 + samples)  # the one that is read, and the one that is written
        device = device if holds_features(torch.device(device), pages) else "cpu"
        features, gradients = list(stored[:depths]), list(stored[depths:].view(2, samples, total, width))
        self._features, self._gradients = _Pages(features, device), _Pages(gradients, device)

    def features(self, depth: int, batch: int) -> Tensor:
        """[tokens, d] features of a batch at a depth."""
        return self._features.read(depth)[self._tokens[batch]]

    def put_features(self, depth: int, batch: int, features: Tensor) -> None:
        """Store a batch's features [tokens, d] at a depth; they can be read after `finish_depth`."""
        self._features.written(depth)[self._tokens[batch]] = features

    def new_features(self) -> Tensor:
        """[all tokens, d] features at the depth that is being written."""
        return self._features.written(self.depths_done)

    def finish_depth(self) -> None:
        """Record that every batch's features at the next depth are stored."""
        self._features.finish(self.depths_done)
        self.depths_done += 1
        self._mark()

    def gradients(self, batch: int) -> Tensor:
        """[S, tokens, d] gradients of a batch with respect to the output of the current layer."""
        return self._gradients.read(self.layers_done)[:, self._tokens[batch]]

    def put_gradients(self, batch: int, gradients: Tensor) -> None:
        """Store a batch's gradients [S, tokens, d] by the layer's input; they can be read after `finish_layer`."""
        self._gradients.written(self.layers_done + 1)[:, self._tokens[batch]] = gradients

    def new_gradients(self) -> Tensor:
        """[S, all tokens, d] gradients that are being written."""
        return self._gradients.written(self.layers_done + 1)

    def finish_layer(self) -> None:
        """Record that a layer's backward pass is finished and its results are saved."""
        self._gradients.finish(self.layers_done + 1)
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


class _Pages:
    """Tensors in host memory that take turns: number n is `stored[n % len(stored)]`.

    On another device than the CPU, the page that is read and the one that is written are kept there.
    """

    def __init__(self, stored: list[Tensor], device: torch.device | str) -> None:
        self._stored, self._device = stored, torch.device(device)
        self._here: dict[int, Tensor] = {}

    def _page(self, number: int) -> Tensor:
        return self._stored[number % len(self._stored)]

    def read(self, number: int) -> Tensor:
        """A page that was finished."""
        if self._device.type == "cpu":
            return self._page(number)
        if number not in self._here:
            self._here = {number: self._page(number).to(self._device)}
        return self._here[number]

    def written(self, number: int) -> Tensor:
        """A page to write to."""
        if self._device.type == "cpu":
            return self._page(number)
        if number not in self._here:
            self._here[number] = torch.empty_like(self._page(number), device=self._device)
        return self._here[number]

    def finish(self, number: int) -> None:
        """Copy a page that was written to host memory, and drop the others from the device."""
        if number in self._here:
            self._page(number).copy_(self._here[number])
            self._here = {number: self._here[number]}


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
