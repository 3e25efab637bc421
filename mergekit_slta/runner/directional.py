"""Directional derivatives: inner products of gradients with the experts' task vectors, summed per submodule.

Scope: the inner products, for the slices of each submodule, and their sums. The gradients are from autograd, except the
weight gradients of linear maps: these are computed here block by block, and never stored completely.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mergekit_slta.models.submodules import Slice, Submodule

BLOCK_ELEMENTS = {"cpu": 2**17}
"""Elements of a linear map's gradient that are computed at a time, by type of device. For a CPU they fit its cache."""
_BLOCK_ELEMENTS_ELSEWHERE = 2**24


class DirectionalDerivatives:
    """u[row, s, t] = <d loss_s / d theta, theta_t - theta_0> of every submodule's tensors: [rows, S, T] float64, on the
    CPU.

    Args:
        submodules: the submodules; tensors that belong to none of them are skipped.
        shape: (number of rows, S losses, T experts).
    """

    def __init__(self, submodules: Sequence[Submodule], shape: tuple[int, int, int]) -> None:
        self._shape = shape
        self._sums: dict[str, Tensor] = {}
        # tensor -> the submodules that own it, each with its slice; None for the whole tensor
        self._owners: dict[str, list[tuple[str, Slice | None]]] = {}
        for submodule in submodules:
            for tensor in submodule.tensors:
                slices = [part for part in submodule.slices if part.tensor == tensor]
                self._owners.setdefault(tensor, []).extend((submodule.name, part) for part in slices or [None])

    def take(self) -> dict[str, Tensor]:
        """Return and reset the sums: submodule -> [rows, S, T]; submodules without any are left out."""
        sums, self._sums = self._sums, {}
        return sums

    def add(
        self, name: str, row: int, loss: int, gradient: Tensor, vectors: Tensor, start: int = 0, *, whole: bool = False
    ) -> None:
        """Add the inner products of a tensor's gradient with its task vectors, to the submodules that own the tensor.

        Args:
            name: the tensor.
            row, loss: indices of the row and of its loss.
            gradient: [n, ...] with respect to n rows of the tensor, from row `start`.
            vectors: [T, n, ...] the experts' task vectors for these rows.
            start: see `gradient`.
            whole: whether the given rows are all that matter (for the embedding table, the rows that occur);
                slices of rows are then ignored.
        """
        for submodule, part in self._owners.get(name, ()):
            own_gradient, own_vectors = gradient, vectors
            if part is not None and part.axis == 0 and not whole:
                low, high = max(part.start - start, 0), min(part.stop - start, len(gradient))
                if low >= high:
                    continue
                own_gradient, own_vectors = gradient[low:high], vectors[:, low:high]
            elif part is not None and part.axis == 1:
                own_gradient, own_vectors = gradient[:, part.start : part.stop], vectors[:, :, part.start : part.stop]
            products = own_vectors.reshape(self._shape[2], -1).float() @ own_gradient.reshape(-1).float()  # [T]
            if submodule not in self._sums:
                self._sums[submodule] = torch.zeros(self._shape, dtype=torch.float64, device="cpu")
            self._sums[submodule][row, loss] += products.cpu().double()

    def add_each(
        self,
        names: Iterable[str],
        row: int,
        loss: int,
        gradients: Iterable[Tensor | None],
        vectors: Mapping[str, Tensor],
    ) -> None:
        """`add` for several whole tensors.

        Args:
            names: the tensors.
            row, loss: as in `add`.
            gradients: per tensor, in its shape; None if the loss does not depend on the tensor.
            vectors: name -> [T, ...] task vectors.
        """
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                self.add(name, row, loss, gradient, vectors[name])

    def add_linear(self, name: str, row: int, loss: int, inputs: Tensor, grad_out: Tensor, vectors: Tensor) -> None:
        """`add` for the weight of a linear map.

        Args:
            name, row, loss: as in `add`.
            inputs: [..., in] inputs of the map.
            grad_out: [..., out] gradient with respect to its output.
            vectors: [T, out, in] task vectors of its weight.
        """
        inputs, grad_out = inputs.flatten(0, -2), grad_out.flatten(0, -2)
        block = block_rows(inputs)
        for start in range(0, grad_out.shape[1], block):
            part = slice(start, start + block)
            self.add(name, row, loss, grad_out[:, part].T @ inputs, vectors[:, part], start)


def block_rows(inputs: Tensor) -> int:
    """Rows of a linear map's weight gradient that are computed at a time, for inputs [..., in]."""
    return max(1, BLOCK_ELEMENTS.get(inputs.device.type, _BLOCK_ELEMENTS_ELSEWHERE) // inputs.shape[-1])


def task_vectors(tensors: Sequence[Tensor]) -> Tensor:
    """[T, ...] theta_t - theta_0 of one tensor; `tensors` are those of every model, the base first."""
    return torch.stack([tensor - tensors[0] for tensor in tensors[1:]])
