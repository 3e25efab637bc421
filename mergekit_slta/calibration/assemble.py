"""Solve statistics into the content of an alphas file.

Scope: used both after a calibration and when saved statistics are solved again. Statistics are in canonical order
(experts sorted by name); the file is in the order of the recipe.
"""

from __future__ import annotations

import logging
from typing import Any

from mergekit_slta.files.alphas_file import NO_BETTER, Alphas, describe_no_better, finite_or_none
from mergekit_slta.files.identity import hash_identity, importance_label
from mergekit_slta.files.layout import Layout
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.objectives.registry import objective

LOG = logging.getLogger(__name__)


def assemble(statistics: Statistics, layout: Layout) -> Alphas:
    """Solve every submodule with the layout's solve settings.

    Raises:
        AlphasError: the statistics lack a submodule of the layout, or its objective is unknown.
    """
    solve = layout.solve
    solved = objective(layout.objective).solve(statistics, layout)
    identity = dict(sorted({**layout.identity, **solve_identity(layout)}.items()))
    chosen = {} if solved.ridge is None else {"ridge_used": solved.ridge}
    return Alphas(
        granularity=layout.granularity,
        base_model=layout.base_model,
        models=layout.models,
        submodules=solved.entries,
        copied=layout.copied,
        calibration={
            **layout.settings,
            "tasks": [
                {**task.model_dump(mode="json"), **_losses(statistics, layout.canonical.index(task.model))}
                for task in layout.tasks
            ],
            "balance": solve.balance,
            "ridge": solve.ridge,
            **chosen,
            "importance": {name: solve.importance[name] for name in layout.models},
            **({"far_from_base": layout.far_from_base} if layout.far_from_base else {}),
        },
        provenance={**layout.versions, "fingerprint": hash_identity(identity), "identity": identity},
    )


def warn_of_losses(alphas: Alphas) -> None:
    """Warn of experts that are no better than the base on the rows of their own task."""
    for line in describe_no_better(alphas.calibration):
        LOG.warning("%s", line)


def _losses(statistics: Statistics, task: int) -> dict[str, Any]:
    """A task's losses in the alphas file, means over its measured rows in nats per token (None: no rows), and flags."""
    base = expert = None
    if statistics.losses is not None:
        own = statistics.losses[statistics.row_task == task]
        base, expert = (finite_or_none(loss) for loss in own[~own.isnan().any(dim=1)].mean(dim=0).tolist())
    no_better = base is not None and expert is not None and expert >= base
    return {"loss_base": base, "loss_expert": expert, "flags": [NO_BETTER] * no_better}


def solve_identity(layout: Layout) -> dict[str, str]:
    """Identity labels of the solve settings: those that another solve of the same statistics may change."""
    return {
        "balance": str(layout.solve.balance),
        "ridge": str(layout.solve.ridge),
        **{importance_label(name): str(weight) for name, weight in layout.solve.importance.items()},
    }
