"""Weighted divergences, their scales and their standard errors, against sums written out with numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_slta.maths.divergence import (
    WEAK_SHARE,
    choice_optimism,
    mean_and_error,
    paired_error,
    ratio_and_error,
    replace_weak,
    task_scales,
    weak_tasks,
    weighted_divergence,
)


@st.composite
def measured(draw, max_tasks: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """(divergences [rows] > 0, task [rows]): each task has a row or more, in any order."""
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=max_tasks))
    task = np.array(draw(st.permutations([number for number, count in enumerate(counts) for _ in range(count)])))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    return generator.uniform(1, 2, len(task)), task


@settings(max_examples=50, deadline=None)
@given(measured(), st.integers(0, 1000))
def test_the_objective_is_the_weighted_mean_over_tasks(rows, seed):
    """Of each task's mean, as a share of its base's, whatever the numbers of rows; 1 for the base."""
    base, task = rows
    count = task.max() + 1
    generator = np.random.default_rng(seed)
    models, importance = generator.uniform(0, 3, (3, len(task))), generator.uniform(0.5, 2, count).tolist()
    given_task = torch.from_numpy(task)
    scales, weak = task_scales(torch.from_numpy(base), given_task, count)
    assert not weak.any()  # all are between 1 and 2
    means = np.array([base[task == number].mean() for number in range(count)])
    np.testing.assert_allclose(scales.numpy(), means)
    shares = [np.array([row[task == number].mean() for number in range(count)]) / means for row in models]
    expected = [np.average(share, weights=importance) for share in shares]
    found = weighted_divergence(torch.from_numpy(models), given_task, scales, importance)
    np.testing.assert_allclose(found.numpy(), expected)
    assert float(weighted_divergence(torch.from_numpy(base), given_task, scales, importance)) == pytest.approx(1.0)
    equal = weighted_divergence(torch.from_numpy(models), given_task, scales)
    np.testing.assert_allclose(equal.numpy(), [share.mean() for share in shares])


def test_without_balance_long_tasks_decide():
    """All scales are 1: the mean divergences themselves are averaged."""
    task, base = torch.tensor([0, 0, 1]), torch.tensor([1.0, 3.0, 100.0], dtype=torch.float64)
    scales, weak = task_scales(base, task, 2, balance=False)
    assert scales.tolist() == [1.0, 1.0]
    assert weak.tolist() == [True, False]  # it is said all the same
    assert float(weighted_divergence(base, task, scales)) == pytest.approx((2 + 100) / 2)


def test_rows_without_an_answer_have_no_part_in_the_scale():
    base = torch.tensor([0.0, 2.0, 4.0, 6.0], dtype=torch.float64)
    scales, _ = task_scales(base, torch.tensor([0, 0, 0, 1]), 2)
    assert scales.tolist() == [3.0, 6.0]


def test_short_answers_are_not_weak():
    """One token of 0.9 nats beside 40 tokens of 0.6: as far from the base per token, a fortieth per row."""
    task = torch.tensor([0, 0, 1, 1])
    base = torch.tensor([0.9, 0.9, 24.0, 24.0], dtype=torch.float64) / torch.tensor([2.0, 2.0, 1.0, 1.0])
    tokens = torch.tensor([1, 1, 40, 40])
    scales, weak = task_scales(base, task, 2, tokens=tokens)
    assert not weak.any()
    assert scales.tolist() == [0.45, 24.0]
    assert task_scales(base, task, 2)[1].tolist() == [True, False]


def test_a_task_without_rows_does_not_count():
    task, scales = torch.tensor([0, 2, 2]), torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)
    found = weighted_divergence(torch.tensor([3.0, 1.0, 5.0], dtype=torch.float64), task, scales, [1.0, 9.0, 3.0])
    assert float(found) == pytest.approx((3.0 + 3 * 3.0 / 2) / 4)


@pytest.mark.parametrize(
    ("scales", "weak", "replaced"),
    [
        ([1.0, 1.0], [False, False], [1.0, 1.0]),
        ([0.0001, 1.0, 3.0], [True, False, False], [2.0, 1.0, 3.0]),
        ([0.0001, 0.0002, 3.0], [True, True, False], [3.0, 3.0, 3.0]),
        ([1.0, 40.0], [True, False], [40.0, 40.0]),
        ([1.0, 30.0], [False, False], [1.0, 30.0]),
        ([1e-9], [False], [1e-9]),  # nothing to be weak beside
        ([0.0], [False], [1.0]),
        ([-1e-9], [False], [1.0]),
        ([0.0, 0.0], [False, False], [1.0, 1.0]),
        ([0.0, 5.0], [True, False], [5.0, 5.0]),
        ([-1e-9, 5.0], [True, False], [5.0, 5.0]),  # the divergence of equal models, rounded
        ([-1e-9, 0.0], [True, False], [1.0, 1.0]),
    ],
)
def test_a_weak_expert_gets_the_mean_scale_of_the_others(scales, weak, replaced):
    """Below 3% of the mean of the others; no scale is zero."""
    given_scales = torch.tensor(scales, dtype=torch.float64)
    found = weak_tasks(given_scales, WEAK_SHARE)
    assert found.tolist() == weak
    assert replace_weak(given_scales, found).tolist() == replaced
    counted, told = task_scales(given_scales, torch.arange(len(scales)), len(scales))
    assert (counted.tolist(), told.tolist()) == (replaced, weak)


@settings(max_examples=50, deadline=None)
@given(measured(), st.integers(0, 1000))
def test_the_error_of_a_difference_is_that_of_the_tasks_means(rows, seed):
    """A weighted sum of independent means; a single row counts with its square."""
    _, task = rows
    count = task.max() + 1
    generator = np.random.default_rng(seed)
    difference = generator.normal(0.3, 1.0, len(task))
    importance, scales = generator.uniform(0.5, 2, count), generator.uniform(0.5, 2, count)
    variance = 0.0
    for number in range(count):
        own = difference[task == number]
        of_mean = own.var(ddof=1) / len(own) if len(own) > 1 else own[0] ** 2
        variance += (importance[number] / importance.sum() / scales[number]) ** 2 * of_mean
    found = paired_error(
        torch.from_numpy(difference), torch.from_numpy(task), torch.from_numpy(scales), importance.tolist()
    )
    assert found == pytest.approx(math.sqrt(variance))
    assert paired_error(torch.zeros(len(task), dtype=torch.float64), torch.from_numpy(task), torch.ones(count)) == 0


def test_the_error_of_a_difference_is_its_spread_over_samples():
    """Of 4000 samples of 20 rows of each task."""
    generator = torch.Generator().manual_seed(0)
    task, scales = torch.arange(2).repeat_interleave(20), torch.tensor([0.5, 3.0], dtype=torch.float64)
    spread = torch.tensor([1.0, 4.0]).repeat_interleave(20)
    samples = torch.randn(4000, 40, generator=generator, dtype=torch.float64) * spread
    true = float(weighted_divergence(samples, task, scales).std())
    told = torch.tensor([paired_error(sample, task, scales) for sample in samples])
    assert float(told.square().mean().sqrt()) == pytest.approx(true, rel=0.05)


@settings(max_examples=50, deadline=None)
@given(measured(), st.integers(0, 1000), st.integers(1, 4))
def test_what_a_choice_flatters_is_seen_by_rows_that_do_not_choose(rows, seed, count):
    """Each row's divergence of the model that the others choose, minus that of the model chosen by all."""
    _, task = rows
    tasks = task.max() + 1
    generator = np.random.default_rng(seed)
    models = generator.uniform(0, 1, (len(task), count))
    importance, scales = generator.uniform(0.5, 2, tasks), generator.uniform(0.5, 2, tasks)
    parts = models * (importance / scales / np.bincount(task))[task][:, None]
    chosen = parts.sum(0).argmin()
    expected = np.zeros(tasks)
    for row in range(len(task)):
        others = np.delete(parts, row, axis=0).sum(0).argmin() if len(task) > 1 else 0
        expected[task[row]] += (models[row, others] - models[row, chosen]) / (task == task[row]).sum()
    arguments = map(torch.from_numpy, (models, task, scales))
    np.testing.assert_allclose(choice_optimism(*arguments, importance.tolist()).numpy(), expected, atol=1e-12)


