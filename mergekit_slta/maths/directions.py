"""Closed forms that combine experts from their weights alone: the directions that a solve adds to the experts.

Scope: one tensor at a time; no data, no names. SWUDI-A (arXiv 2606.07289), for the task vectors X_n [out, in] of a
matrix, with w_n = 1 / ||X_n||^2:

    C = sum_n w_n X_n^T X_n = Q L Q^T,   D = sum_n w_n X_n X_n^T X_n,   S = sum_n X_n
    k = ceil((sum sqrt L)^2 / sum L) leading directions of C
    X = S - S Q_k Q_k^T + D Q_k L_k^-1 Q_k^T

In the space of Q_k, X minimises sum_n w_n ||(X - X_n) X_n^T||^2: an expert's change stands for the inputs that it was
trained on. Outside, X is the sum. A tensor that is no matrix is averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 2**24
"""Elements of a task vector that are in memory at a time, beside matrices of size in x in."""
_ROUNDING = 1e-12
"""Eigenvalues below this share of the largest are rounding errors of float64."""


def is_matrix(dim: int) -> bool:
    """Whether a tensor with `dim` dimensions holds matrices: one, or one for each expert of an MoE layer."""
    return dim in (2, 3)


def combine(
    form: str, base: Tensor, experts: Sequence[Tensor], *, is_transposed: bool = False, is_averaged: bool = False
) -> Tensor:
    """The base plus a closed form of the experts' changes.

    Args:
        form: "swudi_a".
        base: theta_0, any shape and floating dtype.
        experts: theta_n, with the base's shape and device.
        is_transposed: the tensor holds matrices [in, out], and not [out, in].
        is_averaged: the tensor has two or three dimensions, and holds no matrices.

    Returns:
        A tensor like the base in float32 (float64 for a float64 base). The eigenproblem is solved in float64; only the
        last products, whose rounding is that of the result, are in the dtype of the result.
    """
    if base.device.type == "mps":  # the only backend without float64
        parts = [tensor.cpu() for tensor in (base, *experts)]
        return combine(form, parts[0], parts[1:], is_transposed=is_transposed, is_averaged=is_averaged).to(base.device)
    wide = torch.promote_types(base.dtype, torch.float32)
    combined = torch.empty_like(base, dtype=wide, memory_format=torch.contiguous_format)
    if is_averaged or not is_matrix(base.dim()):
        flat = [tensor.reshape(-1) for tensor in (combined, base, *experts)]
        for into, origin, *others in zip(*(tensor.split(_BLOCK_ELEMENTS) for tensor in flat), strict=True):
            change = sum(other.double() - origin.double() for other in others)
            into.copy_(origin.double() + change / len(experts))
    else:
        matrices = (tensor.reshape(-1, *base.shape[-2:]) for tensor in (combined, base, *experts))
        for parts in zip(*matrices, strict=True):
            into, origin, *others = (part.T if is_transposed else part for part in parts)
            CLOSED_FORMS[form](into, origin, others)
    # So that a merge with weight 1 returns the tensor itself: `export` relies on that.
    return combined.sub_(base).add_(base)


def _swudi_a(into: Tensor, base: Tensor, experts: Sequence[Tensor]) -> None:
    """Write theta_0 + X into `into`; all are [out, in]. An expert that equals the base is left out."""
    norms = [sum(float(part.square().sum()) for _, part in _blocks(base, expert)) for expert in experts]
    changed = [(expert, 1 / norm) for expert, norm in zip(experts, norms, strict=True) if norm > 0]
    if not changed:
        into.copy_(base)
        return
    grams = [_gram(base, expert) for expert, _ in changed] if base.shape[0] >= base.shape[1] else None
    values, vectors = _leading(base, changed, grams)
    projections = []  # of every expert: w_n X_n^T X_n Q_k L_k^-1 - Q_k, [in, k]
    for place, (expert, weight) in enumerate(changed):
        own = grams[place] @ vectors if grams else _times_gram(base, expert, vectors)
        projections.append((own * (weight / values) - vectors).to(into.dtype))
    vectors = vectors.to(into.dtype)
    for parts in zip(*(_blocks(base, expert, into.dtype) for expert, _ in changed), strict=True):
        inside = sum(part @ own for (_, part), own in zip(parts, projections, strict=True))
        change = torch.addmm(sum(part for _, part in parts), inside, vectors.T)
        rows = parts[0][0]
        into[rows] = change.add_(base[rows])


def _blocks(base: Tensor, expert: Tensor, dtype: torch.dtype = torch.float64) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of a task vector, some at a time, so that a large table is never copied whole."""
    size = max(1, _BLOCK_ELEMENTS // base.shape[1])
    for start in range(0, len(base), size):
        rows = slice(start, min(start + size, len(base)))
        yield rows, expert[rows].to(dtype) - base[rows].to(dtype)


def _gram(base: Tensor, expert: Tensor) -> Tensor:
    """X^T X, [in, in]."""
    gram = torch.zeros((base.shape[1], base.shape[1]), dtype=torch.float64, device=base.device)
    for _, part in _blocks(base, expert):
        gram.addmm_(part.T, part)
    return gram


def _times_gram(base: Tensor, expert: Tensor, vectors: Tensor) -> Tensor:
    """X^T X V for V [in, k], without a matrix [in, in]."""
    product = torch.zeros_like(vectors)
    for _, part in _blocks(base, expert):
        product.addmm_(part.T, part @ vectors)
    return product


def _leading(
    base: Tensor, changed: Sequence[tuple[Tensor, float]], grams: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """L_k [k] and Q_k [in, k].

    Args:
        base: theta_0, [out, in].
        changed: the experts that change the matrix, each with its w_n.
        grams: their X_n^T X_n, if these are not larger than the experts.
    """
    width = base.shape[1]
    is_flat = len(changed) * len(base) < width
    if is_flat:  # C = Y^T Y has the eigenvalues of the smaller matrix Y Y^T
        stacked = torch.cat([part * weight**0.5 for expert, weight in changed for _, part in _blocks(base, expert)])
        gram = stacked @ stacked.T
    else:
        parts = grams or (_gram(base, expert) for expert, _ in changed)
        gram = torch.zeros((width, width), dtype=torch.float64, device=base.device)
        for part, (_, weight) in zip(parts, changed, strict=True):
            gram.add_(part, alpha=weight)
    values, vectors = torch.linalg.eigh(gram)
    values = torch.where(values > _ROUNDING * values.max(), values, 0.0)
    share = float(values.sqrt().sum().square() / values.sum())
    kept = ceil(share * (1 - _ROUNDING))
    values, vectors = values[-kept:], vectors[:, -kept:]
    return values, stacked.T @ (vectors / values.sqrt()) if is_flat else vectors


CLOSED_FORMS = {"swudi_a": _swudi_a}
"""name -> function that writes the base plus the combined change of a matrix into a tensor."""
