"""One Gauss-Newton step of all submodules' alphas together, at a merged model: the `steps` of `objective: joint`.

Scope: derivatives in, merging weights out; tensors only, float64 on the CPU. `joint.py` takes the derivatives at every
expert. Here they are taken at the model that is merged so far, with the experts as teachers (no labels are needed):

    D_x(alpha)     = sum over the answer of row x of task a of KL(expert a || model merged with alpha)
    g_x[t, m]      = d D_x / d alpha_{t, m}                        at the point alpha'
    u_{x, s}[t, m] = d loss_{x, s} / d alpha_{t, m}                with labels sampled from the merged model
    c_a            = mean over rows of D_x(0) if balance else 1    (at the base)
    alpha          = alpha' + argmin_e  sum_a w_a / c_a mean_x ( g_x e + 1/2 mean_s (u_{x, s} e)^2 ) + 1/2 rho d ||e||^2

The mean of u u^T is the Gauss-Newton matrix of D_x; d is the mean of its diagonal, summed as above. As in `joint.py`,
the system is solved among rows, and any row can be left out exactly.

Decisions: where the recipe gives no rho, it is the largest that predicts left-out rows within one standard error of the
best (`ridges.one_standard_error`), because the quadratic form only holds near the point. For the same reason, and
because no row constrains some directions, rho is at least `SMALLEST_RIDGE`. A task whose expert is the base has c_a 0;
the mean of the other tasks' c_a stands for it.

Where every step has rows of its own, the quadratic forms of earlier steps' rows stay in the sum (and D_x(0) in c_a):
`rebase_quadratics` rewrites them at the new point. Each step multiplies their weight by `ROW_DECAY`, since a form gets
less accurate with the distance from its own point; below `MIN_ROW_WEIGHT` it is dropped. The choice of rho and the
residual use the newest rows only, which no step has fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_slta.maths.joint import JointSolution, condition_and_rank, named_solution
from mergekit_slta.maths.ridges import RIDGES, Spectrum, one_standard_error

ROW_DECAY = 0.7
"""Every step multiplies the weight of earlier rows by this."""
MIN_ROW_WEIGHT = 0.01
"""Rows with less than this share of a new row's weight are left out."""


@dataclass(frozen=True)
class _System:
    """Products of the rows' weighted gradients; K unknowns, N = rows x samples, R rows.

    Attributes:
        z: [N, K] label samples' gradients, scaled so that z^T z is the objective's matrix.
        slopes: [R, K] gradients of the divergences, scaled so that their sum is the objective's gradient.
        weight: [R] the factor that scaled them.
        zz, zs, ss: products of the two with each other.
        groups: [R, S] places of the rows' samples in z.
        task: [R].
        newest: [R] marks of the rows that no earlier step has used.
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
    """Every row predicted by the step without it.

    Attributes:
        change: [R] change of that row's term of the objective.
        coefficients: [N, R] of z in the step without it.
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
    """Minimise the objective above.

    Args:
        slopes: submodule -> [rows, 1 + S, T] float64: g, then u of every label sample.
        row_task: [rows] int64, the task of each row.
        point: submodule -> [T] alpha'.
        divergences: [rows, 2] D_x at the base, and at the point.
        row_step: [rows] int64, the step that added each row; None where all belong to this one.
        importance: T weights w_a of the tasks; all 1 by default.
        balance: divide each task by its c_a.
        ridge: rho >= `SMALLEST_RIDGE`; None chooses one of `RIDGES`.
        with_evidence: also compute standard errors, condition, rank and residual.

    Returns:
        The new alphas. `residual` is the share of the newest rows' divergence at the base that remains: what was
        measured at the point, and its change by the step, each row predicted by the others.
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
        slopes: submodule -> [rows, 1 + S, T] at the old one.
        before: submodule -> [T] the old point.
        divergences: [rows, 2] D_x at the base, and at the old point.

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
    """[R]: w_a / c_a and a row's share of its task; 0 where a row has no answer."""
    given = torch.ones(num_models, dtype=torch.float64)
    if importance is not None:
        given = torch.as_tensor(list(importance), dtype=torch.float64)
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
    """e = -(z^T z + shift)^-1 (sum of the given rows' gradients), from its coefficients [N]: see `_left_out`."""
    return (system.z.T @ coefficients - system.slopes.T @ rows) / shift


def _fit(system: _System, shift: float) -> tuple[Tensor, Tensor]:
    """(C [N, N], C z b_x [N, R]) with C = (z z^T + shift I)^-1 and b_x the gradient of row x.

    The step is e = (z^T c - b) / shift with b the sum of all b_x and c = C z b.
    """
    inverse = torch.linalg.inv(system.zz + shift * torch.eye(len(system.zz), dtype=torch.float64))
    return inverse, inverse @ system.zs


def _left_out(system: _System, shift: float, inverse: Tensor, parts: Tensor) -> _LeftOut:
    """Every row's term of the objective after the step without it; `inverse` and `parts` are those of `_fit`.

    Without the samples g of a row (and its gradient), c is C (v - E_g C_gg^-1 (C v)_g) with v = z b of the other rows:
    0 at g, and exact elsewhere.
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
    """`_LeftOut.change` of the newest rows for every candidate of `RIDGES`, [candidates, rows], from one
    eigendecomposition."""
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
    """[K] delete-one standard errors, rows stratified by task; d, c_a and the other rows' weights stay as they are.

    A row that is left out takes its weight with it: its share of the task's mean change is subtracted.
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
