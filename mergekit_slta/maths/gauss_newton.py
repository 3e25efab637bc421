"""One Gauss-Newton step for the alphas of all submodules, at a merged model: a step of `objective: joint`.

Scope: derivatives in, merging weights out; tensors only, float64 on the CPU. In `joint.py` the derivatives are taken at
the experts. Here they are taken at the current merged model; the experts are teachers, so no labels are needed:

    D_x(alpha)     = sum over the answer of row x of task a of KL(expert a || model merged with alpha)
    g_x[t, m]      = d D_x / d alpha_{t, m}                        at the point alpha'
    u_{x, s}[t, m] = d loss_{x, s} / d alpha_{t, m}                with labels sampled from the merged model
    c_a            = mean over rows of D_x(0) if balance else 1    (at the base)
    alpha          = alpha' + argmin_e  sum_a w_a / c_a mean_x ( g_x e + 1/2 mean_s (u_{x, s} e)^2 ) + 1/2 rho d ||e||^2

The mean of u u^T over s is the Gauss-Newton matrix of D_x; d is the mean diagonal of the weighted sum of these
matrices. As in `joint.py`, the dual system over rows is solved, from which any row can be left out exactly.

Decisions: if the recipe gives no rho, it is the largest whose error on left-out rows is within one standard error of
the smallest (`ridges.one_standard_error`), because the quadratic form is accurate only near the point. For this reason,
and because no row constrains some directions, rho is at least `SMALLEST_RIDGE`. A task whose expert equals the base has
c_a = 0; the mean of the other tasks' c_a is used instead.

If every step has its own rows, the quadratic forms of earlier rows stay in the sum (and their D_x(0) in c_a):
`rebase_quadratics` rewrites them at the new point. A form gets less accurate with the distance from its own point, so
each step multiplies its weight by `ROW_DECAY`; below `MIN_ROW_WEIGHT` it is dropped. Only the newest rows, which no
step has fitted, are used for the choice of rho and the residual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_slta.maths.closed_form import task_weights
from mergekit_slta.maths.joint import JointSolution, condition_and_rank, named_solution
from mergekit_slta.maths.ridges import RIDGES, Spectrum, one_standard_error

ROW_DECAY = 0.7
"""Factor by which every step multiplies the weight of earlier rows."""
MIN_ROW_WEIGHT = 0.01
"""Rows with a weight below this share of a new row's weight are left out."""


@dataclass(frozen=True)
class _System:
    """The weighted gradients of the rows, and their inner products; K unknowns, R rows, N = R x samples.

    Attributes:
        z: [N, K] label samples' gradients, scaled so that z^T z is the objective's matrix.
        slopes: [R, K] gradients of the divergences, scaled so that their sum is the objective's gradient.
        weight: [R] the factor by which they were scaled.
        zz, zs, ss: [N, N], [N, R], [R, R] inner products of z and slopes.
        groups: [R, S] indices in z of each row's samples.
        task: [R] the task of each row.
        newest: [R] bool, the rows that no earlier step has used.
        unit: d.
    """

    z: Tensor
    slopes: Tensor
    weight: Tensor
    zz: Tensor
    zs: Tensor
    ss: Tensor
    groups: Tensor
    task: Tensor
    newest: Tensor
    unit: float


@dataclass(frozen=True)
class _LeftOut:
    """Leave-one-out predictions: for each row, the step that is fitted without it.

    Attributes:
        change: [R] change of the row's term of the objective by that step.
        coefficients: [N, R] coefficients of z in that step.
    """

    change: Tensor
    coefficients: Tensor


