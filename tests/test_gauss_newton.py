"""Gauss-Newton steps against their normal equations written out with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_slta.maths.gauss_newton import (
    MIN_ROW_WEIGHT,
    ROW_DECAY,
    STEPS_KEPT,
    gauss_newton_steps,
    rebase_quadratics,
)

RIDGES = (0.02, 0.5, 8.0)


def make(seed: int, rows: int, draws: int, experts: int, submodules: int) -> dict:
    """Gradients, a point and scales; `rows` of each task."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    names = [f"part{number}" for number in range(submodules)]
    return {
        "slopes": {name: normal(rows * experts, 1 + draws, experts) * (1 + place) for place, name in enumerate(names)},
        "row_task": torch.arange(experts).repeat_interleave(rows),
        "point": {name: normal(experts) for name in names},
        "scales": normal(experts).abs() + 0.5,
    }


def reference(case: dict, ridge: float, importance: list[float]) -> np.ndarray:
    """The new alphas [M, T], from the matrix of all unknowns, summed row by row."""
    whole = np.stack([part.numpy() for part in case["slopes"].values()])  # [M, R, 1 + S, T]
    size, draws = whole.shape[0] * whole.shape[3], whole.shape[2] - 1
    task, scales = case["row_task"].numpy(), case["scales"].numpy()
    step = case.get("row_step", torch.zeros(len(task))).numpy()
    share = ROW_DECAY ** (step.max() - step)
    matrix, gradient = np.zeros((size, size)), np.zeros(size)
    for row in range(len(task)):
        weight = importance[task[row]] / scales[task[row]] * share[row] / share[task == task[row]].sum()
        for draw in range(draws):
            u = whole[:, row, 1 + draw].reshape(-1)
            matrix += weight * np.outer(u, u) / draws
        gradient += weight * whole[:, row, 0].reshape(-1)
    unit = np.trace(matrix) / size
    change = np.linalg.solve(matrix + ridge * unit * np.eye(size), -gradient)
    return as_array(case["point"]) + change.reshape(whole.shape[0], -1)


def as_array(alpha: dict) -> np.ndarray:
    return np.stack([part.numpy() for part in alpha.values()])


def assert_same(found: list[dict], expected: list[dict], rtol: float = 1e-10) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(as_array(one), as_array(other), rtol=rtol, atol=1e-12)


def some_rows(case: dict, kept: torch.Tensor) -> dict:
    """The case with only the rows `kept` [rows] bool."""
    per_row = {key: case[key][kept] for key in ("row_task", "row_step") if key in case}
    return {**case, "slopes": {name: part[kept] for name, part in case["slopes"].items()}, **per_row}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 6),
    draws=st.integers(1, 3),
    experts=st.integers(1, 4),
    submodules=st.integers(1, 5),
)
def test_every_ridge_solves_its_normal_equations(seed, rows, draws, experts, submodules):
    case = make(seed, rows, draws, experts, submodules)
    importance = [1.0 + number for number in range(experts)]
    found = gauss_newton_steps(**case, ridges=RIDGES, importance=importance)
    for ridge, point in zip(RIDGES, found, strict=True):
        assert list(point) == list(case["slopes"])
        np.testing.assert_allclose(as_array(point), reference(case, ridge, importance), rtol=1e-6, atol=1e-8)
    equal = gauss_newton_steps(**case, ridges=RIDGES)
    assert_same(equal, gauss_newton_steps(**case, ridges=RIDGES, importance=[1.0] * experts))


def test_a_larger_ridge_makes_a_shorter_step():
    """Down to none: the point itself."""
    case = make(4, 4, 2, 2, 3)
    found = gauss_newton_steps(**case, ridges=(0.01, 0.1, 1.0, 10.0, 1e12))
    lengths = [np.linalg.norm(as_array(point) - as_array(case["point"])) for point in found]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < 1e-9 * lengths[0]


def test_a_quadratic_is_minimised_in_one_step():
    """With the gradients of a quadratic around an optimum, a small ridge leads to it."""
    case = make(6, 8, 3, 2, 2)
    whole = torch.stack(list(case["slopes"].values()), dim=-1)[:, 1:]  # [R, S, T, M]
    optimum = torch.tensor([[0.3, 0.9], [1.2, -0.1]], dtype=torch.float64)  # [T, M]
    start = torch.stack(list(case["point"].values()), dim=-1)
    missed = torch.einsum("rstm,tm->rs", whole, start - optimum)
    gradient = torch.einsum("rs,rstm->rtm", missed, whole) / whole.shape[1]
    for place, part in enumerate(case["slopes"].values()):
        part[:, 0] = gradient[..., place]
    (found,) = gauss_newton_steps(**case, ridges=[1e-9])
    np.testing.assert_allclose(as_array(found), optimum.T.numpy(), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), steps=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_rows_of_earlier_steps_fade(seed, steps):
    """A row's weight falls by `ROW_DECAY` with every step since; a step without rows counts, too."""
    case = make(seed, len(steps), 2, 2, 3)
    case["row_step"] = torch.tensor([*steps, *(5 - step for step in steps)])
    for ridge, point in zip(RIDGES, gauss_newton_steps(**case, ridges=RIDGES), strict=True):
        np.testing.assert_allclose(as_array(point), reference(case, ridge, [1.0, 1.0]), rtol=1e-6, atol=1e-8)


