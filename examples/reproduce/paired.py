"""Differences between merges by a paired bootstrap: over the test rows within each task, and over draws.

Scope: arithmetic over the scores of single rows (`scoring.completion_scores`), with numpy. Every resample takes the
same rows and the same draws for all methods, for the base and for the experts, so that what a row or a draw adds to all
of them cancels out of a difference. Rows are taken as independent: the generated tasks' test rows share 16 and 10
wordings, and what is said of them holds for these wordings.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
MEASURES = ("mean", "worst", "divergence")
"""Share of the loss gap recovered, mean and worst task (`gaps`); share of the base's divergence from the experts that
is left, mean of the tasks."""

Scores = Mapping[str, Mapping[str, Any]]
"""Task -> scores with `rows`."""
Values = dict[str, NDArray[np.float64]]
"""Measure -> [1 + resamples]: the value on all rows and draws as they are, then those of the resamples."""


@dataclass(frozen=True)
class Estimate:
    """A value, its standard error, and the ends of its 95% interval; None where it, or a resample, has no value."""

    value: float | None
    error: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Estimate:
        """From what `bootstrap` returns of a measure, or from the difference of two."""
        value, resampled = float(values[0]) if np.isfinite(values[0]) else None, values[1:]
        if not np.isfinite(resampled).all():
            return cls(value, None, None, None)
        low, high = np.percentile(resampled, [2.5, 97.5])
        return cls(value, float(resampled.std(ddof=1)), float(low), float(high))


def counts(generator: np.random.Generator, size: int, resamples: int) -> NDArray[np.float64]:
    """How often each of `size` things is in each resample, [1 + resamples, size]; the first is everything once.

    One less is drawn than there are, so that the variance of a mean is s² / size with the unbiased s²: with three draws
    the usual bootstrap would give two thirds of it.
    """
    drawn = generator.multinomial(max(1, size - 1), np.full(size, 1 / size), resamples)
    return np.concatenate([np.ones((1, size)), drawn])


def column(scores: Mapping[str, Any], name: str) -> NDArray[np.float64]:
    """A number of every row of a task."""
    return np.asarray(scores["rows"][name], dtype=np.float64)


def bootstrap(
    base: Scores,
    experts: Scores,
    methods: Mapping[str, Sequence[Scores]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Values]:
    """Measures of several methods on all rows, and on the same resamples of rows and draws.

    Args:
        base: scores of the base, by task.
        experts: scores of each task's own expert, by task.
        methods: scores of every draw, by method; the draws of all methods belong together.
        resamples: how many.
        seed: of the resamples.

    Returns:
        By method: `MEASURES`, and for every task `recovered TASK` and `divergence TASK`. A share of a gap is NaN where
        the expert is not better than the base.

    Raises:
        ValueError: the methods have different numbers of draws, or none.
    """
    draws = {len(scores) for scores in methods.values()}
    if len(draws) != 1 or not min(draws):
        raise ValueError(f"methods with {sorted(draws)} draws: a paired comparison needs the same ones of all")
    generator = np.random.default_rng(seed)
    draw_counts = counts(generator, draws.pop(), resamples)
    draw_weights = draw_counts / draw_counts.sum(-1, keepdims=True)  # [1 + resamples, draws]
    recovered: dict[str, list[NDArray[np.float64]]] = {name: [] for name in methods}
    left: dict[str, list[NDArray[np.float64]]] = {name: [] for name in methods}
    for task in experts:
        weights = counts(generator, len(column(base[task], "loss")), resamples)  # [1 + resamples, rows]
        tokens = weights @ column(base[task], "tokens")
        base_loss, expert_loss = (weights @ column(one[task], "loss") / tokens for one in (base, experts))
        gap = np.where(base_loss > expert_loss, base_loss - expert_loss, np.nan)
        divergence = weights @ column(base[task], "divergence")
        for name, scores in methods.items():
            losses = np.stack([weights @ column(one[task], "loss") / tokens for one in scores], -1)
            recovered[name].append((base_loss[:, None] - losses) / gap[:, None])
            divergences = np.stack([weights @ column(one[task], "divergence") for one in scores], -1)
            left[name].append(divergences / divergence[:, None])
    found: dict[str, Values] = {}
    for name in methods:
        shares, rest = np.stack(recovered[name]), np.stack(left[name])  # [tasks, 1 + resamples, draws]
        by_draw = {"mean": shares.mean(0), "worst": shares.min(0), "divergence": rest.mean(0)}
        by_draw |= {f"recovered {task}": share for task, share in zip(experts, shares, strict=True)}
        by_draw |= {f"divergence {task}": share for task, share in zip(experts, rest, strict=True)}
        found[name] = {measure: (values * draw_weights).sum(-1) for measure, values in by_draw.items()}
    return found


def spread(base: Scores, experts: Scores, draws: Sequence[Scores]) -> dict[str, float | None]:
    """Standard deviation (n - 1) of every measure over draws, on all rows; None of a single draw."""
    single = [bootstrap(base, experts, {"": [draw]}, resamples=0)[""] for draw in draws]
    return {
        measure: statistics.stdev(float(values[measure][0]) for values in single) if len(single) > 1 else None
        for measure in single[0]
    }
