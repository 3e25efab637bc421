"""Candidate ridges of `objective: joint`. For the solve at the experts: score all of them from one eigendecomposition,
and choose one.

Scope: tensors only, float64 on the CPU. The dual system over rows has C = (K + s I)^-1, where K is the [N, N] matrix of
the rows' inner products and s the ridge. With the eigenvectors V of K, C = V diag(1 / (values + s)) V^T. So one
decomposition replaces one inverse per candidate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = tuple(10 ** (exponent / 4) for exponent in range(-12, 9))
"""Candidates for rho at the experts, 0.001 to 100, in ascending order."""
SMALLEST_RIDGE = RIDGES[0]
FIRST_RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Ridges of the first step."""
RIDGE_FACTORS = (1 / 3, 1.0, 3.0)
"""Ridges of a later step, as multiples of the best ridge of the step before."""
FAILED_FACTOR = 10.0
"""A step that makes things worse raises the ridges of the next one by this factor."""
_EQUAL = 1e-9
"""Scores whose difference, relative to the largest, is below this are equal up to rounding."""


@dataclass(frozen=True)
class Spectrum:
    """Eigendecomposition of K.

    Attributes:
        values: [N].
        vectors: [N, N], one eigenvector in each column.
        groups: the groups of rows that are left out together: n -> [G, n, N] the rows of `vectors` of the G groups that
            have n samples.
    """

    values: Tensor
    vectors: Tensor
    groups: dict[int, Tensor]

    @classmethod
    def of(cls, kernel: Tensor, groups: Sequence[Tensor]) -> Spectrum:
        """Decompose K.

        Args:
            kernel: [N, N], symmetric and positive semidefinite.
            groups: [n] int64 for each group, indices in K of its samples.
        """
        values, vectors = torch.linalg.eigh(kernel)
        sizes = sorted({len(group) for group in groups})
        by_size = {size: torch.stack([group for group in groups if len(group) == size]) for size in sizes}
        return cls(values, vectors, {size: vectors[places] for size, places in by_size.items()})

    def inverse(self, shift: float) -> Tensor:
        """[N] eigenvalues of C, for the ridge `shift`."""
        return 1 / (self.values + shift)

    def left_out_error(self, inverse: Tensor, target: Tensor) -> float:
        """Sum of the squared errors of every group's prediction without it: |C_gg^-1 (C y)_g|^2.

        Args:
            inverse: [N] from the method `inverse`.
            target: [N] V^T y.
        """
        total = 0.0
        for own in self.groups.values():
            blocks = (own * inverse) @ own.transpose(1, 2)  # [G, n, n]
            total += float(torch.linalg.solve(blocks, own @ (inverse * target)).square().sum())
        return total


def smallest_error(errors: Sequence[float]) -> float:
    """The candidate of `RIDGES` with the smallest error; of several with equal errors, the smallest candidate."""
    finite = [error for error in errors if math.isfinite(error)]  # overflowing derivatives give infinite errors
    bound = min(finite, default=0.0) + _EQUAL * max(map(abs, finite), default=0.0)
    return next((ridge for ridge, error in zip(RIDGES, errors, strict=True) if error <= bound), SMALLEST_RIDGE)