def test_rows_that_have_faded_are_left_out():
    case = make(8, 4, 2, 2, 3)
    case["row_step"] = torch.tensor([1, 14, 14, 14] * 2)
    assert ROW_DECAY**13 < MIN_ROW_WEIGHT < ROW_DECAY**12
    assert STEPS_KEPT == 13
    fewer = some_rows(case, case["row_step"] == 14)
    assert_same(gauss_newton_steps(**case, ridges=RIDGES), gauss_newton_steps(**fewer, ridges=RIDGES))
    case["row_step"] = torch.tensor([2, 14, 14, 14] * 2)
    found = gauss_newton_steps(**case, ridges=RIDGES), gauss_newton_steps(**fewer, ridges=RIDGES)
    for one, other in zip(*found, strict=True):
        assert np.abs(as_array(one) - as_array(other)).max() > 1e-4


def test_an_idle_expert_keeps_its_weight():
    """Wherever the point is, no row says anything about it; the others move as if it were not there."""
    case = make(2, 4, 2, 3, 3)
    case["slopes"]["part1"][..., 2] = 0
    case["point"]["part1"][2] = 5.0
    whole = np.stack([part.numpy() for part in case["slopes"].values()])
    used = np.ones((3, 3), dtype=bool)
    used[1, 2] = False
    for ridge, point in zip(RIDGES, gauss_newton_steps(**case, ridges=RIDGES), strict=True):
        assert point["part1"][2] == 5.0
        flat = whole.transpose(1, 2, 0, 3)[:, :, used]  # [R, 1 + S, K]
        weight = 1 / case["scales"].numpy()[case["row_task"].numpy()] / 4
        matrix = np.einsum("r,rsk,rsl->kl", weight / 2, flat[:, 1:], flat[:, 1:])
        shift = ridge * np.trace(matrix) / used.sum() * np.eye(used.sum())
        change = np.linalg.solve(matrix + shift, -weight @ flat[:, 0])
        expected = as_array(case["point"])[used] + change
        np.testing.assert_allclose(as_array(point)[used], expected, rtol=1e-8, atol=1e-10)


def test_rows_without_an_answer_do_not_count():
    """They have no derivatives; their task is a mean over its other rows."""
    case = make(3, 4, 2, 2, 3)
    for part in case["slopes"].values():
        part[0] = 0
    fewer = some_rows(case, torch.arange(8) > 0)
    assert_same(gauss_newton_steps(**case, ridges=RIDGES), gauss_newton_steps(**fewer, ridges=RIDGES))


def test_without_any_derivative_nothing_moves():
    """All experts are the base."""
    case = make(3, 4, 2, 2, 3)
    nothing = {**case, "slopes": {name: torch.zeros_like(part) for name, part in case["slopes"].items()}}
    for point in gauss_newton_steps(**nothing, ridges=RIDGES):
        assert all(torch.equal(part, case["point"][name]) for name, part in point.items())


def test_a_task_without_rows_moves_with_the_others():
    """No division by its number of rows."""
    case = make(5, 3, 2, 2, 3)
    fewer = some_rows(case, case["row_task"] == 0)
    for point in gauss_newton_steps(**fewer, ridges=RIDGES):
        assert np.isfinite(as_array(point)).all()
        assert (as_array(point) != as_array(case["point"])).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), draws=st.integers(1, 3), experts=st.integers(1, 3), submodules=st.integers(1, 4))
def test_a_form_has_the_same_differences_from_another_point(seed, draws, experts, submodules):
    case = make(seed, 2, draws, experts, submodules)
    generator = torch.Generator().manual_seed(seed + 1)
    other, *somewhere = (
        {name: torch.randn(experts, generator=generator, dtype=torch.float64) for name in case["point"]}
        for _ in range(3)
    )
    given_slopes = {name: part.clone() for name, part in case["slopes"].items()}
    slopes = rebase_quadratics(other, case["slopes"], case["point"])
    assert all(torch.equal(part, given_slopes[name]) for name, part in case["slopes"].items())

    def form(at, point, slopes):
        way = np.concatenate([(at[name] - point[name]).numpy() for name in point])
        along = np.concatenate([part.numpy() for part in slopes.values()], axis=-1) @ way  # [R, 1 + S]
        return along[:, 0] + (along[:, 1:] ** 2).mean(1) / 2

    before, after = (
        form(somewhere[0], *where) - form(somewhere[1], *where)
        for where in ((case["point"], case["slopes"]), (other, slopes))
    )
    np.testing.assert_allclose(after, before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("factor", [1e-150, 1e150])
def test_the_step_is_the_same_in_other_units(factor):
    """Divergences in other units, and scales with them, change nothing."""
    case = make(7, 3, 2, 2, 2)
    units = {
        **case,
        "scales": case["scales"] * factor,
        "slopes": {
            name: torch.cat([part[:, :1] * factor, part[:, 1:] * factor**0.5], dim=1)
            for name, part in case["slopes"].items()
        },
    }
    assert_same(gauss_newton_steps(**units, ridges=RIDGES), gauss_newton_steps(**case, ridges=RIDGES), rtol=1e-6)
