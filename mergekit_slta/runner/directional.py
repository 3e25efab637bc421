"""Inner products of gradients with the experts' changes, gathered by submodule.

Scope: which part of a tensor belongs to which submodule, and sums. Gradients come as others have made them; those of a
linear map in blocks that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_slta.models.submodules import Submodule

_BLOCK = {"cpu": 2**17}
"""Elements of a weight's gradient that are made at a time: they should stay in the cache."""
_BLOCK_ELSEWHERE = 2**24


@dataclass(frozen=True)
class _Piece:
    """Part of a tensor that belongs to a submodule: `axis` None is all of it."""

    submodule: str
    axis: int | None
    start: int
    stop: int


class DirectionalDerivatives:
    """Sums by submodule, [rows, S, T] float64 on the CPU.

    Args:
        submodules: which are asked for; tensors of no other are passed over.
        shape: rows, S draws, T experts.
    """

    def __init__(self, submodules: Sequence[Submodule], shape: tuple[int, int, int]) -> None:
        self._shape = shape
        self._found: dict[str, Tensor] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        for submodule in submodules:
            for tensor in submodule.tensors:
                own = [part for part in submodule.slices if part.tensor == tensor]
                parts = [_Piece(submodule.name, *part[1:]) for part in own] or [_Piece(submodule.name, None, 0, 0)]
                self._pieces.setdefault(tensor, []).extend(parts)

    def take(self) -> dict[str, Tensor]:
        """What was added since the last time, by submodule."""
        found, self._found = self._found, {}
        return found

    def add(
        self, name: str, row: int, draw: int, gradient: Tensor, changes: Tensor, start: int = 0, *, whole: bool = False
    ) -> None:
        """Add <gradient, change> to the submodules that a tensor belongs to.

        Args:
            name: the tensor.
            row, draw: whose gradient.
            gradient: [...] by the tensor's rows from `start` on.
            changes: [T, ...] the experts' changes of the same rows.
            start: see `gradient`.
            whole: the rows given stand for the whole tensor (a table's rows that occur).
        """
        for piece in self._pieces.get(name, ()):
            mine, theirs = gradient, changes
            if piece.axis == 0 and not whole:
                low, high = max(piece.start - start, 0), min(piece.stop - start, len(gradient))
                if low >= high:
                    continue
                mine, theirs = gradient[low:high], changes[:, low:high]
            elif piece.axis == 1:
                mine, theirs = gradient[:, piece.start : piece.stop], changes[:, :, piece.start : piece.stop]
            product = theirs.reshape(self._shape[2], -1).float() @ mine.reshape(-1).float()
            if piece.submodule not in self._found:
                self._found[piece.submodule] = torch.zeros(self._shape, dtype=torch.float64, device="cpu")
            self._found[piece.submodule][row, draw] += product.cpu().double()

    def add_linear(self, name: str, row: int, draw: int, inputs: Tensor, slope: Tensor, changes: Tensor) -> None:
        """Add a linear map's, from what it was given [.., in] and the gradient by what it made [.., out]."""
        inputs, slope = inputs.flatten(0, -2), slope.flatten(0, -2)
        block = block_rows(inputs)
        for start in range(0, slope.shape[1], block):
            part = slice(start, start + block)
            self.add(name, row, draw, slope[:, part].T @ inputs, changes[:, part], start)


def block_rows(inputs: Tensor) -> int:
    """Rows of the gradient of a linear map, of inputs [.., in], that are made at a time."""
    return max(1, _BLOCK.get(inputs.device.type, _BLOCK_ELSEWHERE) // inputs.shape[-1])


def task_vectors(tensors: Sequence[Tensor]) -> Tensor:
    """[T, ...]: every expert's tensor less the base's, which comes first."""
    return torch.stack([tensor - tensors[0] for tensor in tensors[1:]])
