"""Directional derivatives: inner products of gradients with the experts' task vectors, summed per submodule and row.

Scope: the inner products, for the slices of each submodule, and their sums. For a module that works token by token, the
inner product of its weight's gradient with a task vector is that of the gradient with respect to its output and the
output's change along the task vector. So no gradient of a weight is computed, and the rows of a batch can be told
apart. All other gradients are from autograd, one row at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergekit_slta.checkpoints.tensors import Weights
from mergekit_slta.data.batches import TokenRows
from mergekit_slta.libraries.torch import tree_map
from mergekit_slta.models.hooks import ModuleCall
from mergekit_slta.models.submodules import Slice, Submodule

BLOCK_ELEMENTS = {"cpu": 2**17}
"""Elements of a matrix that are merged or multiplied at a time, by type of device. For a CPU they fit its cache."""
_BLOCK_ELEMENTS_ELSEWHERE = 2**24
CHANGES_ELEMENTS = 2**26
"""Maximum number of changes of a linear map's outputs in memory, over tokens, task vectors and outputs."""


class DirectionalDerivatives:
    """u[row, s, t] = <d loss_s / d theta, theta_t - theta_0> of every submodule's tensors: [rows, S, T] float64.

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
        """Return and reset the sums, on the CPU: submodule -> [rows, S, T]; submodules without any are left out."""
        sums, self._sums = self._sums, {}
        return {name: found.cpu().double() for name, found in sums.items()}

    def add(self, name: str, row: int, loss: int, gradient: Tensor, vectors: Tensor) -> None:
        """Add the inner products of a tensor's gradient with its task vectors, to the submodules that own the tensor.

        Args:
            name: the tensor.
            row, loss: indices of the row and of its loss.
            gradient: its gradient.
            vectors: [T, ...] the experts' task vectors.
        """
        for submodule, part in self._owners.get(name, ()):
            own, along = gradient, vectors
            if part is not None:
                own = own.narrow(part.axis, part.start, part.stop - part.start)
                along = along.narrow(1 + part.axis, part.start, part.stop - part.start)
            products = along.reshape(len(along), -1).to(_wide(own)) @ own.flatten().to(_wide(own))  # [T]
            self._sums_of(submodule, products)[row, loss] += products

    def add_products(self, name: str, rows: Tensor, products: Tensor) -> None:
        """Add inner products that are known already, to the submodules that own the whole tensor `name`.

        Args:
            name: the tensor.
            rows: [n] int64 indices of rows.
            products: [n, S, T].
        """
        for submodule, _ in self._owners.get(name, ()):
            self._add(submodule, rows, products)

    def add_module(
        self, path: str, module: nn.Module, call: ModuleCall, rows: TokenRows, weights: Weights, vectors: Weights
    ) -> None:
        """Add the inner products of a module's own tensors, from one of its calls.

        Args:
            path, module: the module and its path.
            call: the call, after a backward pass for each loss; its rows are known, see `rows_of_outputs`.
            rows: the row of each token.
            weights: the tensors that the module was called with.
            vectors: name -> [T, ...] task vectors; tensors of other modules are ignored.
        """
        index = rows_of_outputs(call, rows)
        assert index is not None
        gradients = torch.stack([gradient.reshape(len(index), -1) for gradient in call.gradients], dim=1)  # [n, S, out]
        if type(module) is nn.Linear:
            self._add_linear(path, call.first.detach().reshape(len(index), -1), gradients, index, vectors)
            return
        for key, _ in module.named_parameters(recurse=False):
            name = f"{path}.{key}"
            changes: Tensor | None = None  # [n, T, out] along the whole tensor
            for submodule, part in self._owners.get(name, ()) if name in vectors else ():
                if changes is None:
                    changes = _changes(module, path, key, call, len(index), weights, vectors[name])
                outputs = slice(None) if part is None else slice(part.start, part.stop)
                self._add(submodule, index, _products(gradients[..., outputs], changes[..., outputs]))

    def _add_linear(self, path: str, inputs: Tensor, gradients: Tensor, rows: Tensor, vectors: Weights) -> None:
        """`add_module` for a linear map.

        Args:
            path: its path.
            inputs: [n, in].
            gradients: [n, S, out].
            rows: [n] int64.
            vectors: see `add_module`.
        """
        if (bias := vectors.get(f"{path}.bias")) is not None:
            for submodule, part in self._owners.get(f"{path}.bias", ()):
                outputs = slice(None) if part is None else slice(part.start, part.stop)
                along = bias[:, outputs].expand(len(inputs), -1, -1)
                self._add(submodule, rows, _products(gradients[..., outputs], along))
        along = vectors[f"{path}.weight"]  # [T, out, in]
        owners = self._owners.get(f"{path}.weight", ())
        size = max(1, CHANGES_ELEMENTS // along[..., 0].numel())
        for own_inputs, own_gradients, own_rows in zip(
            *(each.split(size) for each in (inputs, gradients, rows)), strict=True
        ):
            changes: Tensor | None = None  # [n, T, out]
            for submodule, part in owners:
                if part is not None and part.axis == 1:
                    columns = slice(part.start, part.stop)
                    products = _products(own_gradients, _linear(own_inputs[:, columns], along[..., columns]))
                else:
                    changes = _linear(own_inputs, along) if changes is None else changes
                    outputs = slice(None) if part is None else slice(part.start, part.stop)
                    products = _products(own_gradients[..., outputs], changes[..., outputs])
                self._add(submodule, own_rows, products)

    def _add(self, submodule: str, rows: Tensor, products: Tensor) -> None:
        """Add [n, S, T] inner products to the sums of `rows` [n]."""
        sums = self._sums_of(submodule, products)
        sums.index_add_(0, rows.to(sums.device, non_blocking=True), products.to(sums.dtype))

    def _sums_of(self, submodule: str, products: Tensor) -> Tensor:
        """A submodule's sums, on the device of `products`."""
        if submodule not in self._sums:
            dtype = torch.float32 if products.device.type == "mps" else torch.float64
            self._sums[submodule] = torch.zeros(self._shape, dtype=dtype, device=products.device)
        return self._sums[submodule]


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype in which a tensor's inner products are summed."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _products(gradients: Tensor, changes: Tensor) -> Tensor:
    """[n, S, out] gradients and [n, T, out] changes -> [n, S, T] inner products."""
    return torch.bmm(gradients.to(_wide(gradients)), changes.to(_wide(gradients)).transpose(1, 2))


