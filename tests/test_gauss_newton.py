"""The Gauss-Newton step against its sums written out with numpy, and leaving rows out by really leaving them out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_slta.maths.gauss_newton import ROW_DECAY, gauss_newton_step, rebase_quadratics
from mergekit_slta.maths.ridges import RIDGES


def make(seed: int, rows: int, draws: int, experts: int, submodules: int) -> dict:
    """Gradients, a point and divergences; `rows` of each task."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    names = [f"part{number}" for number in range(submodules)]
    return {
        "slopes": {name: normal(rows * experts, 1 + draws, experts) * (1 + place) for place, name in enumerate(names)},
        "row_task": torch.arange(experts).repeat_interleave(rows),
        "point": {name: normal(experts) for name in names},
        "divergences": normal(rows * experts, 2).abs() + 0.5,
    }


def weights_of(case: dict, importance, balance) -> np.ndarray:
    task, base = case["row_task"].numpy(), case["divergences"][:, 0].numpy()
    step = case.get("row_step", torch.zeros(len(task))).numpy()
    found = np.zeros(len(task))
    for number in range(task.max() + 1):
        mine = task == number
        share = ROW_DECAY ** (step.max() - step[mine])
        scale = np.average(base[mine], weights=share) if balance else 1.0
        found[mine] = importance[number] * share / share.sum() / scale
    return found


def reference(case: dict, importance, balance, ridge, left_out=None) -> tuple[np.ndarray, np.ndarray]:
    """(step [M * T], every row's part of the objective after it); d and c_a are those of all rows."""
    whole = np.stack([part.numpy() for part in case["slopes"].values()])  # [M, R, 1 + S, T]
    size = whole.shape[0] * whole.shape[3]
    row_weight = weights_of(case, importance, balance)
    matrix, all_rows, gradient = np.zeros((size, size)), np.zeros((size, size)), np.zeros(size)
    draws = whole.shape[2] - 1
    for row, weight in enumerate(row_weight):
        mine = sum(np.outer(u, u) for u in (whole[:, row, 1 + s].reshape(-1) for s in range(draws)))
        all_rows += weight * mine / draws
        if row != left_out:
            matrix += weight * mine / draws
            gradient += weight * whole[:, row, 0].reshape(-1)
    matrix += ridge * np.trace(all_rows) / size * np.eye(size)
    step = np.linalg.solve(matrix, -gradient)
    parts = []
    for row, weight in enumerate(row_weight):
        curved = np.mean([(whole[:, row, 1 + s].reshape(-1) @ step) ** 2 for s in range(draws)])
        parts.append(weight * (whole[:, row, 0].reshape(-1) @ step + curved / 2))
    return step, np.array(parts)


def as_array(alpha: dict) -> np.ndarray:
    return np.stack([part.numpy() for part in alpha.values()])


def shape_of(case: dict, step: np.ndarray) -> np.ndarray:
    return step.reshape(len(case["slopes"]), -1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 6),
    draws=st.integers(1, 3),
    experts=st.integers(1, 4),
    submodules=st.integers(1, 5),
    balance=st.booleans(),
    ridge=st.floats(0.01, 10),
)
def test_equals_the_normal_equations(seed, rows, draws, experts, submodules, balance, ridge):
    case = make(seed, rows, draws, experts, submodules)
    importance = [1.0 + number for number in range(experts)]
    found = gauss_newton_step(**case, importance=importance, balance=balance, ridge=ridge)
    step, _ = reference(case, importance, balance, ridge)
    expected = as_array(case["point"]) + shape_of(case, step)
    np.testing.assert_allclose(as_array(found.alpha), expected, rtol=1e-6, atol=1e-8)
    assert found.ridge == ridge


def test_left_out_rows_are_predicted_by_the_others():
    """Residual and standard errors equal those of really solving without each row."""
    case = make(5, 4, 2, 3, 4)
    found = gauss_newton_step(**case, ridge=0.3)
    full, _ = reference(case, [1.0] * 3, True, 0.3)
    steps, change = [], 0.0
    for row in range(len(case["row_task"])):
        step, parts = reference(case, [1.0] * 3, True, 0.3, left_out=row)
        steps.append(step)
        change += parts[row]
    row_weight = weights_of(case, [1.0] * 3, True)
    before, now = (case["divergences"].numpy() * row_weight[:, None]).sum(0)
    assert found.residual == pytest.approx((now + change) / before, rel=1e-8)
    variance = np.zeros_like(full)
    for task in range(3):
        own = np.stack([step - full for step, other in zip(steps, case["row_task"], strict=True) if other == task])
        variance += (len(own) - 1) / len(own) * ((own - own.mean(0)) ** 2).sum(0)
    np.testing.assert_allclose(as_array(found.stderr), shape_of(case, np.sqrt(variance)), rtol=1e-8)


