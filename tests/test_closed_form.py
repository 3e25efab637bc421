"""The closed form against numpy's least squares and against explicit leave-one-out solves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_slta.maths.closed_form import Solution, solve_closed_form
from mergekit_slta.maths.grams import row_grams


def features(seed: int, num_models: int, rows_per_task: int, size: int = 12) -> tuple[list[np.ndarray], torch.Tensor]:
    """Random df of each row ([T, size], scales apart by rows) and the row-to-task map."""
    rng = np.random.default_rng(seed)
    rows = [rng.normal(size=(num_models, size)) * rng.uniform(0.1, 10) for _ in range(num_models * rows_per_task)]
    return rows, torch.arange(num_models).repeat_interleave(rows_per_task)


def grams_of(rows: list[np.ndarray]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(row @ row.T) for row in rows])


def least_squares(rows, row_task, balance, importance) -> np.ndarray:
    """Eq. 10/33 as one stacked least-squares problem: sum_t alpha_t df_t should be df_a."""
    num_models = rows[0].shape[0]
    matrix, target = [], []
    for row, task in zip(rows, row_task.tolist(), strict=True):
        count = int((row_task == task).sum())
        scale = np.mean((row**2).sum(1)) if balance else 1.0
        weight = math.sqrt(importance[task] / scale / count)
        matrix.append(weight * row.T)
        target.append(weight * row[task])
    return np.linalg.lstsq(np.concatenate(matrix), np.concatenate(target), rcond=None)[0][:num_models]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_models=st.integers(1, 5),
    rows_per_task=st.integers(1, 4),
    balance=st.booleans(),
    importance=st.lists(st.floats(0.1, 10), min_size=5, max_size=5),
)
def test_solution_is_the_least_squares_solution(seed, num_models, rows_per_task, balance, importance):
    """alpha minimises the paper's objective, for any number of models and rows, balanced or not."""
    rows, row_task = features(seed, num_models, rows_per_task)
    found = solve_closed_form(grams_of(rows), row_task, importance=importance[:num_models], balance=balance)
    np.testing.assert_allclose(found.alpha, least_squares(rows, row_task, balance, importance), rtol=1e-6, atol=1e-8)
    assert found.rank == num_models
    assert not found.flags


def test_single_expert_gets_weight_one():
    """With one expert the objective is met exactly: alpha 1, residual 0."""
    rows, row_task = features(0, 1, 3)
    found = solve_closed_form(grams_of(rows), row_task)
    assert found.alpha == pytest.approx((1.0,))
    assert found.residual == pytest.approx(0.0, abs=1e-12)


def test_residual_is_the_share_that_remains():
    """The residual is sum ||sum alpha df - df_a||^2 / sum ||df_a||^2, row by row."""
    rows, row_task = features(3, 3, 4)
    found = solve_closed_form(grams_of(rows), row_task, balance=False)
    left = sum(np.sum((np.array(found.alpha) @ row - row[task]) ** 2) for row, task in zip(rows, row_task, strict=True))
    total = sum(np.sum(row[task] ** 2) for row, task in zip(rows, row_task, strict=True))
    assert found.residual == pytest.approx(left / total, rel=1e-9)


def test_zero_rows_are_left_out():
    """A row without any difference changes nothing, whatever it does to the number of rows."""
    rows, row_task = features(1, 2, 3)
    with_zero = [*rows, np.zeros_like(rows[0])]
    one = solve_closed_form(grams_of(rows), row_task)
    other = solve_closed_form(grams_of(with_zero), torch.cat([row_task, torch.tensor([1])]))
    assert other.alpha == pytest.approx(one.alpha, rel=1e-12)


def test_unchanged_expert_gets_zero_and_the_others_are_as_without_it():
    """An expert whose features never move is marked; the rest of the system is solved without it."""
    rows, row_task = features(2, 3, 3)
    for row in rows:
        row[1] = 0.0
    found = solve_closed_form(grams_of(rows), row_task)
    assert found.alpha[1] == 0.0
    assert found.unchanged == (False, True, False)
    assert found.flags == ("unchanged",)
    np.testing.assert_allclose(found.alpha, least_squares(rows, row_task, True, [1, 1, 1]), atol=1e-8)


def test_nothing_changed_at_all():
    """Without any difference alpha is 0, and every number is finite."""
    found = solve_closed_form(torch.zeros(4, 2, 2, dtype=torch.float64), torch.tensor([0, 0, 1, 1]))
    assert found == Solution((0.0, 0.0), (0.0, 0.0), 1.0, 0, 0.0, (True, True), ("unchanged",))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), copies=st.integers(2, 3))
def test_duplicates_are_solved_by_minimum_norm(seed, copies):
    """Duplicated experts share their weight equally, as numpy's minimum-norm least squares does, and are flagged."""
    rows, row_task = features(seed, 3, 3)
    rows = [np.concatenate([row, np.repeat(row[:1], copies - 1, axis=0)]) for row in rows]
    extra = [rows[0] * 1.5] * 2  # rows for each copy's own task
    tasks = torch.cat([row_task, *(torch.tensor([3 + copy, 3 + copy]) for copy in range(copies - 1))])
    rows = rows + extra * (copies - 1)
    found = solve_closed_form(grams_of(rows), tasks)
    expected = least_squares(rows, tasks, True, [1.0] * (2 + copies))
    np.testing.assert_allclose(found.alpha, expected, rtol=1e-5, atol=1e-7)
    assert found.rank == 3
    assert "rank_deficient" in found.flags
    assert math.isinf(found.condition)


