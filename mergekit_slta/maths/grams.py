"""Gram matrices of a submodule's output changes under T experts (the terms of Eq. 14)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def row_grams(outputs: Sequence[Tensor], lengths: Sequence[int], base: Tensor | None = None) -> Tensor:
    """Compute G_x[j, k] = <df_j(x), df_k(x)> of packed rows x, summed over a row's tokens and features.

    Args:
        outputs: T tensors [N, d], any floating dtype; the rows' tokens are concatenated, N = sum(lengths).
        lengths: tokens of each row.
        base: [N, d] outputs to subtract; None if `outputs` already are differences.

    Returns:
        [rows, T, T] float64, on the outputs' device. Products and sums are in float64, because df is a small difference
        of large outputs and G squares it.
    """
    if outputs[0].device.type == "mps":  # the only backend without float64
        outputs, base = [part.cpu() for part in outputs], None if base is None else base.cpu()
    grams = []
    start = 0
    for length in lengths:  # one row at a time, so that its differences fit into the cache
        own = slice(start, start + length)
        start += length
        first = outputs[0][own]
        changes = torch.empty((len(outputs), *first.shape), dtype=torch.float64, device=first.device)
        for into, part in zip(changes, outputs, strict=True):
            into.copy_(part[own] if base is None else part[own] - base[own])
        flat = changes.flatten(1)  # [T, tokens * d]
        grams.append(flat @ flat.T)
    return torch.stack(grams)
