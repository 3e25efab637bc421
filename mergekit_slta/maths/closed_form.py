"""Compute one submodule's merging weights with the paper's closed form, and diagnostics for them.

Scope: Gram matrices in, merging weights out; tensors only, float64 on the CPU (T is small).

    c_x = tr(G_x) / T  if balance else 1                          (Eq. 33-34)
    S_a = mean over rows x of task a of  G_x / c_x
    A   = sum_a w_a S_a ;   b_j = sum_a w_a S_a[j, a]             (Eq. 13, 31)
    alpha = solve(A, b)                                           (Eq. 12, 32)

Decisions where the paper gives none:
- a row with G = 0 is left out of the mean, because it holds no information about the submodule;
- an expert that does not change the submodule (its diagonal of G is zero in every row) is `unchanged` and gets alpha 0;
- if A is rank-deficient for another reason (duplicated experts), the minimum-norm solution is used and flagged;
- `ridge` is relative to A's mean diagonal and shrinks alpha towards 1/T, the plain average of the task vectors;
- a direction is a model without a task: it has a row and a column in G, but no rows; the ridge shrinks its alpha to 0;
- several objectives of one submodule (tied embeddings: `embed` and `head`) are added; each is balanced separately.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-10
"""With A scaled to a unit diagonal, an eigenvalue below this share of the largest counts as zero. With float32 forward
passes, distinct experts are above it. Duplicates are below it, as are directions that sum experts up to rounding."""
ILL_CONDITIONED = 1e6
"""A solve is flagged above this condition number: rounding errors of 1e-7 in the features then change alpha by up to
10 per cent."""


@dataclass(frozen=True)
class Solution:
    """Merging weights of one submodule, and diagnostics.

    Attributes:
        alpha: a weight for each of the K models: the T experts, then the directions.
        stderr: K jackknife standard errors over rows; None if a task has fewer than two rows.
        condition: 2-norm condition number of A over the changed experts; inf if A is rank-deficient, 1 if no expert
            changed.
        rank: rank of A.
        residual: predicted share of sum_a ||df_a||^2 that the merge loses, under linearity; 0 if no expert changed
            anything.
        unchanged: K flags: whether the model equals the base in this submodule.
        flags: any of "unchanged", "rank_deficient", "ill_conditioned".
    """

    alpha: tuple[float, ...]
    stderr: tuple[float, ...] | None
    condition: float
    rank: int
    residual: float
    unchanged: tuple[bool, ...]
    flags: tuple[str, ...]


@dataclass(frozen=True)
class _Rows:
    """Balanced matrices `grams` [R, K, K] (0 for unused rows), `task` of each row [R], used rows per task [T]."""

    grams: Tensor
    task: Tensor
    counts: Tensor


def solve_closed_form(
    grams: Tensor | Sequence[Tensor],
    row_task: Tensor,
    *,
    importance: Sequence[float] | None = None,
    balance: bool = True,
    ridge: float = 0.0,
    num_tasks: int | None = None,
) -> Solution:
    """Minimise Eq. 11 (Eq. 33 with `balance`) for one submodule.

    Args:
        grams: [rows, K, K] float64, or several such objectives that share one alpha.
        row_task: [rows] int64, the task of each row.
        importance: T weights w_a of the tasks in the objective; all 1 by default.
        balance: divide each row by c_x, so that long rows and large features do not dominate.
        ridge: relative ridge, >= 0.
        num_tasks: T; the models after the first T are directions. By default there are none.
    """
    objectives = [grams] if isinstance(grams, Tensor) else list(grams)
    num_models = objectives[0].shape[-1]
    num_tasks = num_tasks or num_models
    weights = torch.zeros(num_models, dtype=torch.float64)
    weights[:num_tasks] = task_weights(importance, num_tasks)
    prior = torch.zeros_like(weights)
    prior[:num_tasks] = 1 / num_tasks
    parts = [_usable_rows(gram, row_task, balance) for gram in objectives]
    shares = [_task_means(part, num_models) for part in parts]  # [K, K, K] each, 0 for directions
    a, b = _normal_equations(torch.stack(shares).sum(0), weights)

    changed = torch.stack([gram.diagonal(dim1=1, dim2=2).sum(0) for gram in objectives]).sum(0) > 0  # [K]
    alpha, rank, condition = _solve_changed(a, b, changed, ridge, prior)
    flags = ["unchanged"] * bool((~changed).any())
    if rank < int(changed.sum()):
        flags.append("rank_deficient")
    elif condition > ILL_CONDITIONED:
        flags.append("ill_conditioned")
    residual = _residual(torch.stack(shares).sum(0), weights, alpha)
    few = int(torch.bincount(row_task, minlength=num_tasks).min()) < 2
    stderr = None if few else _jackknife(parts, shares, row_task, weights, changed, rank, ridge, prior)
    return Solution(
        alpha=tuple(alpha.tolist()),
        stderr=stderr,
        condition=condition,
        rank=rank,
        residual=residual,
        unchanged=tuple((~changed).tolist()),
        flags=tuple(flags),
    )


def task_weights(importance: Sequence[float] | None, num_tasks: int) -> Tensor:
    """The tasks' weights w_a in the objective, [T] float64; all 1 by default."""
    return (
        torch.ones(num_tasks, dtype=torch.float64)
        if importance is None
        else torch.tensor(list(importance), dtype=torch.float64)
    )


