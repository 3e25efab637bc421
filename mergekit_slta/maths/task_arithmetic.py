"""Merge one tensor: the base plus the weighted sum of its task vectors (Eq. 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 2**18
"""Elements summed at a time: the operands of a chunk stay in a core's cache, and no second buffer of the tensor's
size is needed."""


class WeightedSlice(NamedTuple):
    """A slice of a tensor and its weights: `alpha` holds one number per expert, in the file's order of models.

    `axis` None stands for the whole tensor.
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
        experts: theta_t in the order of the pieces' alphas; same shape and device. Inputs are never written.
        pieces: slices of the tensor with their alphas; together they cover it once.
        scale: the recipe's `lambda`.
        dtype: of the result; the sum is taken in float32, or float64 for float64 inputs, and cast once.
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
            rows *= 64  # an accelerator wants fewer, larger launches
        for into, origin, *others in zip(*(view.split(rows) for view in views), strict=True):
            start_point = origin.to(wide)
            total = torch.zeros_like(start_point)
            # Rounded step by step as mergekit's task_arithmetic is, so that an exported recipe gives the same digits.
            for weight, other in zip(alpha, others, strict=True):
                if weight != 0.0:
                    total.add_((other.to(wide) - start_point).mul_(weight))
            if scale != 1.0:
                total.mul_(scale)
            into.copy_(total.add_(start_point))
    return merged