def gauss_newton_step(
    slopes: Mapping[str, Tensor],
    row_task: Tensor,
    point: Mapping[str, Tensor],
    divergences: Tensor,
    *,
    row_step: Tensor | None = None,
    importance: Sequence[float] | None = None,
    balance: bool = True,
    ridge: float | None = None,
    with_evidence: bool = True,
) -> JointSolution:
    """Minimise the objective in the module's docstring.

    Args:
        slopes: submodule -> [rows, 1 + S, T] float64: g, then u of every label sample.
        row_task: [rows] int64, the task of each row.
        point: submodule -> [T] alpha'.
        divergences: [rows, 2] float64, D_x at the base and at the point.
        row_step: [rows] int64, the step that added each row; None if all rows belong to this step.
        importance: T weights w_a of the tasks; all 1 by default.
        balance: divide each task by its c_a.
        ridge: rho >= `SMALLEST_RIDGE`; None chooses one of `RIDGES`.
        with_evidence: also compute standard errors, condition, rank and residual.

    Returns:
        The new alphas. `residual` is the predicted share of the newest rows' divergence at the base that remains: the
        divergence measured at the point, plus its change by the step, which is predicted for each row without it.
    """
    names = list(slopes)
    whole = torch.stack(list(slopes.values()), dim=-1)  # [R, 1 + S, T, M]
    num_models, every_task = whole.shape[2], row_task
    age = torch.zeros_like(row_task) if row_step is None else row_step.max() - row_step
    share = ROW_DECAY ** age.double()
    whole, row_task, divergences, age, share = (
        part[share >= MIN_ROW_WEIGHT] for part in (whole, row_task, divergences, age, share)
    )
    changed = (whole != 0).flatten(0, 1).any(0)  # [T, M]
    start = torch.stack([point[name] for name in names], dim=-1) * changed  # [T, M]
    weight = _row_weights(row_task, divergences, importance, balance, num_models, share)
    newest = (age == 0) & (weight > 0)
    if not newest.any():  # none of the new rows has an answer
        newest = weight > 0
    solution, error = start.clone(), torch.zeros_like(start) if with_evidence else None
    condition, rank, residual = (1.0, 0, 0.0) if with_evidence else (float("inf"), 0, 0.0)
    change = 0.0
    system = _system(whole, row_task, weight, changed, newest)
    if system.unit > 0:
        if ridge is None:
            ridge = one_standard_error(_scores(system), system.task[system.newest])
        shift = ridge * system.unit
        inverse, parts = _fit(system, shift)
        solution[changed] += _step(system, parts.sum(1), torch.ones(len(row_task), dtype=torch.float64), shift)
        if error is not None:
            left = _left_out(system, shift, inverse, parts)
            error[changed] = _jackknife(system, left, solution[changed] - start[changed], shift)
            condition, rank = condition_and_rank(system.zz, shift)
            change = float(left.change[system.newest].sum())
    before, now = (divergences * weight[:, None])[system.newest].sum(0).tolist()
    if with_evidence and before > 0:
        residual = max(0.0, now + change) / before
    ridge = 0.0 if ridge is None else ridge
    return named_solution(names, every_task, changed, solution, error, ridge, condition, rank, residual)