def measured_residual(
    errors: Sequence[Tensor],
    grams: Sequence[Tensor],
    row_task: Tensor,
    *,
    importance: Sequence[float],
    balance: bool,
) -> float:
    """Measure, on the features of a merged submodule, the share that `Solution.residual` predicts.

    Args:
        errors: per objective, [rows] float64: ||f(x; merged) - f(x; theta_a)||^2 of row x of task a.
        grams: per objective, [rows, K, K] float64, as in `solve_closed_form`.
        row_task, importance, balance: as in `solve_closed_form`.

    Returns:
        sum_a w_a E[errors / c_x] over sum_a w_a E[||df_a||^2 / c_x]; 0 if no expert changed anything.
    """
    weights = torch.zeros(grams[0].shape[-1], dtype=torch.float64)
    weights[: len(importance)] = task_weights(importance, len(importance))
    remaining, whole = 0.0, 0.0
    for error, gram in zip(errors, grams, strict=True):
        used = _usable_rows(gram, row_task, balance)
        scaled = _usable_rows(gram, row_task, balance, error)
        remaining += float((weights * _task_means(scaled, len(weights))[:, 0, 0]).sum())
        whole += float(torch.einsum("a,aaa->", weights, _task_means(used, len(weights))))
    return remaining / whole if whole > 0 else 0.0


def _usable_rows(grams: Tensor, row_task: Tensor, balance: bool, values: Tensor | None = None) -> _Rows:
    """Divide the rows' matrices by c_x; if `values` [R] are given, divide them instead ([R, 1, 1])."""
    trace = grams.diagonal(dim1=1, dim2=2).sum(-1)  # [R]
    used = trace > 0
    num_models = grams.shape[-1]
    scale = trace / num_models if balance else torch.ones_like(trace)  # c_x, Eq. 34
    balanced = torch.where(used, 1 / torch.where(used, scale, 1.0), 0.0)[:, None, None]
    balanced = balanced * (grams if values is None else values[:, None, None])
    counts = torch.zeros(num_models, dtype=torch.float64).index_add_(0, row_task, used.to(torch.float64))
    return _Rows(balanced, row_task, counts)


def _task_means(rows: _Rows, num_models: int) -> Tensor:
    """S: [K, K, K], the mean matrix of every task; zero for a task without a usable row, and for a direction."""
    sums = torch.zeros((num_models, *rows.grams.shape[1:]), dtype=torch.float64)
    sums.index_add_(0, rows.task, rows.grams)
    return sums / rows.counts.clamp(min=1)[:, None, None]


