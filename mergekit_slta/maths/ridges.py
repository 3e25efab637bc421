"""The candidate ridges of `objective: joint`, scored together, and the rule that chooses one.

Scope: what the solve at the experts and the Gauss-Newton step share; tensors only, float64 on the CPU.

Both solve among rows, with C = (K + s I)^-1, K the [N, N] matrix of the rows' inner products and s the ridge. All
candidates share K's eigenvectors V: C = V diag(1 / (values + s)) V^T, so one decomposition replaces an inverse for
every candidate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = tuple(10 ** (exponent / 4) for exponent in range(-12, 9))
"""Candidates for rho, 0.001 to 100, in ascending order."""
SMALLEST_RIDGE = RIDGES[0]
_EQUAL = 1e-9
"""Scores closer than this, relative to the largest, are equal: they differ by rounding."""


@dataclass(frozen=True)
class Spectrum:
    """Eigendecomposition of K.

    Attributes:
        values: [N].
        vectors: [N, N], one eigenvector in each column.
        own: [R, S, N] rows of `vectors` that belong to the S samples of each calibration row.
    """

    values: Tensor
    vectors: Tensor
    own: Tensor

    @classmethod
    def of(cls, kernel: Tensor, groups: Tensor) -> Spectrum:
        """Decompose K.

        Args:
            kernel: [N, N], symmetric and positive semidefinite.
            groups: [R, S] int64, the places in K of each row's samples.
        """
        values, vectors = torch.linalg.eigh(kernel)
        return cls(values, vectors, vectors[groups])

    def inverse(self, shift: float) -> Tensor:
        """[N] eigenvalues of C."""
        return 1 / (self.values + shift)

    def solve_own(self, inverse: Tensor, right: Tensor) -> Tensor:
        """C_gg^-1 right_g for the samples g of every row: [R, S] -> [R, S]."""
        blocks = (self.own * inverse) @ self.own.transpose(1, 2)  # [R, S, S]
        return torch.linalg.solve(blocks, right)


def smallest_error(errors: Sequence[float]) -> float:
    """The candidate with the smallest error; the smallest such candidate where several are equal."""
    finite = [error for error in errors if math.isfinite(error)]  # others come from derivatives that overflow
    bound = min(finite, default=0.0) + _EQUAL * max(map(abs, finite), default=0.0)
    return next((ridge for ridge, error in zip(RIDGES, errors, strict=True) if error <= bound), SMALLEST_RIDGE)


def one_standard_error(parts: Tensor, task: Tensor) -> float:
    """The largest candidate whose error is within one standard error of the smallest (Breiman et al., 1984).

    Args:
        parts: [candidates, R] the terms of each candidate's error, one for every row.
        task: [R] the task of each row.
    """
    errors = parts.sum(1).tolist()
    best = RIDGES.index(smallest_error(errors))
    bound = errors[best] + _standard_error(parts[best], task) + _EQUAL * abs(errors[best])
    within = (ridge for ridge, error in zip(RIDGES, errors, strict=True) if error <= bound)
    return max(within, default=RIDGES[best])


def _standard_error(parts: Tensor, task: Tensor) -> float:
    """Standard error of a sum over rows that are sampled task by task."""
    variance = 0.0
    for number in torch.unique(task).tolist():
        mine = parts[task == number]
        if len(mine) > 1:
            variance += len(mine) * float(mine.var())
    return variance**0.5