def test_the_ridge_is_the_largest_within_one_standard_error():
    case = make(1, 6, 2, 2, 6)
    # Gradients that rows have in common: there is something to be predicted.
    for part in case["slopes"].values():
        part[:, 0] = part[:, 0] * 0.3 + torch.tensor([1.0, -1.0])
    changes = {}
    for ridge in RIDGES:
        parts = [reference(case, [1.0] * 2, True, ridge, left_out=row)[1][row] for row in range(12)]
        changes[ridge] = np.array(parts)
    best = min(changes, key=lambda ridge: changes[ridge].sum())
    task = case["row_task"].numpy()
    error = np.sqrt(sum((task == a).sum() * changes[best][task == a].var(ddof=1) for a in (0, 1)))
    expected = max(ridge for ridge, parts in changes.items() if parts.sum() <= changes[best].sum() + error)
    assert gauss_newton_step(**case).ridge == expected
    assert expected > best


def test_an_idle_expert_gets_nothing_and_is_marked():
    case = make(2, 4, 2, 3, 3)
    case["slopes"]["part1"][..., 2] = 0
    found = gauss_newton_step(**case, ridge=0.1)
    assert found.alpha["part1"][2] == 0
    assert found.unchanged["part1"].tolist() == [False, False, True]


def test_rows_without_an_answer_do_not_count():
    case = make(3, 4, 2, 2, 3)
    for part in case["slopes"].values():
        part[0] = 0
    case["divergences"][0] = 0
    fewer = {
        "slopes": {name: part[1:] for name, part in case["slopes"].items()},
        "row_task": case["row_task"][1:],
        "point": case["point"],
        "divergences": case["divergences"][1:],
    }
    one, other = gauss_newton_step(**case, ridge=0.1), gauss_newton_step(**fewer, ridge=0.1)
    np.testing.assert_allclose(as_array(one.alpha), as_array(other.alpha), rtol=1e-10)
    nothing = {**case, "slopes": {name: torch.zeros_like(part) for name, part in case["slopes"].items()}}
    assert not any(part.any() for part in gauss_newton_step(**nothing).alpha.values())


def test_an_expert_that_is_the_base_does_not_take_over():
    """Its divergence is 0 everywhere: balancing must not divide by that."""
    case = make(4, 4, 2, 2, 3)
    case["divergences"][4:, 0] = 0
    found = gauss_newton_step(**case, ridge=1.0)
    assert all(torch.isfinite(part).all() for part in found.alpha.values())
    same = {**case, "divergences": case["divergences"].clone()}
    same["divergences"][4:, 0] = case["divergences"][:4, 0].mean()
    np.testing.assert_allclose(as_array(found.alpha), as_array(gauss_newton_step(**same, ridge=1.0).alpha), rtol=1e-10)


def test_a_quadratic_is_minimised_in_one_step():
    """With gradients that are those of a quadratic around an optimum, a small ridge leaves little of the way to it."""
    case = make(6, 8, 3, 2, 2)
    whole = torch.stack(list(case["slopes"].values()), dim=-1)[:, 1:]  # [R, S, T, M]
    optimum = torch.tensor([[0.3, 0.9], [1.2, -0.1]], dtype=torch.float64)  # [T, M]
    start = torch.stack(list(case["point"].values()), dim=-1)
    missed = torch.einsum("rstm,tm->rs", whole, start - optimum)
    gradient = torch.einsum("rs,rstm->rtm", missed, whole) / whole.shape[1]
    for place, part in enumerate(case["slopes"].values()):
        part[:, 0] = gradient[..., place]
    found = gauss_newton_step(**case, ridge=1e-3)
    assert np.abs(as_array(found.alpha) - optimum.T.numpy()).max() < 0.005 * float((start - optimum).abs().max())


def with_steps(case: dict, *steps: int) -> dict:
    """The case with each task's rows from such steps."""
    return {**case, "row_step": torch.tensor(steps).repeat(int(case["row_task"].max()) + 1)}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), steps=st.lists(st.integers(1, 4), min_size=1, max_size=6), balance=st.booleans())
def test_rows_of_earlier_steps_fade(seed, steps, balance):
    """The same sums, weighed; a step number that nothing has leaves its place."""
    case = with_steps(make(seed, len(steps), 2, 2, 3), *steps)
    found = gauss_newton_step(**case, balance=balance, ridge=0.2)
    step, _ = reference(case, [1.0] * 2, balance, 0.2)
    np.testing.assert_allclose(
        as_array(found.alpha), as_array(case["point"]) + shape_of(case, step), rtol=1e-6, atol=1e-8
    )


def test_the_newest_rows_choose_the_ridge_and_say_what_remains():
    case = with_steps(make(1, 6, 2, 2, 6), 1, 1, 1, 2, 2, 2)
    for part in case["slopes"].values():
        part[:, 0] = part[:, 0] * 0.3 + torch.tensor([1.0, -1.0])
    task, newest = case["row_task"].numpy(), case["row_step"].numpy() == 2
    row_weight = weights_of(case, [1.0] * 2, True)
    changes = {}
    for ridge in RIDGES:
        parts = [reference(case, [1.0] * 2, True, ridge, left_out=row)[1][row] for row in range(12)]
        changes[ridge] = np.array(parts)[newest]
    best = min(changes, key=lambda ridge: changes[ridge].sum())
    error = np.sqrt(sum(3 * changes[best][task[newest] == a].var(ddof=1) for a in (0, 1)))
    expected = max(ridge for ridge, parts in changes.items() if parts.sum() <= changes[best].sum() + error)
    found = gauss_newton_step(**case)
    assert found.ridge == expected
    before, now = (case["divergences"].numpy() * row_weight[:, None])[newest].sum(0)
    assert found.residual == pytest.approx(max(0, now + changes[expected].sum()) / before, rel=1e-8)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), draws=st.integers(1, 3), experts=st.integers(1, 3), submodules=st.integers(1, 4))