def rebase_quadratics(
    point: Mapping[str, Tensor], slopes: Mapping[str, Tensor], before: Mapping[str, Tensor], divergences: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Rewrite the rows' quadratic forms at another point.

        g' = g + H (point - before),   D' = D + g (point - before) + 1/2 (point - before) H (point - before)

    with H = mean_s u_s u_s^T of each row.

    Args:
        point: submodule -> [T] the new point.
        slopes: submodule -> [rows, 1 + S, T] at the old point.
        before: submodule -> [T] the old point.
        divergences: [rows, 2] D_x at the base and at the old point.

    Returns:
        Slopes and divergences at the new point, in the same form.
    """
    along = sum(part @ (point[name] - before[name]) for name, part in slopes.items())  # [rows, 1 + S]
    projected = torch.as_tensor(along)[:, 1:]
    rebased = {}
    for name, part in slopes.items():
        rebased[name] = part.clone()
        rebased[name][:, 0] += (part[:, 1:] * projected[..., None]).mean(1)
    found = divergences.clone()
    found[:, 1] += torch.as_tensor(along)[:, 0] + projected.square().mean(1) / 2
    return rebased, found


def _row_weights(
    row_task: Tensor, divergences: Tensor, importance: Sequence[float] | None, balance: bool, num_models: int,
    share: Tensor,
) -> Tensor:  # fmt: skip
    """[R]: w_a / c_a times the row's share of its task; 0 for a row without an answer."""
    given = task_weights(importance, num_models)
    used = (divergences != 0).any(1)
    share = share * used
    total = torch.zeros(num_models, dtype=torch.float64).index_add_(0, row_task, share)
    share = share / total.where(total > 0, torch.ones_like(total))[row_task]
    scale = torch.ones(num_models, dtype=torch.float64)
    if balance:
        scale = torch.zeros_like(scale).index_add_(0, row_task, divergences[:, 0] * share)
        apart = scale > 0
        scale[~apart] = scale[apart].mean() if apart.any() else 1.0
    return (given / scale)[row_task] * share


def _system(whole: Tensor, row_task: Tensor, weight: Tensor, changed: Tensor, newest: Tensor) -> _System:
    num_rows, samples = whole.shape[0], whole.shape[1] - 1
    flat = whole[:, :, changed]  # [R, 1 + S, K]
    z = (flat[:, 1:] * (weight / samples).sqrt()[:, None, None]).flatten(0, 1)
    slopes = flat[:, 0] * weight[:, None]
    unit = float(z.square().sum() / max(1, z.shape[1]))
    places = torch.arange(num_rows * samples).view(num_rows, samples)
    return _System(z, slopes, weight, z @ z.T, z @ slopes.T, slopes @ slopes.T, places, row_task, newest, unit)


def _step(system: _System, coefficients: Tensor, rows: Tensor, shift: float) -> Tensor:
    """[K] e = -(z^T z + shift I)^-1 (sum of the gradients of `rows`), from the coefficients [N] of z; see `_fit`."""
    return (system.z.T @ coefficients - system.slopes.T @ rows) / shift


def _fit(system: _System, shift: float) -> tuple[Tensor, Tensor]:
    """(C [N, N], C z b_x [N, R]) with C = (z z^T + shift I)^-1 and b_x the gradient of row x.

    The step is e = (z^T c - b) / shift, where b is the sum of all b_x and c = C z b.
    """
    inverse = torch.linalg.inv(system.zz + shift * torch.eye(len(system.zz), dtype=torch.float64))
    return inverse, inverse @ system.zs


def _left_out(system: _System, shift: float, inverse: Tensor, parts: Tensor) -> _LeftOut:
    """Leave each row out of the step, and predict the change of its term; `inverse` and `parts` are from `_fit`.

    Without a row (its samples g and its gradient), c = C (v - E_g C_gg^-1 (C v)_g), where v = z b of the other rows.
    This is exact: c is 0 at g, and elsewhere it solves the system without g.
    """
    num_rows = len(system.groups)
    others = parts.sum(1)[:, None] - parts  # [N, R]: C v
    coefficients = torch.empty_like(others)
    for row, group in enumerate(system.groups):
        own = torch.linalg.solve(inverse[group][:, group], others[group, row])
        coefficients[:, row] = others[:, row] - inverse[:, group] @ own
    linear = (system.zs * coefficients).sum(0) - (system.ss.sum(1) - system.ss.diagonal())
    change = system.zz @ coefficients - (system.zs.sum(1, keepdim=True) - system.zs)  # [N, R]
    projected = change[system.groups.flatten(), torch.arange(num_rows).repeat_interleave(system.groups.shape[1])]
    quadratic = projected.view(num_rows, -1).square().sum(1) / 2
    return _LeftOut(linear / shift + quadratic / shift / shift, coefficients)


def _scores(system: _System) -> Tensor:
    """[candidates, newest rows] `_LeftOut.change` for every candidate of `RIDGES`, from one eigendecomposition."""
    spectrum = Spectrum.of(system.zz, system.groups)
    gradients = spectrum.vectors.T @ system.zs  # [N, R], in the basis of the eigenvectors
    others = gradients.sum(1, keepdim=True) - gradients
    rows = torch.arange(len(system.groups))
    own_others = (system.zs.sum(1, keepdim=True) - system.zs)[system.groups, rows[:, None]]  # [R, S]
    found = []
    for ridge in RIDGES:
        shift = ridge * system.unit
        inverse = spectrum.inverse(shift)
        coefficients = inverse[:, None] * others  # [N, R]: C v
        own = spectrum.solve_own(inverse, torch.einsum("rsn,nr->rs", spectrum.own, coefficients))
        coefficients = coefficients - inverse[:, None] * torch.einsum("rsn,rs->nr", spectrum.own, own)
        linear = (gradients * coefficients).sum(0) - (system.ss.sum(1) - system.ss.diagonal())
        projected = torch.einsum("rsn,nr->rs", spectrum.own, spectrum.values[:, None] * coefficients) - own_others
        found.append(linear / shift + projected.square().sum(1) / 2 / shift / shift)
    return torch.stack(found)[:, system.newest]


def _jackknife(system: _System, left: _LeftOut, step: Tensor, shift: float) -> Tensor:
    """[K] delete-one jackknife standard errors, rows stratified by task; d, c_a and the other rows' weights are fixed.

    Leaving a row out lowers the total weight of its task, so the row's share of the task's total change is subtracted.
    """
    rows = torch.ones(len(system.task), dtype=torch.float64)
    variance = torch.zeros(system.z.shape[1], dtype=torch.float64)
    for number in torch.unique(system.task).tolist():
        mine = (system.task == number).nonzero().flatten().tolist()
        if len(mine) < 2:
            continue
        changes = []
        for row in mine:
            kept = rows.clone()
            kept[row] = 0
            changes.append(_step(system, left.coefficients[:, row], kept, shift) - step)
        stacked = torch.stack(changes)
        part = system.weight[mine] / system.weight[mine].sum().clamp(min=torch.finfo(torch.float64).tiny)
        variance += (len(mine) - 1) / len(mine) * (stacked - part[:, None] * stacked.sum(0)).square().sum(0)
    return variance.sqrt()