def _linear(inputs: Tensor, along: Tensor) -> Tensor:
    """[n, in] inputs and T matrices [T, out, in] -> [n, T, out]."""
    return nn.functional.linear(inputs, along.flatten(0, 1)).view(len(inputs), len(along), -1)


def _changes(
    module: nn.Module, path: str, key: str, call: ModuleCall, count: int, weights: Weights, vectors: Tensor
) -> Tensor:
    """Change of a module's output along the task vectors of one of its tensors (Jacobian-vector products).

    Args:
        module, path: the module and its path; it is no linear map.
        key: the tensor's name in the module.
        call: the call, for its inputs.
        count: n, number of vectors of the output along its last axis.
        weights: the tensors that the module was called with.
        vectors: [T, ...] task vectors of the tensor.

    Returns:
        [n, T, out].
    """
    inputs, named = tree_map(_detached, (call.inputs, call.named))
    own = {name: weights[f"{path}.{name}"].detach() for name, _ in module.named_parameters(recurse=False)}
    own[key].requires_grad_()
    with torch.enable_grad():
        output = functional_call(module, own, inputs, named)
        # The gradient by the tensor is linear in the cotangent, and the derivative of that map is the Jacobian.
        cotangent = torch.zeros_like(output, requires_grad=True)
        (gradient,) = torch.autograd.grad(output, own[key], cotangent, create_graph=True)
    found = [
        torch.autograd.grad(gradient, cotangent, vector, retain_graph=number < len(vectors) - 1)[0]
        for number, vector in enumerate(vectors)
    ]
    return torch.stack([each.reshape(count, -1) for each in found], dim=1)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def rows_of_outputs(call: ModuleCall, rows: TokenRows) -> Tensor | None:
    """The row of each vector of a module's output along its last axis, [n] int64.

    Args:
        call: the module's call.
        rows: the row of each token of the batch.

    Returns:
        None if the shape of the output does not tell the rows apart.
    """
    assert call.shape is not None
    index, shape = rows.index, call.shape
    if rows.is_single:
        return index[0, :1].expand(shape[:-1].numel())
    if shape[:2] == index.shape:
        return index.flatten().repeat_interleave(shape[2:-1].numel())
    if shape[:1] == (index.numel(),):
        return index.flatten().repeat_interleave(shape[1:-1].numel())
    if len(shape) > 2 and shape[:1] == index.shape[:1] and rows.is_by_sequence:
        return index[:, 0].repeat_interleave(shape[1:-1].numel())
    return None


def can_be_added(module: nn.Module) -> bool:
    """Whether a module's derivatives can be computed from its calls: linear maps, embeddings, norms, and all others
    whose own tensors are vectors, if they have no children."""
    if [*module.children()]:
        return False
    if type(module) is nn.Linear or isinstance(module, nn.Embedding):
        return True
    dims = [parameter.dim() for parameter in module.parameters()]
    return bool(dims) and max(dims) <= 1


def block_rows(width: int, device: torch.device) -> int:
    """Rows of a matrix with `width` columns that are merged or multiplied at a time."""
    return max(1, BLOCK_ELEMENTS.get(device.type, _BLOCK_ELEMENTS_ELSEWHERE) // width)


def task_vectors(tensors: Sequence[Tensor]) -> Tensor:
    """[T, ...] theta_t - theta_0 of one tensor; `tensors` are those of every model, the base first."""
    return torch.stack([tensor - tensors[0] for tensor in tensors[1:]])
