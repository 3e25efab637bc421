"""Candidate ridges: scored from one eigendecomposition as from an inverse for each, and chosen by the stated rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_slta.maths.gauss_newton import gauss_newton_step
from mergekit_slta.maths.joint import solve_joint
from mergekit_slta.maths.ridges import RIDGES, Spectrum, one_standard_error, smallest_error


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 8), samples=st.integers(1, 3), unknowns=st.integers(1, 40))
def test_one_decomposition_scores_as_the_explicit_inverse(seed, rows, samples, unknowns):
    """The prediction error of left-out rows under every candidate, to 1e-8, whatever the rank."""
    generator = np.random.default_rng(seed)
    size = rows * samples
    z, y = generator.normal(size=(size, unknowns)), generator.normal(size=size)
    kernel, groups = z @ z.T, np.arange(size).reshape(rows, samples)
    unit = (z**2).sum() / unknowns
    spectrum = Spectrum.of(torch.from_numpy(kernel), torch.from_numpy(groups))
    for ridge in RIDGES:
        inverse = np.linalg.inv(kernel + ridge * unit * np.eye(size))
        expected = np.stack([np.linalg.solve(inverse[np.ix_(own, own)], (inverse @ y)[own]) for own in groups])
        values = spectrum.inverse(ridge * unit)
        fitted = spectrum.own @ (values * (spectrum.vectors.T @ torch.from_numpy(y)))
        found = spectrum.solve_own(values, fitted).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())


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


@pytest.mark.parametrize("seed", range(8))
def test_solving_without_evidence_gives_the_same_weights(seed):
    """To the last bit, with the ridge given or chosen, at the experts and at a merged model."""
    slopes, row_task = case(seed)
    point = {name: torch.full((3,), 0.5, dtype=torch.float64) for name in slopes}
    divergences = torch.rand(9, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    for ridge in (None, 0.1):
        pairs = [
            [solve_joint(slopes, row_task, ridge=ridge, with_evidence=evidence) for evidence in (True, False)],
            [
                gauss_newton_step(slopes, row_task, point, divergences, ridge=ridge, with_evidence=evidence)
                for evidence in (True, False)
            ],
        ]
        for full, bare in pairs:
            assert full.ridge == bare.ridge
            assert all(torch.equal(part, bare.alpha[name]) for name, part in full.alpha.items())
            assert full.stderr is not None
            assert bare.stderr is None


def test_equal_errors_take_the_smallest_ridge():
    """Differences by rounding do not decide."""
    assert smallest_error([1.0] * len(RIDGES)) == RIDGES[0]
    assert smallest_error([1.0 + 1e-13, *[1.0] * (len(RIDGES) - 1)]) == RIDGES[0]
    assert smallest_error([2.0, 1.0, *[3.0] * (len(RIDGES) - 2)]) == RIDGES[1]


def test_one_standard_error_prefers_larger_ridges():
    """The largest candidate within one standard error of the best; the best itself where rows agree."""
    task = torch.zeros(4, dtype=torch.int64)
    parts = torch.arange(len(RIDGES), dtype=torch.float64)[:, None].repeat(1, 4)  # errors 0, 4, 8, ...
    assert one_standard_error(parts, task) == RIDGES[0]
    parts[0] = torch.tensor([-2.0, 2.0, -2.0, 2.0])  # a standard error of sqrt(4 * 16 / 3) = 4.6
    assert one_standard_error(parts, task) == RIDGES[1]
