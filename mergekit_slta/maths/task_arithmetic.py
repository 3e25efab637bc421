"""Merge one tensor: the base plus the weighted sum of its task vectors (Eq. 1); and the test for NaN and Inf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 2**18
"""Elements summed at a time. The operands of a chunk fit into a core's cache, and no second buffer of the tensor's size
is needed."""


class WeightedSlice(NamedTuple):
    """The slice [start, stop) of a tensor along `axis`, and its weights. `axis` None means the whole tensor.

    `alpha` has one number per expert, in the order of models of the alphas file.
    """

    axis: int | None
    start: int
    stop: int
    alpha: tuple[float, ...]


def merge_tensor(
    base: Tensor, experts: Sequence[Tensor], pieces: Sequence[WeightedSlice], scale: float, dtype: torch.dtype
) -> Tensor:
    """theta_0 + scale * sum_t alpha_t (theta_t - theta_0)     (Eq. 1 with Algorithm 1's weights)

    Args:
        base: theta_0, any shape and strides.
        experts: theta_t in the order of the pieces' alphas, with the base's shape and device. Inputs are not changed.
        pieces: slices of the tensor with their alphas; together they cover every element once.
        scale: the recipe's `lambda`.
        dtype: dtype of the result. The sum is computed in float32 (float64 for float64 inputs) and cast once.

    Returns:
        The merged tensor, in the shape of `base`.
    """
    wide = torch.promote_types(base.dtype, torch.float32)
    merged = torch.empty_like(base, dtype=dtype, memory_format=torch.contiguous_format)
    for axis, start, stop, alpha in pieces:
        views = [merged, base, *experts]
        if axis is not None:
            views = [view.narrow(axis, start, stop - start) for view in views]
        views = [view.reshape(1) if view.dim() == 0 else view for view in views]
        rows = max(1, _CHUNK_ELEMENTS // max(1, views[0][0].numel())) if views[0].numel() else 1
        if views[0].device.type != "cpu":
            rows *= 64  # fewer, larger kernel launches on an accelerator
        for into, origin, *others in zip(*(view.split(rows) for view in views), strict=True):
            start_point = origin.to(wide)
            total = torch.zeros_like(start_point)
            # Rounds like mergekit's task_arithmetic, so that an exported recipe gives equal bits.
            for weight, other in zip(alpha, others, strict=True):
                if weight != 0.0:
                    total.add_((other.to(wide) - start_point).mul_(weight))
            if scale != 1.0:
                total.mul_(scale)
            into.copy_(total.add_(start_point))
    return merged


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf."""
    # If the sum is finite, so is every element. Only if not (it may overflow), each element is tested.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
