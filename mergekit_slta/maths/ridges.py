"""Candidate ridges of `objective: joint`: score all of them from one eigendecomposition, and choose one.

Scope: shared by the solve at the experts and the Gauss-Newton step; tensors only, float64 on the CPU.

Both solve a dual system over rows, with C = (K + s I)^-1, where K is the [N, N] matrix of the rows' inner products and
s the ridge. With the eigenvectors V of K, C = V diag(1 / (values + s)) V^T. So one decomposition replaces one inverse
per candidate.
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
"""Scores whose difference, relative to the largest, is below this are equal up to rounding."""


@dataclass(frozen=True)
class Spectrum:
    """Eigendecomposition of K.

    Attributes:
        values: [N].
        vectors: [N, N], one eigenvector in each column.
        own: [R, S, N] the rows of `vectors` of each calibration row's S samples.
    """

    values: Tensor
    vectors: Tensor
    own: Tensor

    @classmethod
    def of(cls, kernel: Tensor, groups: Tensor) -> Spectrum:
        """Decompose K.

        Args:
            kernel: [N, N], symmetric and positive semidefinite.
            groups: [R, S] int64, indices in K of each row's samples.
        """
        values, vectors = torch.linalg.eigh(kernel)
        return cls(values, vectors, vectors[groups])

    def inverse(self, shift: float) -> Tensor:
        """[N] eigenvalues of C, for the ridge `shift`."""
        return 1 / (self.values + shift)

    def solve_own(self, inverse: Tensor, right: Tensor) -> Tensor:
        """C_gg^-1 right_g for the samples g of every row: [R, S] -> [R, S]; `inverse` is from the method `inverse`."""
        blocks = (self.own * inverse) @ self.own.transpose(1, 2)  # [R, S, S]
        return torch.linalg.solve(blocks, right)


def smallest_error(errors: Sequence[float]) -> float:
    """The candidate of `RIDGES` with the smallest error; of several with equal errors, the smallest candidate."""
    finite = [error for error in errors if math.isfinite(error)]  # overflowing derivatives give infinite errors
    bound = min(finite, default=0.0) + _EQUAL * max(map(abs, finite), default=0.0)
    return next((ridge for ridge, error in zip(RIDGES, errors, strict=True) if error <= bound), SMALLEST_RIDGE)


def one_standard_error(parts: Tensor, task: Tensor) -> float:
    """The largest candidate whose error is within one standard error of the smallest (Breiman et al., 1984).

    Args:
        parts: [candidates, R] each candidate's error, as one term per row.
        task: [R] the task of each row.
    """
    errors = parts.sum(1).tolist()
    best = RIDGES.index(smallest_error(errors))
    bound = errors[best] + _standard_error(parts[best], task) + _EQUAL * abs(errors[best])
    within = (ridge for ridge, error in zip(RIDGES, errors, strict=True) if error <= bound)
    return max(within, default=RIDGES[best])


def _standard_error(parts: Tensor, task: Tensor) -> float:
    """Standard error of the sum of `parts` [R] over rows, which are sampled separately for each task."""
    variance = 0.0
    for number in torch.unique(task).tolist():
        mine = parts[task == number]
        if len(mine) > 1:
            variance += len(mine) * float(mine.var())
    return variance**0.5
