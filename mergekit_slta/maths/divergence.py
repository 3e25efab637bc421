"""Divergences of merged models from the experts: means, the weighted sum that `objective: joint` minimises, and errors.

Scope: tensors only, float64 on the CPU. D_x is KL(expert of the row's task || model) in nats, summed over the answer of
row x. For a task a, D_a is the mean of D_x over its rows, and c_a its scale: D_a of the base. The objective is

    J(model) = sum_a w_a D_a(model) / c_a / sum_a w_a

A long answer counts more than a short one within its task; the tasks count by their w_a.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_slta.maths.closed_form import task_weights

WEAK_SHARE = 0.03
"""An expert is weak if it diverges from the base, per token of the answers, by less than this share of the mean over
the other experts. A divergence goes with the square of a change."""


def task_scales(
    base_divergences: Tensor, row_task: Tensor, num_tasks: int, *, tokens: Tensor | None = None, balance: bool = True
) -> tuple[Tensor, Tensor]:
    """The scales c_a of the tasks, and the weak experts.

    A weak expert hardly differs from the base, so 1 / c_a would let it decide the merge. Its c_a is the mean of the
    other experts' instead.

    Args:
        base_divergences: [rows] float64, D_x of the base; 0 for a row without an answer, which is ignored.
        row_task: [rows] int64, the task of each row.
        num_tasks: T.
        tokens: [rows] tokens of each row's answer, by which weak experts are told; by default all rows count alike.
        balance: if false, all c_a are 1.

    Returns:
        [T] float64 c_a > 0, and [T] bool.
    """
    counts = torch.bincount(row_task[base_divergences > 0], minlength=num_tasks)
    sums = torch.zeros(num_tasks, dtype=torch.float64).index_add_(0, row_task, base_divergences)
    scales = sums / counts.clamp(min=1)
    lengths = torch.ones_like(base_divergences) if tokens is None else tokens.double()
    total = torch.zeros_like(sums).index_add_(0, row_task, lengths * (base_divergences > 0))
    weak = weak_tasks(sums / total.clamp(min=1), WEAK_SHARE)
    if not balance:
        return torch.ones_like(scales), weak
    return replace_weak(scales, weak), weak


def weak_tasks(scales: Tensor, share: float) -> Tensor:
    """[T] bool, whether a scale of `scales` [T] is below `share` of the mean of the others; False for a single task."""
    others = (scales.sum() - scales) / max(1, len(scales) - 1)
    return (scales < share * others) & (len(scales) > 1)


def replace_weak(scales: Tensor, weak: Tensor) -> Tensor:
    """Replace the scales of weak tasks, and zeros, by the mean of the others; 1 if there are none."""
    strong = scales[~weak & (scales > 0)]
    mean = strong.mean() if len(strong) else torch.ones((), dtype=torch.float64)
    return torch.where(weak | (scales <= 0), mean, scales)


def row_shares(row_task: Tensor, scales: Tensor, importance: Sequence[float] | None = None) -> Tensor:
    """[rows] weight of each row in J, from the rows' tasks [rows] and the scales [T]."""
    given = task_weights(importance, len(scales))
    counts = torch.bincount(row_task, minlength=len(scales))
    return (given / scales / counts.clamp(min=1))[row_task] / (given * (counts > 0)).sum()


def weighted_divergence(
    divergences: Tensor, row_task: Tensor, scales: Tensor, importance: Sequence[float] | None = None
) -> Tensor:
    """J of models, from their D_x.

    Args:
        divergences: [..., rows] float64.
        row_task: [rows] int64.
        scales: [T], from `task_scales`.
        importance: T weights w_a; all 1 by default.

    Returns:
        [...] float64. It is 1 for the base, if the scales are from the same rows and no expert is weak.
    """
    return (divergences * row_shares(row_task, scales, importance)).sum(-1)


def paired_error(
    difference: Tensor, row_task: Tensor, scales: Tensor, importance: Sequence[float] | None = None
) -> float:
    """Standard error of the difference of J of two models, from the differences [rows] of their D_x.

    Rows are sampled separately for each task. A task with one row contributes the square of its difference.
    """
    parts = difference * row_shares(row_task, scales, importance)
    variance = 0.0
    for task in torch.unique(row_task).tolist():
        own = parts[row_task == task]
        variance += len(own) * float(own.var()) if len(own) > 1 else float(own.square().sum())
    return variance**0.5


def choice_optimism(
    divergences: Tensor, row_task: Tensor, scales: Tensor, importance: Sequence[float] | None = None
) -> Tensor:
    """Estimate how much too small the divergence of a model is that the same rows have chosen.

    For each row the choice is made by the other rows; its divergence of that model, minus that of the model that all
    rows choose, is the estimate.

    Args:
        divergences: [rows, C] float64, D_x of the C models among which the smallest J is chosen.
        row_task: [rows] int64.
        scales: [T], from `task_scales`.
        importance: T weights w_a; all 1 by default.

    Returns:
        [T] float64, means over the task's rows in nats; 0 for a task without rows.
    """
    parts = divergences * row_shares(row_task, scales, importance)[:, None]
    total = parts.sum(0)
    without = (total - parts).argmin(1)  # [rows]
    change = divergences.gather(1, without[:, None])[:, 0] - divergences[:, total.argmin()]
    sums = torch.zeros(len(scales), dtype=torch.float64).index_add_(0, row_task, change)
    return sums / torch.bincount(row_task, minlength=len(scales)).clamp(min=1)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of `values` [n], and its standard error; NaN if there is one value."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def ratio_and_error(part: Tensor, whole: Tensor) -> tuple[float, float]:
    """Ratio of the sums of paired values [n], and its standard error (delta method); NaN if there is one value."""
    ratio = part.sum() / whole.sum()
    error = (part - ratio * whole).std() * len(whole) ** 0.5 / whole.sum()
    return float(ratio), float(error)
