"""Candidate ridges: scored from one eigendecomposition as from an inverse for each, and chosen by the stated rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_slta.maths.joint import solve_joint
from mergekit_slta.maths.ridges import RIDGES, Spectrum, smallest_error


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    unknowns=st.integers(1, 40),
)
def test_one_decomposition_scores_as_the_explicit_inverse(seed, sizes, unknowns):
    """The squared prediction error of left-out groups of any sizes under every candidate, whatever the rank."""
    generator = np.random.default_rng(seed)
    size = sum(sizes)
    z, y = generator.normal(size=(size, unknowns)), generator.normal(size=size)
    kernel = z @ z.T
    groups = np.split(generator.permutation(size), np.cumsum(sizes)[:-1])
    unit = (z**2).sum() / unknowns
    spectrum = Spectrum.of(torch.from_numpy(kernel), [torch.from_numpy(group) for group in groups])
    target = spectrum.vectors.T @ torch.from_numpy(y)
    for ridge in RIDGES:
        inverse = np.linalg.inv(kernel + ridge * unit * np.eye(size))
        np.testing.assert_allclose(np.sort(spectrum.inverse(ridge * unit)), np.linalg.eigvalsh(inverse), rtol=1e-7)
        errors = [np.linalg.solve(inverse[np.ix_(own, own)], (inverse @ y)[own]) for own in groups]
        expected = sum((error**2).sum() for error in errors)
        assert spectrum.left_out_error(spectrum.inverse(ridge * unit), target) == pytest.approx(expected, rel=1e-7)


def test_left_out_errors_are_those_of_fits_without_the_group():
    """Prediction of each group's values from a ridge regression on the others."""
    generator = np.random.default_rng(3)
    z, y, shift = generator.normal(size=(6, 4)), generator.normal(size=6), 0.7
    groups = [np.array([0, 3, 5]), np.array([1]), np.array([2, 4])]
    expected = 0.0
    for own in groups:
        others = np.setdiff1d(np.arange(6), own)
        fitted = np.linalg.solve(z[others].T @ z[others] + shift * np.eye(4), z[others].T @ y[others])
        expected += ((y[own] - z[own] @ fitted) ** 2).sum()
    spectrum = Spectrum.of(torch.from_numpy(z @ z.T), [torch.from_numpy(own) for own in groups])
    found = spectrum.left_out_error(spectrum.inverse(shift), spectrum.vectors.T @ torch.from_numpy(y))
    assert found == pytest.approx(expected)


def case(seed: int) -> tuple[dict, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    slopes = {f"part{number}": torch.randn(9, 3, 3, generator=generator, dtype=torch.float64) for number in range(3)}
    return slopes, torch.arange(3).repeat_interleave(3)


@pytest.mark.parametrize("seed", range(8))
def test_the_chosen_ridge_has_the_smallest_error_of_explicit_solves(seed):
    """At the experts: the best of the residuals that solving with each candidate gives."""
    slopes, row_task = case(seed)
    residuals = [solve_joint(slopes, row_task, ridge=ridge).residual for ridge in RIDGES]
    assert solve_joint(slopes, row_task).ridge == RIDGES[int(np.argmin(residuals))]


def test_equal_errors_take_the_smallest_ridge():
    """Differences by rounding do not decide."""
    assert smallest_error([1.0] * len(RIDGES)) == RIDGES[0]
    assert smallest_error([1.0 + 1e-13, *[1.0] * (len(RIDGES) - 1)]) == RIDGES[0]
    assert smallest_error([2.0, 1.0, *[3.0] * (len(RIDGES) - 2)]) == RIDGES[1]


def test_errors_that_are_not_finite_are_not_chosen():
    """Of none that is finite, the smallest candidate."""
    rest = [3.0] * (len(RIDGES) - 2)
    assert smallest_error([float("nan"), 1.0, *rest]) == RIDGES[1]
    assert smallest_error([float("inf"), 1.0, *rest]) == RIDGES[1]
    assert smallest_error([float("inf")] * len(RIDGES)) == RIDGES[0]