def test_what_a_choice_flatters_is_right_on_average():
    """Of 3000 choices among 5 equal models by 12 rows of each of two tasks."""
    generator = torch.Generator().manual_seed(2)
    task, scales = torch.arange(2).repeat_interleave(12), torch.tensor([1.0, 2.0], dtype=torch.float64)
    samples = torch.randn(3000, 24, 5, generator=generator, dtype=torch.float64) * scales[task][None, :, None]
    best = weighted_divergence(samples.transpose(1, 2), task, scales).argmin(1)
    observed = samples[torch.arange(3000), :, best].reshape(3000, 2, 12).mean(2)  # the truth is 0
    told = torch.stack([choice_optimism(sample, task, scales) for sample in samples])
    torch.testing.assert_close(told.mean(0), -observed.mean(0), rtol=0.1, atol=0)


@pytest.mark.filterwarnings("ignore:std")
def test_mean_and_its_error():
    values = np.array([1.0, 2.0, 6.0])
    mean, error = mean_and_error(torch.from_numpy(values))
    assert (mean, error) == pytest.approx((3.0, values.std(ddof=1) / math.sqrt(3)))
    mean, error = mean_and_error(torch.tensor([2.0], dtype=torch.float64))
    assert mean == 2.0
    assert math.isnan(error)


@pytest.mark.filterwarnings("ignore:std")
def test_the_error_of_a_ratio_is_its_spread_over_samples():
    """Of the same rows of two models, of which one leaves a third of the other's divergence."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.rand(4000, 30, generator=generator, dtype=torch.float64) + 0.5
    part = whole / 3 + 0.1 * torch.randn(4000, 30, generator=generator, dtype=torch.float64)
    found = torch.tensor([ratio_and_error(*rows) for rows in zip(part, whole, strict=True)])
    assert torch.equal(found[:, 0], (part.sum(1) / whole.sum(1)).float())
    assert float(found[:, 1].mean()) == pytest.approx(float((part.sum(1) / whole.sum(1)).std()), rel=0.05)
    ratio, error = ratio_and_error(whole[0] / 4, whole[0])
    assert (ratio, error) == (pytest.approx(0.25), pytest.approx(0.0, abs=1e-12))
    assert math.isnan(ratio_and_error(whole[0, :1], whole[0, :1])[1])
