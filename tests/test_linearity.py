"""The paper's measures against closed cases and against numpy."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_slta.maths.linearity import (
    NUM_INTERVALS,
    PAIR_GRID,
    TRIPLE_GRID,
    Grid,
    Products,
    RowMeasures,
    non_linearity_score,
    projection_distance,
)
from mergekit_slta.maths.linearity_summary import Measures

WEIGHTS = torch.linspace(0, 1, NUM_INTERVALS + 1, dtype=torch.float64)


def measure(function, grid: Grid, parts: int = 1) -> RowMeasures:
    """Measures of a row: `function` maps a point to features [n, d]; `parts` chunks of d are added up."""
    products = Products.zeros(grid)
    base = function((0.0,) * grid.num_models)

    def changes(point):
        return [part.flatten() for part in (function(point) - base).chunk(parts, dim=-1)]

    anchors = [torch.stack(part) for part in zip(*(changes(point) for point in grid.anchors), strict=True)]
    for part in anchors:
        products.add_anchors(part)
    for place, point in enumerate(grid.mixed):
        for part, change in zip(anchors, changes(point), strict=True):
            products.add_mixed(place, change, part)
    return RowMeasures.of(products, grid)


def random_linear(seed: int, num_models: int):
    """f(theta_0 + sum c_t tau_t) = (W + sum c_t D_t) x."""
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(9, 6, generator=generator).double(), torch.randn(6, 4, generator=generator).double()
    moves = torch.randn(num_models, 9, 6, generator=generator).double()
    return lambda point: ((weight + sum(c * move for c, move in zip(point, moves, strict=True))) @ x).T


@given(st.integers(0, 1000), st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_an_exactly_linear_module_scores_zero(seed, num_models):
    """All distances are 0 and all cosines 1, to 1e-10."""
    function = random_linear(seed, num_models)
    grid = Grid(seed % num_models, num_models)
    row = measure(function, grid, parts=2)
    assert float(row.score) < 1e-10
    assert float(projection_distance(row.projections[None]).nan_to_num().max() if num_models > 1 else 0) < 1e-10
    torch.testing.assert_close(row.cosines, torch.ones_like(row.cosines), rtol=0, atol=1e-10)
    path = torch.stack(
        [function(tuple(float(c) if t == grid.task else 0.0 for t in range(num_models))) for c in WEIGHTS]
    )
    assert non_linearity_score(path) < 1e-10


@pytest.mark.parametrize("bend", [0.5, -0.3, 2.0])
def test_a_quadratic_term_scores_what_arithmetic_says(bend):
    """f(c) = (c + q c^2) d: distances are differences of c + q c^2 over 1 + q."""
    direction = torch.tensor([3.0, -4.0, 12.0], dtype=torch.float64)
    path = torch.stack([(c + bend * c * c) * direction for c in WEIGHTS])
    expected = 0.0
    for i in range(11):
        for j in range(11):
            a, b = i / 10, j / 10
            ratio = abs((a - b) + bend * (a * a - b * b)) / abs(1 + bend)
            expected += (ratio - abs(a - b)) ** 2
    assert non_linearity_score(path) == pytest.approx(expected, rel=1e-10)


def test_an_expert_that_changes_nothing_has_no_score():
    """0 / 0 is not 0."""
    assert np.isnan(non_linearity_score(torch.ones(11, 3, 2)))


@given(st.floats(0.01, 100), st.integers(0, 100))
@settings(max_examples=15, deadline=None)
def test_score_is_free_of_scale_and_rotation(scale, seed):
    """Distances are Euclidean and relative."""
    generator = torch.Generator().manual_seed(seed)
    path = torch.randn(11, 7, generator=generator).double()
    rotation = torch.linalg.qr(torch.randn(7, 7, generator=generator).double())[0]
    assert non_linearity_score(scale * path @ rotation + 5) == pytest.approx(non_linearity_score(path), rel=1e-8)


@pytest.mark.parametrize("num_models", [2, 3])
def test_all_measures_equal_numpy(num_models):
    """A module with products of the experts' moves: Eq. 8, 15-17, 19 and the disentanglement error, written out."""
    rng = np.random.default_rng(3)
    linear, bent = rng.normal(size=(num_models, 5, 8)), rng.normal(size=(num_models, num_models, 5, 8))

    def function(point):
        value = sum(c * linear[t] for t, c in enumerate(point))
        for (s, a), (t, b) in product(enumerate(point), enumerate(point)):
            value = value + 0.4 * a * b * bent[s, t]
        return value if not isinstance(value, int) else np.zeros((5, 8))

    rows = []
    for task in range(num_models):
        grid = Grid(task, num_models)
        row = measure(lambda point: torch.from_numpy(np.asarray(function(point))), grid, parts=3)
        rows.append((task, row))
        unit = [np.eye(num_models)[t] for t in range(num_models)]
        whole = np.linalg.norm(function(unit[task]))
        steps = [function(c / 10 * unit[task]) for c in range(11)]
        ratios = np.array([[np.linalg.norm(a - b) / whole for b in steps] for a in steps])
        np.testing.assert_allclose(row.ratios, ratios, atol=1e-10)
        gaps = np.abs(np.subtract.outer(np.arange(11), np.arange(11))) / 10
        assert float(row.score) == pytest.approx(((ratios - gaps) ** 2).sum(), rel=1e-9)
        for place, (point, members) in enumerate(zip(grid.mixed, grid.members, strict=True)):
            assert {t for t, c in enumerate(point) if c} == set(members)
            merged = function(point)
            combined = sum(c * function(unit[t]) for t, c in enumerate(point))
            cosine = (merged * combined).sum() / np.linalg.norm(merged) / np.linalg.norm(combined)
            assert float(row.cosines[place]) == pytest.approx(cosine, rel=1e-9)
            term = np.linalg.norm(merged) * cosine / np.linalg.norm(combined)
            assert float(row.projections[place]) == pytest.approx(term, rel=1e-9)
            alone = function(point[task] * unit[task])
            error = np.linalg.norm(merged - alone) / whole
            assert float(row.disentanglement[place]) == pytest.approx(error, rel=1e-8)
        pairs = [
            (function(unit[s]) * function(unit[t])).sum()
            / np.linalg.norm(function(unit[s])) / np.linalg.norm(function(unit[t]))
            for s, t in combinations(range(num_models), 2)
        ]  # fmt: skip
        assert float(row.cosine_base) == pytest.approx(np.mean(pairs), rel=1e-9)
    together = Measures.of(rows, num_models, None)
    assert together.pair_projection.shape == (num_models * (num_models - 1) // 2, len(PAIR_GRID) ** 2)
    if num_models == 3:
        assert together.triple_cosine.shape == (1, len(TRIPLE_GRID) ** 3)


def test_expectations_come_before_the_distance():
    """Eq. 8 takes the mean over rows inside the absolute value."""
    terms = torch.tensor([[0.5, 1.0], [1.5, 2.0], [torch.nan, torch.nan]], dtype=torch.float64)
    torch.testing.assert_close(projection_distance(terms), torch.tensor([0.0, 0.5], dtype=torch.float64))


def test_grid_is_the_papers():
    """Pairs over 5 x 5 weights, triples over 3 x 3 x 3; a task's rows only see combinations with its expert."""
    grid = Grid(1, 4)
    pairs = [members for members in grid.members if len(members) == 2]
    triples = [members for members in grid.members if len(members) == 3]
    assert len(pairs) == 3 * 25
    assert len(triples) == 3 * 27
    assert all(1 in members for members in grid.members)
    assert grid.mixed[0] == (0.2, 0.2, 0.0, 0.0)
    assert grid.anchors[9] == (0.0, 1.0, 0.0, 0.0)
    assert [grid.anchors[grid.column(model)].index(1.0) for model in range(4)] == [0, 1, 2, 3]
    assert grid.alone((0.4, 0.6, 0.0, 0.0)) == (0.0, 0.6, 0.0, 0.0)