def _normal_equations(means: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """A [..., K, K] and b [..., K] of Eq. 31 from the tasks' means S [..., K, K, K]."""
    a = torch.einsum("a,...ajk->...jk", weights, means)
    b = torch.einsum("a,...aja->...j", weights, means)
    return a, b


def _with_ridge(a: Tensor, b: Tensor, ridge: float, prior: Tensor) -> tuple[Tensor, Tensor]:
    size = a.shape[-1]
    strength = ridge * a.diagonal(dim1=-2, dim2=-1).mean(-1)  # [...]
    eye = torch.eye(size, dtype=torch.float64)
    return a + strength[..., None, None] * eye, b + strength[..., None] * prior


def _solve_changed(a: Tensor, b: Tensor, changed: Tensor, ridge: float, prior: Tensor) -> tuple[Tensor, int, float]:
    """Solve over the changed models: (alpha [K], with 0 for unchanged models; rank; condition number)."""
    alpha = torch.zeros_like(b)
    index = changed.nonzero().flatten()
    if len(index) == 0:
        return alpha, 0, 1.0
    a, b = _with_ridge(a[index][:, index], b[index], ridge, prior[index])
    scale = _scale(a)
    correlation = torch.linalg.eigvalsh(a / scale[:, None] / scale[None, :])
    rank = int((correlation > RANK_TOLERANCE * correlation.max()).sum())
    full = rank == len(index)
    alpha[index] = _solutions(a, b, full)
    return alpha, rank, float(torch.linalg.cond(a)) if full else math.inf


def _solutions(a: Tensor, b: Tensor, full: bool) -> Tensor:
    """[..., K] exact solutions; minimum-norm solutions if `full` is false (rank-deficient)."""
    if full:
        return torch.linalg.solve(a, b)
    if a.dim() > 2:
        return torch.stack([_solutions(one, other, full) for one, other in zip(a, b, strict=True)])
    # The rank is that of the matrix scaled to a unit diagonal, so that small features do not count as a duplicate.
    scale = _scale(a)
    values, vectors = torch.linalg.eigh(a / scale[:, None] / scale[None, :])
    kept = values > RANK_TOLERANCE * values.max()
    inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    some = (inverse @ (b / scale)) / scale
    null, _ = torch.linalg.qr(vectors[:, ~kept] / scale[:, None])  # a basis of the null space
    return some - null @ (null.T @ some)


def _scale(a: Tensor) -> Tensor:
    return a.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()


def _residual(means: Tensor, weights: Tensor, alpha: Tensor) -> float:
    """sum_a w_a E ||sum_t alpha_t df_t - df_a||^2 / sum_a w_a E ||df_a||^2 under Property 2."""
    target = torch.einsum("a,aaa->", weights, means)
    if target <= 0:
        return 0.0
    a, b = _normal_equations(means, weights)
    return max(0.0, float((alpha @ a @ alpha - 2 * alpha @ b + target) / target))


def _jackknife(
    parts: Sequence[_Rows],
    shares: Sequence[Tensor],
    row_task: Tensor,
    weights: Tensor,
    changed: Tensor,
    rank: int,
    ridge: float,
    prior: Tensor,
) -> tuple[float, ...]:
    """Delete-one standard errors, rows stratified by task.

    var(alpha) = sum_a (n_a - 1) / n_a * sum_{x in a} (alpha_(-x) - mean_{y in a} alpha_(-y))^2
    """
    counts = torch.bincount(row_task, minlength=len(weights)).to(torch.float64)
    index = changed.nonzero().flatten()
    if len(index) == 0:
        return (0.0,) * len(weights)
    num_rows = len(row_task)
    means = torch.zeros((num_rows, *shares[0].shape), dtype=torch.float64)  # [R, K, K, K], each without one row
    every = torch.arange(num_rows)
    for part, share in zip(parts, shares, strict=True):
        used = part.grams.diagonal(dim1=1, dim2=2).sum(-1) > 0  # [R]
        left = (part.counts[row_task] - used.to(torch.float64)).clamp(min=1)  # [R]
        total = share[row_task] * part.counts[row_task].clamp(min=1)[:, None, None]  # [R, K, K]
        without = share.expand(num_rows, *share.shape).clone()
        without[every, row_task] = (total - part.grams) / left[:, None, None]
        means += without
    a, b = _normal_equations(means, weights)
    a, b = _with_ridge(a[:, index][:, :, index], b[:, index], ridge, prior[index])
    leave_one_out = torch.zeros((num_rows, len(weights)), dtype=torch.float64)
    try:
        leave_one_out[:, index] = _solutions(a, b, rank == len(index))
    except torch.linalg.LinAlgError:  # the matrix is singular without one of the rows
        leave_one_out[:, index] = _solutions(a, b, False)
    group_mean = torch.zeros((len(weights), len(weights)), dtype=torch.float64)
    group_mean.index_add_(0, row_task, leave_one_out)
    deviation = (leave_one_out - (group_mean / counts[:, None])[row_task]) ** 2
    factor = ((counts - 1) / counts)[row_task]
    return tuple((deviation * factor[:, None]).sum(0).sqrt().tolist())
