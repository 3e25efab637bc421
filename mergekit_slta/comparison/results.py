"""From scores of rows to results: means, shares of the gap, the best merge, and by how much it is ahead.

Scope: arithmetic on a comparison file. Rows are the samples: all errors are standard errors over rows, which are drawn
for each task by itself. Models are compared on the same rows, so differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_slta.errors import show
from mergekit_slta.files.comparison_file import (
    NO_BETTER,
    ComparedTask,
    Comparison,
    Difference,
    ModelResult,
    ScoredModel,
    TaskResult,
)
from mergekit_slta.files.evaluation import Measure
from mergekit_slta.maths.divergence import mean_and_error, ratio_and_error

CONFIDENCE = 0.95


def with_results(comparison: Comparison) -> Comparison:
    """The comparison with its results, its best merge and its verdict, all from the rows' scores."""
    scored = comparison.scored
    base = next(model for model in scored if model.kind == "base")
    experts = {model.name: model for model in scored if model.kind == "expert"}
    taught = [experts[task.model] for task in comparison.tasks]
    gaps = [
        _gap(base, expert, place) if expert is not None else None for place, expert in enumerate(taught)
    ]  # mean of base - expert, where that is clearly above 0
    tasks = tuple(
        task.model_copy(update={"flags": (NO_BETTER,) if gap is None else ()})
        for task, gap in zip(comparison.tasks, gaps, strict=True)
    )
    results = [_result(model, base, taught, tasks, gaps) for model in scored]
    best = _best(scored, results)
    if best is not None:
        results = [
            result.model_copy(update={"difference_from_best": _difference(scored[best], model, gaps)})
            if number != best else result
            for number, (model, result) in enumerate(zip(scored, results, strict=True))
        ]  # fmt: skip
    found = comparison.model_copy(
        update={"tasks": tasks, "results": tuple(results), "best": None if best is None else scored[best].name}
    )
    return found.model_copy(update={"verdict": verdict(found)})


def _tensor(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)


def _gap(base: ScoredModel, expert: ScoredModel, place: int) -> float | None:
    """Mean over a task's rows of the base's loss minus its expert's; None if it is not above its standard error."""
    mean, error = mean_and_error(_tensor(base.losses[place]) - _tensor(expert.losses[place]))
    return mean if mean > (error if math.isfinite(error) else 0.0) else None


def _result(
    model: ScoredModel,
    base: ScoredModel,
    taught: Sequence[ScoredModel],
    tasks: Sequence[ComparedTask],
    gaps: Sequence[float | None],
) -> ModelResult:
    found = []
    for place, (task, expert) in enumerate(zip(tasks, taught, strict=True)):
        loss, before, after = (_tensor(each.losses[place]) for each in (model, base, expert))
        divergence, whole = (_tensor(each.divergences[place]) for each in (model, base))
        short = [right for right, is_short in zip(model.exact[place], task.is_short, strict=True) if is_short]
        has_gap = gaps[place] is not None
        found.append(
            TaskResult(
                loss=_mean_of(loss),
                recovered=_measure(*ratio_and_error(before - loss, before - after)) if has_gap else None,
                divergence_share=_measure(*ratio_and_error(divergence, whole)) if float(whole.sum()) > 0 else None,
                exact=_mean_of(torch.tensor(short, dtype=torch.float64)) if short else None,
            )
        )
    return ModelResult(
        name=model.name,
        tasks=tuple(found),
        loss=_mean([task.loss for task in found]),
        recovered=_mean([task.recovered for task, gap in zip(found, gaps, strict=True) if gap is not None]),
    )


def _mean_of(values: Tensor) -> Measure | None:
    return _measure(*mean_and_error(values)) if len(values) > 1 else _measure(float(values[0]), math.nan)


def _measure(mean: float, stderr: float) -> Measure | None:
    if not math.isfinite(mean):
        return None
    return Measure(mean=mean, stderr=stderr if math.isfinite(stderr) else None)


def _mean(measures: Sequence[Measure | None]) -> Measure | None:
    """Mean over tasks; None if there are none, or one is None. The rows of the tasks are independent."""
    known = [measure for measure in measures if measure is not None]
    if not known or len(known) < len(measures):
        return None
    errors = [measure.stderr for measure in known if measure.stderr is not None]
    stderr = math.hypot(*errors) / len(known) if len(errors) == len(known) else None
    return Measure(mean=sum(measure.mean for measure in known) / len(known), stderr=stderr)


