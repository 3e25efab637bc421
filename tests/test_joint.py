"""The joint solve against normal equations written out with numpy, and leaving rows out by really leaving them out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_slta.maths.joint import solve_joint
from mergekit_slta.maths.ridges import RIDGES


def make_slopes(seed: int, rows: int, samples: int, experts: int, submodules: int) -> tuple[dict, torch.Tensor]:
    """Slopes of unequal size, `rows` of each task."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows * experts, samples, experts)
    slopes = {
        f"part{number}": torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + number)
        for number in range(submodules)
    }
    return slopes, torch.arange(experts).repeat_interleave(rows)


def reference(slopes, row_task, importance, balance, ridge, prior=1.0, left_out=None, scales=None) -> np.ndarray:
    """[M, T] by explicit sums over rows and samples; `scales` and d are those of all rows where one is left out."""
    u = np.stack([part.numpy() for part in slopes.values()])  # [M, R, S, T]
    num_submodules, num_rows, samples, experts = u.shape
    size = num_submodules * experts
    matrix, target = np.zeros((size, size)), np.zeros(size)
    whole = np.zeros((size, size))
    for task in range(experts):
        mine = [row for row in range(num_rows) if row_task[row] == task]
        total = u[:, mine].sum(0)  # [n, S, T]
        scale = (total**2).mean() if balance else 1.0
        for row in mine:
            for sample in range(samples):
                vector = u[:, row, sample].reshape(-1)
                weight = importance[task] / (scale * len(mine) * samples)
                outer = weight * np.outer(vector, vector)
                whole += outer
                if row != left_out:
                    matrix += outer
                    target += weight * vector * u[:, row, sample, task].sum()
    strength = ridge * np.trace(whole) / size
    matrix += strength * np.eye(size)
    target += strength * prior
    return np.linalg.solve(matrix, target).reshape(num_submodules, experts)


def as_array(alpha: dict) -> np.ndarray:
    return np.stack([part.numpy() for part in alpha.values()])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 6),
    samples=st.integers(1, 3),
    experts=st.integers(1, 4),
    submodules=st.integers(1, 5),
    balance=st.booleans(),
    ridge=st.floats(0.01, 10),
)
def test_equals_the_normal_equations(seed, rows, samples, experts, submodules, balance, ridge):
    slopes, row_task = make_slopes(seed, rows, samples, experts, submodules)
    importance = [1.0 + number for number in range(experts)]
    found = solve_joint(slopes, row_task, importance=importance, balance=balance, ridge=ridge)
    expected = reference(slopes, row_task, importance, balance, ridge)
    np.testing.assert_allclose(as_array(found.alpha), expected, rtol=1e-6, atol=1e-8)
    assert found.ridge == ridge


def test_left_out_rows_are_predicted_by_the_others():
    """Residual and standard errors equal those of really solving without each row."""
    slopes, row_task = make_slopes(5, 4, 2, 3, 4)
    found = solve_joint(slopes, row_task, ridge=0.3)
    u = np.stack([part.numpy() for part in slopes.values()])
    full = reference(slopes, row_task, [1.0] * 3, True, 0.3)
    remaining, whole = 0.0, 0.0
    left = []
    for row in range(len(row_task)):
        task = int(row_task[row])
        mine = [other for other in range(len(row_task)) if row_task[other] == task]
        scale = (u[:, mine].sum(0) ** 2).mean()
        alpha = reference(slopes, row_task, [1.0] * 3, True, 0.3, left_out=row)
        left.append(alpha - full)
        for sample in range(2):
            target = u[:, row, sample, task].sum()
            remaining += ((alpha * u[:, row, sample]).sum() - target) ** 2 / scale / len(mine)
            whole += target**2 / scale / len(mine)
    assert found.residual == pytest.approx(remaining / whole, rel=1e-8)
    variance = np.zeros_like(full)
    for task in range(3):
        own = np.stack([change for change, other in zip(left, row_task, strict=True) if other == task])
        variance += (len(own) - 1) / len(own) * ((own - own.mean(0)) ** 2).sum(0)
    np.testing.assert_allclose(as_array(found.stderr), np.sqrt(variance), rtol=1e-8)


def test_the_ridge_that_predicts_best_is_taken():
    slopes, row_task = make_slopes(1, 5, 1, 2, 6)
    chosen = solve_joint(slopes, row_task)
    residuals = {ridge: solve_joint(slopes, row_task, ridge=ridge).residual for ridge in RIDGES}
    assert chosen.ridge == min(residuals, key=residuals.get)
    assert chosen.residual == min(residuals.values())


def test_an_idle_expert_gets_nothing_and_is_marked():
    slopes, row_task = make_slopes(2, 4, 2, 3, 3)
    slopes["part1"][..., 2] = 0
    found = solve_joint(slopes, row_task, ridge=0.1)
    assert found.alpha["part1"][2] == 0
    assert found.unchanged["part1"].tolist() == [False, False, True]
    fewer = {name: part for name, part in slopes.items() if name != "part1"}
    assert not solve_joint(fewer, row_task, ridge=0.1).unchanged["part0"].any()


def test_rows_without_an_answer_are_left_out():
    slopes, row_task = make_slopes(3, 4, 2, 2, 3)
    emptied = {name: part.clone() for name, part in slopes.items()}
    for part in emptied.values():
        part[0] = 0
    kept = {name: part[1:] for name, part in slopes.items()}
    one, other = solve_joint(emptied, row_task, ridge=0.1), solve_joint(kept, row_task[1:], ridge=0.1)
    np.testing.assert_allclose(as_array(one.alpha), as_array(other.alpha), rtol=1e-10)
    nothing = {name: torch.zeros_like(part) for name, part in slopes.items()}
    assert not any(part.any() for part in solve_joint(nothing, row_task).alpha.values())


def test_a_large_ridge_leaves_the_prior_and_orthogonal_experts_keep_all():
    """Where experts do not touch each other's rows, every expert's whole change is kept."""
    slopes, row_task = make_slopes(4, 6, 1, 2, 2)
    for part in slopes.values():
        part[:6, :, 1] = 0
        part[6:, :, 0] = 0
    for ridge in (1e-6, 1.0, 1e6):
        np.testing.assert_allclose(as_array(solve_joint(slopes, row_task, ridge=ridge).alpha), 1.0, rtol=1e-6)
    slopes, row_task = make_slopes(4, 6, 1, 2, 2)
    np.testing.assert_allclose(as_array(solve_joint(slopes, row_task, ridge=1e9).alpha), 1.0, rtol=1e-6)