def test_a_form_is_the_same_from_another_point(seed, draws, experts, submodules):
    case = make(seed, 2, draws, experts, submodules)
    generator = torch.Generator().manual_seed(seed + 1)
    other, somewhere = (
        {name: torch.randn(experts, generator=generator, dtype=torch.float64) for name in case["point"]} for _ in "ab"
    )
    slopes, divergences = rebase_quadratics(other, case["slopes"], case["point"], case["divergences"])

    def form(point, slopes, divergences):
        way = np.concatenate([(somewhere[name] - point[name]).numpy() for name in point])
        whole = np.concatenate([part.numpy() for part in slopes.values()], axis=-1)  # [R, 1 + S, K]
        along = whole @ way
        return divergences[:, 1].numpy() + along[:, 0] + (along[:, 1:] ** 2).mean(1) / 2

    np.testing.assert_allclose(
        form(other, slopes, divergences), form(case["point"], case["slopes"], case["divergences"]), rtol=1e-9, atol=1e-9
    )
    assert torch.equal(divergences[:, 0], case["divergences"][:, 0])


def test_standard_errors_of_rows_that_fade():
    """Those of really solving without each row; none where the rows of a task are all the same."""
    case = with_steps(make(5, 4, 2, 3, 4), 1, 2, 2, 3)
    found = gauss_newton_step(**case, ridge=0.3)
    full, _ = reference(case, [1.0] * 3, True, 0.3)
    moves = np.stack([reference(case, [1.0] * 3, True, 0.3, left_out=row)[0] - full for row in range(12)])
    row_weight, variance = weights_of(case, [1.0] * 3, True), np.zeros_like(full)
    for task in range(3):
        mine = case["row_task"].numpy() == task
        part = row_weight[mine] / row_weight[mine].sum()
        variance += 3 / 4 * ((moves[mine] - part[:, None] * moves[mine].sum(0)) ** 2).sum(0)
    np.testing.assert_allclose(as_array(found.stderr), shape_of(case, np.sqrt(variance)), rtol=1e-8)

    alike = with_steps(make(7, 6, 2, 2, 3), 1, 1, 2, 2, 3, 3)
    for part in (*alike["slopes"].values(), alike["divergences"]):
        part[1:6], part[7:] = part[0], part[6]
    errors = as_array(gauss_newton_step(**alike, ridge=0.5).stderr)
    moved = as_array(gauss_newton_step(**alike, ridge=0.5).alpha) - as_array(alike["point"])
    assert errors.max() < 0.02 * np.abs(moved).max()  # the moves are linear in a weight to first order


def test_rows_that_have_faded_are_left_out():
    case = with_steps(make(8, 4, 2, 2, 3), 1, 14, 14, 14)
    newer = case["row_step"] == 14
    fewer = {
        "slopes": {name: part[newer] for name, part in case["slopes"].items()},
        "row_task": case["row_task"][newer],
        "point": case["point"],
        "divergences": case["divergences"][newer],
    }
    one, other = gauss_newton_step(**case, ridge=0.1), gauss_newton_step(**fewer, ridge=0.1)
    np.testing.assert_allclose(as_array(one.alpha), as_array(other.alpha), rtol=1e-12)


def test_where_no_new_row_has_an_answer_the_others_are_asked():
    case = with_steps(make(9, 4, 2, 2, 3), 1, 1, 2, 2)
    newest = case["row_step"] == 2
    for part in (*case["slopes"].values(), case["divergences"]):
        part[newest] = 0
    found = gauss_newton_step(**case)
    older = {
        "slopes": {name: part[~newest] for name, part in case["slopes"].items()},
        "row_task": case["row_task"][~newest],
        "point": case["point"],
        "divergences": case["divergences"][~newest],
    }
    assert found.ridge == gauss_newton_step(**older).ridge
    assert found.residual == pytest.approx(gauss_newton_step(**older).residual)


def test_a_negative_divergence_is_an_answer():
    """Moved to another point a form may say so, of an expert that is the base."""
    case = make(10, 3, 2, 2, 3)
    case["divergences"][0] = torch.tensor([0.0, -0.1])
    counted = {**case, "divergences": case["divergences"].clone()}
    counted["divergences"][0, 1] = 0.1
    one, other = gauss_newton_step(**case, ridge=0.1), gauss_newton_step(**counted, ridge=0.1)
    assert torch.equal(one.alpha["part0"], other.alpha["part0"])