def _best(scored: Sequence[ScoredModel], results: Sequence[ModelResult]) -> int | None:
    """The merge that recovers most of the gap; without a gap, that with the smallest loss."""
    finite = [
        (measure.recovered.mean if measure.recovered else -measure.loss.mean, -number)
        for number, measure in enumerate(results)
        if scored[number].kind == "merge" and measure.loss is not None
    ]
    return -max(finite)[1] if finite else None


def _difference(best: ScoredModel, other: ScoredModel, gaps: Sequence[float | None]) -> Difference | None:
    """How far a model is diff. from best: mean over tasks of the rows' loss minus the best's, over the task's gap."""
    has_gap = any(gap is not None for gap in gaps)
    parts = []
    for place, gap in enumerate(gaps):
        if gap is not None or not has_gap:
            difference = _tensor(other.losses[place]) - _tensor(best.losses[place])
            parts.append(difference / (gap if gap is not None else 1.0))
    if not all(bool(part.isfinite().all()) for part in parts):
        return None
    mean = sum(float(part.mean()) for part in parts) / len(parts)
    if any(len(part) < 2 for part in parts):
        return Difference(mean=mean, stderr=None, half_width=None, is_level=True)
    variances = [float(part.var()) / len(part) for part in parts]
    stderr = math.sqrt(sum(variances)) / len(parts)
    half_width = stderr * _quantile(variances, [len(part) - 1 for part in parts])
    return Difference(mean=mean, stderr=stderr, half_width=half_width, is_level=abs(mean) <= half_width)


def _quantile(variances: Sequence[float], freedoms: Sequence[int]) -> float:
    """Quantile of Student's t for `CONFIDENCE`, with the degrees of freedom of Welch and Satterthwaite.

    Args:
        variances: of the mean of each part.
        freedoms: degrees of freedom of each of them.
    """
    from scipy.special import stdtrit

    total = sum(variances)
    if total <= 0:
        return 0.0
    freedom = 1 / sum((each / total) ** 2 / free for each, free in zip(variances, freedoms, strict=True))
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def amount(comparison: Comparison, measure: Measure) -> str:
    """A difference of models as text: a share of the gap in percent; nats if there is no gap."""
    scale, unit = (1.0, " nats") if all(task.flags for task in comparison.tasks) else (100.0, "%")
    error = "" if measure.stderr is None else f" ± {scale * measure.stderr:.2g}"
    return f"{scale * measure.mean:.3g}{error}{unit}"


def verdict(comparison: Comparison) -> str:
    """Which merge is best, and by how much beside its error, in one line."""
    if comparison.best is None:
        return "No merge was scored."
    labels = {model.name: show(model.label, 60) for model in comparison.scored}
    kinds = {model.name: model.kind for model in comparison.scored}
    others = {
        result.name: difference
        for result in comparison.results
        if (difference := result.difference_from_best) is not None
    }
    merges = {name: gap for name, gap in others.items() if kinds[name] == "merge"}
    best = labels[comparison.best]
    num_gaps = sum(not task.flags for task in comparison.tasks)  # with one, its expert is the best there can be
    above = [
        f"{labels[name]} alone is better, by {_ahead(comparison, gap, -1)}" if kinds[name] == "expert"
        else f"the base itself is better, by {_ahead(comparison, gap, -1)}"
        for name, gap in others.items()
        if kinds[name] != "merge" and gap.mean < 0 and not gap.is_level and num_gaps != 1
    ]  # fmt: skip
    tail = "".join(f"; {line}" for line in above)
    if not merges:
        return f"Best: {best}; no other merge was scored{tail}."
    level = [labels[name] for name, gap in merges.items() if gap.is_level]
    if level:
        nearest = min((name for name in merges if merges[name].is_level), key=lambda name: merges[name].mean)
        return (
            f"Level: {best} is first, by {_ahead(comparison, merges[nearest])} before {labels[nearest]}, but its 95% "
            f"interval includes 0. Level with it: {', '.join(level)}{tail}."
        )
    nearest = min(merges, key=lambda name: merges[name].mean)
    return f"Best: {best}, by {_ahead(comparison, merges[nearest])} before {labels[nearest]}{tail}."


def _ahead(comparison: Comparison, difference: Difference, sign: int = 1) -> str:
    text = amount(comparison, Measure(mean=sign * difference.mean, stderr=difference.stderr))
    return text + (" of the gap" if text.endswith("%") else " per token")
