"""Gauss-Newton steps for the alphas of all submodules, at a merged model: the steps of `objective: joint`.

Scope: derivatives in, merging weights out; tensors only, float64 on the CPU. The experts are teachers, so no labels are
needed. With D_x, c_a and w_a as in `divergence.py`:

    g_x[t, m]      = d D_x / d alpha_{t, m}                        at the point alpha'
    u_{x, s}[t, m] = d loss_{x, s} / d alpha_{t, m}                with labels sampled from the merged model
    alpha          = alpha' + argmin_e  sum_a w_a / c_a mean_x ( g_x e + 1/2 mean_s (u_{x, s} e)^2 ) + 1/2 rho d ||e||^2

The mean of u u^T over s is the Gauss-Newton matrix of D_x; d is the mean diagonal of the weighted sum of these
matrices. There are fewer rows than unknowns, so the dual system over rows is solved. One eigendecomposition gives the
steps of all candidates for rho. The quadratic form cannot tell which of them is best: the caller measures the merged
models, on rows that no step has used.

A step also uses the quadratic forms of the rows of earlier steps: `rebase_quadratics` rewrites them at the new point. A
form gets less accurate with the distance from its own point, so each step multiplies its weight by `ROW_DECAY`; below
`MIN_ROW_WEIGHT` it is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergekit_slta.maths.closed_form import task_weights

ROW_DECAY = 0.7
"""Factor by which every step multiplies the weight of earlier rows."""
MIN_ROW_WEIGHT = 0.01
"""Rows with a weight below this share of a new row's weight are left out."""
STEPS_KEPT = 1 + int(math.log(MIN_ROW_WEIGHT) / math.log(ROW_DECAY))
"""Number of steps whose rows are used together."""


def gauss_newton_steps(
    slopes: Mapping[str, Tensor],
    row_task: Tensor,
    point: Mapping[str, Tensor],
    scales: Tensor,
    *,
    ridges: Sequence[float],
    row_step: Tensor | None = None,
    importance: Sequence[float] | None = None,
) -> list[dict[str, Tensor]]:
    """Minimise the objective in the module's docstring, once for each rho.

    Args:
        slopes: submodule -> [rows, 1 + S, K] float64: g, then u of every label sample; K models, the T experts first.
        row_task: [rows] int64, the task of each row.
        point: submodule -> [K] alpha'.
        scales: [T] c_a, from `divergence.task_scales`.
        ridges: candidates for rho, > 0.
        row_step: [rows] int64, the step that added each row; None if all rows belong to this step.
        importance: T weights w_a of the tasks; all 1 by default.

    Returns:
        For each rho: submodule -> [K] the new alphas. A weight along which no row has a derivative stays as it is. A
        row without derivatives (no answer) is left out.
    """
    names = list(slopes)
    whole = torch.stack(list(slopes.values()), dim=-1)  # [R, 1 + S, K, M]
    age = torch.zeros_like(row_task) if row_step is None else row_step.max() - row_step
    share = ROW_DECAY ** age.double() * (whole != 0).flatten(1).any(1)
    kept = share >= MIN_ROW_WEIGHT
    whole, row_task, share = whole[kept], row_task[kept], share[kept]
    changed = (whole != 0).flatten(0, 1).any(0)  # [K, M]
    start = torch.stack([point[name] for name in names], dim=-1)  # [K, M]
    total = torch.zeros_like(scales).index_add_(0, row_task, share)
    per_task = task_weights(importance, len(scales)) / scales / total.clamp(min=MIN_ROW_WEIGHT)  # [T]
    weight = per_task[row_task] * share  # [R]
    flat = whole[:, :, changed]  # [R, 1 + S, n]
    z = (flat[:, 1:] * (weight / (flat.shape[1] - 1)).sqrt()[:, None, None]).flatten(0, 1)  # [N, n], N = R S
    gradient = weight @ flat[:, 0]  # [n]
    unit = float(z.square().sum() / max(1, z.shape[1]))
    values, vectors = torch.linalg.eigh(z @ z.T)
    projected = vectors.T @ (z @ gradient)  # [N]
    found = []
    for ridge in ridges:
        solution = start.clone()
        if unit > 0:
            shift = ridge * unit
            # (z^T z + shift I)^-1 b = (b - z^T (z z^T + shift I)^-1 z b) / shift
            solution[changed] -= (gradient - z.T @ (vectors @ (projected / (values + shift)))) / shift
        found.append({name: solution[:, place] for place, name in enumerate(names)})
    return found


def rebase_quadratics(
    point: Mapping[str, Tensor], slopes: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rewrite the rows' quadratic forms at another point: g' = g + H (point - before).

    H is the row's mean over s of u_s u_s^T.

    Args:
        point: submodule -> [K] the new point.
        slopes: submodule -> [rows, 1 + S, K] at the old point.
        before: submodule -> [K] the old point.

    Returns:
        Slopes at the new point, in the same form.
    """
    along = torch.as_tensor(sum(part[:, 1:] @ (point[name] - before[name]) for name, part in slopes.items()))  # [R, S]
    rebased = {}
    for name, part in slopes.items():
        rebased[name] = part.clone()
        rebased[name][:, 0] += (part[:, 1:] * along[..., None]).mean(1)
    return rebased
