"""Solve statistics into the content of an alphas file.

Scope: used both after a calibration and when saved statistics are solved again. Statistics are in canonical order
(experts sorted by name); the file is in the order of the recipe.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mergekit_slta.errors import AlphasError
from mergekit_slta.files.alphas_file import NO_BETTER, Alphas, describe_no_better, finite_or_none
from mergekit_slta.files.evaluation import (
    WEAK_EXPERT,
    WORSE_THAN_BASE,
    Evaluation,
    Measure,
    MeasuredPoint,
    PointName,
    SearchRecord,
    TaskEvaluation,
    Trial,
    describe_flags,
)
from mergekit_slta.files.identity import hash_identity, importance_label
from mergekit_slta.files.layout import Layout, LayoutTask
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.maths.divergence import mean_and_error, ratio_and_error, task_scales, weighted_divergence
from mergekit_slta.objectives.registry import objective
from mergekit_slta.objectives.solving import weighted_divergences

LOG = logging.getLogger(__name__)


def assemble(statistics: Statistics, layout: Layout) -> Alphas:
    """Solve every submodule with the layout's solve settings.

    Raises:
        AlphasError: the statistics lack a submodule of the layout, or its objective is unknown.
    """
    solve = layout.solve
    solved = objective(layout.objective).solve(statistics, layout)
    evaluation = None
    if statistics.form == "point" and len(statistics.row_task):
        record, best = SearchRecord.of(statistics), int(weighted_divergences(statistics, layout).argmin())
        evaluation = evaluation_of(statistics, layout, record.points, best, record.trials, record.optimism)
    identity = dict(sorted({**layout.identity, **solve_identity(layout)}.items()))
    chosen = {} if solved.ridge is None else {"ridge_used": solved.ridge}
    return Alphas(
        granularity=layout.granularity,
        base_model=layout.base_model,
        models=layout.models,
        directions=layout.directions,
        submodules=solved.entries,
        copied=layout.copied,
        calibration={
            **layout.settings,
            "tasks": [_task(task, statistics, layout.canonical.index(task.model)) for task in layout.tasks],
            **({"products": layout.products} if layout.products else {}),
            "balance": solve.balance,
            "ridge": solve.ridge,
            **chosen,
            "importance": {name: solve.importance[name] for name in layout.models if name in solve.importance},
            **({"far_from_base": layout.far_from_base} if layout.far_from_base else {}),
        },
        evaluation=evaluation,
        provenance={**layout.versions, "fingerprint": hash_identity(identity), "identity": identity},
    )


def warn_of_quality(alphas: Alphas) -> None:
    """Warn of experts that are no better than the base on the rows of their own task, and of tasks at which the merge
    is worse than the base."""
    for line in (*describe_no_better(alphas.calibration), *describe_flags(alphas.evaluation, fitted=alphas.is_fitted)):
        LOG.warning("%s", line)


def _task(task: LayoutTask, statistics: Statistics, place: int) -> dict[str, Any]:
    """A task in the alphas file, with flags, and the losses of base and expert: means over its measured rows in nats
    per token, None without such rows."""
    base = expert = None
    losses = statistics.losses_of_base_and_expert
    if losses is not None:
        own = losses[statistics.row_task == place]
        base, expert = (finite_or_none(loss) for loss in own[~own.isnan().any(dim=1)].mean(dim=0).tolist())
    no_better = base is not None and expert is not None and expert >= base
    content = task.model_dump(mode="json", exclude={"flags"})
    return {**content, "loss_base": base, "loss_expert": expert, "flags": [*task.flags, *[NO_BETTER] * no_better]}


def evaluation_of(
    statistics: Statistics,
    layout: Layout,
    points: Sequence[PointName],
    merge: int,
    trials: Sequence[Trial] = (),
    optimism: Sequence[float] = (),
) -> Evaluation:
    """Summarize measured models.

    Args:
        statistics: divergences and losses on the held-out rows, as those of form "point".
        layout: the layout.
        points: what every model is; the first is the base.
        merge: index of the merge.
        trials: see `Evaluation`.
        optimism: see `SearchRecord`.

    Raises:
        AlphasError: the statistics lack divergences or losses.
    """
    divergences, losses = statistics.divergences, statistics.losses
    if divergences is None or losses is None:
        raise AlphasError("the statistics lack the divergences: calibrate again", code="incomplete-statistics")
    task = statistics.row_task
    scales, weak = task_scales(
        divergences[:, 0], task, len(layout.experts), tokens=statistics.tokens, balance=layout.solve.balance
    )
    weighted = weighted_divergence(divergences.T, task, scales, layout.importance).tolist()
    numbers = {entry.model: entry.acceptance for entry in layout.tasks}
    tasks = []
    places = [place for place in layout.order if place < len(layout.experts)]  # in the order of the file
    for place in places:
        name, own = layout.canonical[place], task == place
        base, merged = divergences[own, 0], divergences[own, merge]
        worse = bool(merged.mean() > base.mean())
        chosen = optimism[place] if optimism else 0.0
        tasks.append(
            TaskEvaluation(
                model=name,
                rows=numbers[name],
                divergence_base=_mean(base),
                divergence=_measure(*mean_and_error(merged), chosen),
                share=_measure(*ratio_and_error(merged, base), chosen / base.mean().item()) if base.sum() > 0 else None,
                loss_base=_mean(losses[own, 0]),
                loss_expert=_mean(losses[own, -1]),
                loss=_mean(losses[own, merge]),
                flags=(*[WORSE_THAN_BASE] * worse, *[WEAK_EXPERT] * bool(weak[place])),
            )
        )
    measured = [
        MeasuredPoint(
            **point.model_dump(),
            divergence=tuple(_mean(divergences[task == place, number]) for place in places),
            weighted=weighted[number],
        )
        for number, point in enumerate(points)
    ]
    return Evaluation(points=measured, merge=merge, trials=tuple(trials), tasks=tasks)


def _mean(values: Tensor) -> Measure:
    return _measure(*mean_and_error(values))


def _measure(mean: float, stderr: float, bias: float = 0.0) -> Measure:
    """A measure whose standard error over rows is `stderr`, and that may be off by `bias`.

    The estimate of the bias hangs on single rows, so it counts at most as much as the standard error.
    """
    return Measure(mean=mean, stderr=math.hypot(stderr, min(bias, stderr)) if math.isfinite(stderr) else None)


def solve_identity(layout: Layout) -> dict[str, str]:
    """Identity labels of the solve settings: those that another solve of the same statistics may change."""
    return {
        "balance": str(layout.solve.balance),
        "ridge": str(layout.solve.ridge),
        **{importance_label(name): str(weight) for name, weight in layout.solve.importance.items()},
    }
