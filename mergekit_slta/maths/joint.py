"""Solve the alphas of all submodules together under the Fisher metric: the first solve of `objective: joint`.

Scope: derivatives in, merging weights out; tensors only, float64 on the CPU. The paper names second-order information
and the joint optimisation of all weights as future work (A.5.3); this uses both.

    u_x[t, m]   = <d loss_x / d theta^m at theta_a, tau_t^m>      row x of task a, expert t, submodule m
    r_x(alpha)  = sum_{t, m} (alpha_{t, m} - [t = a]) u_x[t, m]   the merge's change of the row's loss, to first order
    c_a         = mean over rows and experts of (sum_m u_x[t, m])^2  if balance else 1; bounded, see `_system`
    alpha       = argmin  sum_a (w_a / c_a) mean_x r_x(alpha)^2  +  rho d ||alpha - prior||^2

If labels are sampled from expert a, the mean of r^2 is the quadratic form of its Fisher information: the increase of
its loss, to second order, when its weights change. d is the mean diagonal of the matrix of the first term. There are
fewer rows than unknowns, so the dual system over rows is solved. From it any row, with all its label samples, can be
left out exactly. Leaving rows out gives the standard errors, the residual, and rho if the recipe gives none.

Decisions: a model that does not change a submodule gets alpha 0 there. `prior` is 1 for an expert, its whole change: in
directions that do not change the loss, to first order, keeping the change costs nothing. It is 0 for a direction, a
model without a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_slta.maths.closed_form import task_weights
from mergekit_slta.maths.divergence import WEAK_SHARE, replace_weak, weak_tasks
from mergekit_slta.maths.ridges import RIDGES, Spectrum, smallest_error

_ROUNDING = 1e-12
"""Share of the largest eigenvalue below which another counts as zero."""
PRIOR = 1.0
"""Of the experts."""


@dataclass(frozen=True)
class JointSolution:
    """Weights of all submodules, and diagnostics.

    Attributes:
        alpha: submodule -> [K], the T experts first.
        stderr: submodule -> [K] delete-one-row jackknife standard errors; None if a task has fewer than two different
            rows.
        unchanged: submodule -> [K] bool, whether the model equals the base there.
        ridge: the rho that was used.
        condition: condition number of the dual system, with its ridge.
        rank: rank of the dual system, without the ridge.
        residual: share of sum_a mean_x y_x^2 / c_a that remains, predicted for each row without it.
    """

    alpha: dict[str, Tensor]
    stderr: dict[str, Tensor] | None
    unchanged: dict[str, Tensor]
    ridge: float
    condition: float
    rank: int
    residual: float


@dataclass(frozen=True)
class _System:
    """The rows, scaled so that the objective is ||z alpha - y||^2 + rho d ||alpha - prior||^2.

    Attributes:
        z: [N, n] scaled u; n unknowns (the changed submodules of each model), N = rows x samples.
        y: [N] scaled sums over m of u_x[a, m], a the row's own task.
        groups: for each group of rows with equal tokens: [n] int64, indices in z of these rows' samples.
        task: the task of each group, as an index; -1 if its rows belong to several tasks.
        unit: d.
        prior: [n], see the module's docstring.
    """

    z: Tensor
    y: Tensor
    groups: list[Tensor]
    task: Tensor
    unit: float
    prior: Tensor

    def shift(self, kernel: Tensor, ridge: float) -> float:
        """rho d, or the smallest shift that keeps the kernel invertible if that is larger."""
        return max(ridge * self.unit, _ROUNDING * float(kernel.diagonal().max()))


def solve_joint(
    slopes: Mapping[str, Tensor],
    row_task: Tensor,
    *,
    importance: Sequence[float] | None = None,
    balance: bool = True,
    ridge: float | None = None,
    row_group: Tensor | None = None,
    num_tasks: int | None = None,
) -> JointSolution:
    """Minimise the objective in the module's docstring.

    Args:
        slopes: submodule -> [rows, S, K] float64, u of every label sample.
        row_task: [rows] int64, the task of each row.
        importance: T weights w_a of the tasks; all 1 by default.
        balance: divide each task by its c_a, so that a task with large derivatives does not dominate.
        ridge: rho >= 0; None chooses the one of `RIDGES` that predicts left-out rows best.
        row_group: [rows] int64, equal for rows with equal tokens, which are left out together; by default all rows
            differ.
        num_tasks: T; the models after the first T are directions. By default there are none.
    """
    names = list(slopes)
    whole = torch.stack(list(slopes.values()), dim=-1)  # [R, S, K, M]
    num_models = whole.shape[2]
    num_tasks = num_tasks or num_models
    changed = (whole != 0).flatten(0, 1).any(0)  # [K, M]
    weights = task_weights(importance, num_tasks)
    if row_group is None:
        row_group = torch.arange(len(row_task))
    system = _system(whole, row_task, row_group, weights, balance, changed)
    solution = torch.zeros((num_models, len(names)), dtype=torch.float64)
    error = torch.zeros_like(solution)
    condition, rank, residual = 1.0, 0, 0.0
    if changed.any() and len(system.y):
        kernel = system.z @ system.z.T
        if ridge is None:
            ridge = smallest_error(_scores(kernel, system))
        coefficients, inverse = _fit(kernel, system, ridge)
        solution[changed] = system.prior + system.z.T @ coefficients
        residual = _residual(system, coefficients, inverse)
        error[changed] = _jackknife(system, coefficients, inverse)
        condition, rank = condition_and_rank(kernel, ridge * system.unit)
    columns = dict(zip(names, range(len(names)), strict=True))
    few = any(len(torch.unique(row_group[row_task == task])) < 2 for task in range(num_tasks))
    return JointSolution(
        alpha={name: solution[:, place] for name, place in columns.items()},
        stderr=None if few else {name: error[:, place] for name, place in columns.items()},
        unchanged={name: ~changed[:, place] for name, place in columns.items()},
        ridge=0.0 if ridge is None else ridge,
        condition=condition,
        rank=rank,
        residual=residual,
    )


def condition_and_rank(kernel: Tensor, shift: float) -> tuple[float, int]:
    """Condition number of kernel + shift I, and rank of the kernel [N, N] (symmetric, positive semidefinite)."""
    values = torch.linalg.eigvalsh(kernel)
    smallest = values.min().clamp(min=0) + shift
    condition = float((values.max() + shift) / smallest) if smallest > 0 else float("inf")
    return condition, int((values > _ROUNDING * values.max()).sum())


def _system(
    whole: Tensor, row_task: Tensor, row_group: Tensor, weights: Tensor, balance: bool, changed: Tensor
) -> _System:
    """Scale the rows; rows with zero derivatives (no completion, or no change) are left out.

    A task with a c_a below `WEAK_SHARE`^2 of the mean of the others gets that mean: it would decide the merge.
    """
    num_rows, samples, num_models, _ = whole.shape
    num_tasks = len(weights)
    total = whole.sum(-1)  # [R, S, K], derivatives along the whole task vectors
    used = (whole != 0).flatten(1).any(1)  # [R]
    target = total[torch.arange(num_rows)[:, None], torch.arange(samples)[None], row_task[:, None]]  # [R, S]
    counts = torch.bincount(row_task[used], minlength=num_tasks)
    squares = total[..., :num_tasks].square().mean((1, 2)) * used
    means = torch.zeros(num_tasks, dtype=torch.float64).index_add_(0, row_task, squares) / counts.clamp(min=1)
    scales = replace_weak(means, weak_tasks(means, WEAK_SHARE**2)) if balance else torch.ones_like(means)
    root = (weights / scales / (counts * samples).clamp(min=1))[row_task].sqrt()
    z = (whole[:, :, changed] * root[:, None, None])[used].flatten(0, 1)
    y = (target * root[:, None])[used].flatten()
    places = torch.arange(len(y)).view(-1, samples)
    row_task, row_group = row_task[used], row_group[used]
    groups, tasks = [], []
    for number in torch.unique(row_group).tolist():
        own = row_group == number
        groups.append(places[own].flatten())
        several = torch.unique(row_task[own])
        tasks.append(int(several[0]) if len(several) == 1 else -1)
    unit = float(z.square().sum() / max(1, z.shape[1]))
    prior = PRIOR * (torch.arange(num_models) < num_tasks).double()[:, None].expand(changed.shape)[changed]
    return _System(z, y, groups, torch.tensor(tasks, dtype=torch.int64), unit, prior)


def _scores(kernel: Tensor, system: _System) -> list[float]:
    """`_residual` of every candidate of `RIDGES`, from one eigendecomposition."""
    spectrum = Spectrum.of(kernel, system.groups)
    target = spectrum.vectors.T @ (system.y - system.z @ system.prior)  # [N]
    remaining = []
    for ridge in RIDGES:
        inverse = spectrum.inverse(system.shift(kernel, ridge))
        remaining.append(spectrum.left_out_error(inverse, target))
    return [value / _total(system) for value in remaining]


def _fit(kernel: Tensor, system: _System, ridge: float) -> tuple[Tensor, Tensor]:
    """(c [N], C [N, N]): alpha = prior + z^T c with c = C (y - z prior) and C = (z z^T + rho d I)^-1."""
    eye = torch.eye(len(system.y), dtype=torch.float64)
    inverse = torch.linalg.inv(kernel + system.shift(kernel, ridge) * eye)
    return inverse @ (system.y - system.z @ system.prior), inverse


def _residual(system: _System, coefficients: Tensor, inverse: Tensor) -> float:
    """The share of y^2 that remains if every row is predicted from a fit without it.

    The prediction errors of a row's samples g in the fit without them are C_gg^-1 c_g, exactly.
    """
    remaining = sum(
        float(torch.linalg.solve(inverse[group][:, group], coefficients[group]).square().sum())
        for group in system.groups
    )
    return remaining / _total(system)


def _total(system: _System) -> float:
    return max(float(system.y.square().sum()), torch.finfo(torch.float64).tiny)


def _jackknife(system: _System, coefficients: Tensor, inverse: Tensor) -> Tensor:
    """[n] delete-one-group jackknife standard errors, stratified by task as in `closed_form.py`; d, c_a are fixed."""
    changes = []
    for group in system.groups:
        part = inverse[:, group] @ torch.linalg.solve(inverse[group][:, group], coefficients[group])
        changes.append(-(system.z.T @ part))
    left = torch.stack(changes)  # [R, n]: alpha fitted without the row, minus alpha
    variance = torch.zeros(left.shape[1], dtype=torch.float64)
    for number in torch.unique(system.task).tolist():
        mine = left[system.task == number]
        if len(mine) > 1:
            variance += (len(mine) - 1) / len(mine) * (mine - mine.mean(0)).square().sum(0)
    return variance.sqrt()