def test_jackknife_equals_explicit_leave_one_out():
    """stderr is the delete-one jackknife, rows stratified by task, each left-out solve done anew."""
    rows, row_task = features(5, 3, 4)
    grams = grams_of(rows)
    left_out = []
    for row in range(len(rows)):
        keep = [other for other in range(len(rows)) if other != row]
        left_out.append(solve_closed_form(grams[keep], row_task[keep]).alpha)
    left_out = np.array(left_out)
    variance = np.zeros(3)
    for task in range(3):
        group = left_out[(row_task == task).numpy()]
        variance += (len(group) - 1) / len(group) * ((group - group.mean(0)) ** 2).sum(0)
    np.testing.assert_allclose(solve_closed_form(grams, row_task).stderr, np.sqrt(variance), rtol=1e-9)


def test_stderr_needs_two_rows_per_task():
    """With a single row in a task there is no standard error, rather than one that is too small."""
    rows, row_task = features(5, 2, 3)
    assert solve_closed_form(grams_of(rows)[[0, 3, 4]], row_task[[0, 3, 4]]).stderr is None


@given(ridge=st.floats(1e3, 1e9))
def test_ridge_pulls_towards_the_plain_average(ridge):
    """A large relative ridge leads to 1/T for every expert."""
    rows, row_task = features(6, 4, 2)
    assert solve_closed_form(grams_of(rows), row_task, ridge=ridge).alpha == pytest.approx((0.25,) * 4, abs=2e-3)


def test_ridge_is_relative():
    """Scaling all features changes nothing, with or without ridge."""
    rows, row_task = features(7, 3, 2)
    for balance in (True, False):
        one = solve_closed_form(grams_of(rows), row_task, ridge=0.1, balance=balance)
        other = solve_closed_form(grams_of([row * 1e3 for row in rows]), row_task, ridge=0.1, balance=balance)
        assert one.alpha == pytest.approx(other.alpha, rel=1e-9)


def test_several_objectives_are_added():
    """A shared tensor's alpha solves the sum of the objectives, each balanced by itself."""
    one, row_task = features(8, 2, 3)
    two, _ = features(9, 2, 3)
    together = solve_closed_form([grams_of(one), grams_of(two)], row_task)
    scaled = [[row / math.sqrt(np.mean((row**2).sum(1))) for row in rows] for rows in (one, two)]
    stacked = [np.concatenate(pair, axis=1) for pair in zip(*scaled, strict=True)]
    expected = solve_closed_form(grams_of(stacked), row_task, balance=False)
    assert together.alpha == pytest.approx(expected.alpha, rel=1e-9)


def test_ill_conditioned_systems_are_flagged():
    """Two experts that nearly agree are solved, and flagged."""
    rows, row_task = features(10, 2, 3)
    for row in rows:
        row[1] = row[0] + 1e-4 * row[1]
    found = solve_closed_form(grams_of(rows), row_task)
    assert found.flags == ("ill_conditioned",)
    assert found.condition > 1e6


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5), num_models=st.integers(1, 4))
def test_row_grams_sum_over_a_rows_own_tokens(lengths, num_models):
    """Packed rows give the products of each row's own tokens, in float64."""
    deltas = torch.randn(num_models, sum(lengths), 3, generator=torch.Generator().manual_seed(len(lengths)))
    found = row_grams(deltas, lengths)
    start = 0
    for row, length in enumerate(lengths):
        part = deltas[:, start : start + length].double().numpy()
        np.testing.assert_allclose(found[row], np.einsum("jnd,knd->jk", part, part), rtol=1e-12)
        start += length
    assert found.dtype == torch.float64


def test_small_experts_are_no_lost_rank():
    """Beside duplicates an expert with tiny features keeps its weight: rank is a matter of direction, not of size."""
    rows, _ = features(11, 2, 3)
    tiny = [np.stack([row[0], row[0], row[1] * 1e-7]) for row in rows]
    tasks = torch.tensor([0, 0, 1, 1, 2, 2])
    found = solve_closed_form(grams_of(tiny), tasks, balance=False)
    assert found.rank == 2
    assert found.alpha[0] == pytest.approx(found.alpha[1], abs=1e-2)
    scaled = solve_closed_form(grams_of([row * np.array([[1], [1], [1e7]]) for row in tiny]), tasks, balance=False)
    assert scaled.rank == 2
    assert abs(found.alpha[2]) > 1e-3


def test_a_rank_that_hangs_on_one_row_still_has_standard_errors():
    """Without the only row in which the second expert changes anything, the other solve is the one of minimum norm."""
    rows = [np.array([[1.0, 2.0, 0.5], [0, 0, 0]]), np.array([[0.5, 1.0, 1.0], [0, 0, 0]]),
            np.array([[1.0, 0.0, 1.0], [0.3, 1.0, 0.2]]), np.array([[0.2, 0.7, 1.0], [0, 0, 0]])]  # fmt: skip
    row_task = torch.tensor([0, 0, 1, 1])
    found = solve_closed_form(grams_of(rows), row_task)
    assert found.rank == 2
    kept = [np.array(solve_closed_form(grams_of(rows)[keep], row_task[keep]).alpha)
            for keep in ([1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2])]  # fmt: skip
    variance = sum(((pair - pair.mean(0)) ** 2).sum(0) / 2 for pair in (np.stack(kept[:2]), np.stack(kept[2:])))
    np.testing.assert_allclose(found.stderr, np.sqrt(variance), rtol=1e-9)
