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


def reference(slopes, row_task, importance, balance, ridge, prior=1.0, left_out=(), scales=None) -> np.ndarray:
    """[M, T] by explicit sums over rows and samples; the scales and d are those of all rows where some are left out.
    `scales` replaces the scales c_a."""
    u = np.stack([part.numpy() for part in slopes.values()])  # [M, R, S, T]
    num_submodules, num_rows, samples, experts = u.shape
    size = num_submodules * experts
    matrix, target = np.zeros((size, size)), np.zeros(size)
    whole = np.zeros((size, size))
    for task in range(experts):
        mine = [row for row in range(num_rows) if row_task[row] == task]
        total = u[:, mine].sum(0)  # [n, S, T]
        scale = ((total**2).mean() if balance else 1.0) if scales is None else scales[task]
        for row in mine:
            for sample in range(samples):
                vector = u[:, row, sample].reshape(-1)
                weight = importance[task] / (scale * len(mine) * samples)
                outer = weight * np.outer(vector, vector)
                whole += outer
                if row not in left_out:
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


def without(slopes, row_task, groups) -> tuple[float, np.ndarray]:
    """(residual, standard errors [M, T]) from really solving without each group of rows, for ridge 0.3."""
    u = np.stack([part.numpy() for part in slopes.values()])
    experts, samples = u.shape[3], u.shape[2]
    full = reference(slopes, row_task, [1.0] * experts, True, 0.3)
    remaining, whole = 0.0, 0.0
    changes: dict[int, list[np.ndarray]] = {}  # by task; -1 is for several tasks
    for group in groups:
        alpha = reference(slopes, row_task, [1.0] * experts, True, 0.3, left_out=group)
        tasks = {int(row_task[row]) for row in group}
        changes.setdefault(tasks.pop() if len(tasks) == 1 else -1, []).append(alpha - full)
        for row in group:
            task = int(row_task[row])
            mine = [other for other in range(len(row_task)) if row_task[other] == task]
            scale = (u[:, mine].sum(0) ** 2).mean()
            for sample in range(samples):
                target = u[:, row, sample, task].sum()
                remaining += ((alpha * u[:, row, sample]).sum() - target) ** 2 / scale / len(mine)
                whole += target**2 / scale / len(mine)
    variance = np.zeros_like(full)
    for own in map(np.stack, changes.values()):
        variance += (len(own) - 1) / len(own) * ((own - own.mean(0)) ** 2).sum(0)
    return remaining / whole, np.sqrt(variance)


def test_left_out_rows_are_predicted_by_the_others():
    """Residual and standard errors equal those of really solving without each row."""
    slopes, row_task = make_slopes(5, 4, 2, 3, 4)
    found = solve_joint(slopes, row_task, ridge=0.3)
    residual, error = without(slopes, row_task, [(row,) for row in range(12)])
    assert found.residual == pytest.approx(residual, rel=1e-8)
    np.testing.assert_allclose(as_array(found.stderr), error, rtol=1e-8)


def test_equal_rows_are_left_out_together():
    """Rows 0, 5 and 9 are one text under three names, as are rows 1 and 2 within a task: nothing predicts itself.
    Rows of several tasks are a stratum of their own."""
    slopes, row_task = make_slopes(6, 4, 2, 3, 4)
    groups = [(0, 5, 9), (1, 2), (6, 11), *((row,) for row in (3, 4, 7, 8, 10))]
    row_group = torch.zeros(12, dtype=torch.int64)
    for number, group in enumerate(groups):
        row_group[list(group)] = 7 * number  # numbers may have gaps
    found = solve_joint(slopes, row_task, ridge=0.3, row_group=row_group)
    apart = solve_joint(slopes, row_task, ridge=0.3)
    assert all(torch.equal(part, apart.alpha[name]) for name, part in found.alpha.items())
    residual, error = without(slopes, row_task, groups)
    assert found.residual == pytest.approx(residual, rel=1e-8)
    assert apart.residual != pytest.approx(residual, rel=1e-3)
    np.testing.assert_allclose(as_array(found.stderr), error, rtol=1e-8)


def test_rows_that_are_there_twice_do_not_choose_the_smallest_ridge():
    """Two tasks with the same rows and labels: each row's twin predicts it exactly, unless both are left out."""
    generator = torch.Generator().manual_seed(0)
    slopes, row_task = {}, torch.arange(2).repeat_interleave(6)
    for number in range(8):
        own = torch.randn((6, 1, 1), generator=generator, dtype=torch.float64).repeat(2, 1, 2)
        slopes[f"part{number}"] = own + 0.02 * torch.randn((12, 1, 2), generator=generator, dtype=torch.float64)
    apart = solve_joint(slopes, row_task)
    together = solve_joint(slopes, row_task, row_group=torch.arange(6).repeat(2))
    assert apart.residual < 0.1 < together.residual
    assert together.ridge > apart.ridge


@pytest.mark.parametrize("same", [[0, 0], [0, 1]])
def test_equal_rows_alone_have_no_standard_error(same):
    """They are one row: nothing shows how much others would differ."""
    slopes, row_task = make_slopes(5, 2, 1, 2, 2)
    found = solve_joint(slopes, row_task, ridge=0.3, row_group=torch.tensor([*same, 2, 3]))
    assert (found.stderr is None) == (same == [0, 0])


def test_a_weak_task_does_not_decide():
    """An expert that changes nothing much has derivatives of 1%: its c_a is the mean of the others'."""
    slopes, row_task = make_slopes(7, 4, 2, 3, 3)
    for part in slopes.values():
        part[row_task == 1] *= 0.01
    u = np.stack([part.numpy() for part in slopes.values()]).sum(0)  # [R, S, T]
    scales = [(u[row_task.numpy() == task] ** 2).mean() for task in range(3)]
    assert scales[1] < 0.01 * (scales[0] + scales[2]) / 2
    scales[1] = (scales[0] + scales[2]) / 2
    expected = reference(slopes, row_task, [1.0] * 3, True, 0.1, scales=scales)
    np.testing.assert_allclose(as_array(solve_joint(slopes, row_task, ridge=0.1).alpha), expected, rtol=1e-8)
    for part in slopes.values():
        part[row_task == 1] *= 20  # a fifth is an expert like the others
    expected = reference(slopes, row_task, [1.0] * 3, True, 0.1)
    np.testing.assert_allclose(as_array(solve_joint(slopes, row_task, ridge=0.1).alpha), expected, rtol=1e-8)


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
