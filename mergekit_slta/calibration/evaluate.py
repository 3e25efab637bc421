"""Evaluate a merge on held-out rows: its divergence from the experts, and losses.

Scope: alphas that no search has measured. The base and the merge run over the held-out rows, and the experts over their
own: 3 forward passes per row.
"""

from __future__ import annotations

import logging

import torch

from mergekit_slta.calibration.assemble import evaluation_of
from mergekit_slta.errors import listing
from mergekit_slta.files.alphas_file import TOO_FEW_ROWS, Alphas
from mergekit_slta.files.evaluation import PointName
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.job.job import Job
from mergekit_slta.job.layout import layout_of
from mergekit_slta.objectives.gradient_passes import Passes, answer_tokens, row_tasks
from mergekit_slta.runtime.distributed import ALONE
from mergekit_slta.runtime.progress import Progress

LOG = logging.getLogger(__name__)


@torch.no_grad()
def evaluate(job: Job, alphas: Alphas) -> Alphas:
    """Add the evaluation of a job's alphas, with `lambda` 1, if the recipe asks for it and they have none.

    A job without datasets, or with too few rows to hold any out, has nothing to measure.

    Raises:
        ModelError, RunError: as in a calibration.
    """
    if not job.recipe.settings.evaluate or alphas.evaluation is not None or None in job.rows:
        return alphas
    layout, held_out = layout_of(job), job.held_out_examples()
    if not held_out:
        few = listing(task.model for task in layout.tasks if TOO_FEW_ROWS in task.flags)
        is_search = getattr(job.recipe.settings.own, "max_steps", 0) > 0
        what = "no step can be measured: the weights are those of `features`" if is_search else "nothing is measured"
        LOG.warning("%s: too few rows to hold any out, so %s; give 15 or more different rows per task", few, what)
        return alphas
    alpha = {
        entry.name: torch.tensor(
            [entry.alpha[alphas.models.index(name)] for name in layout.canonical], dtype=torch.float64
        )
        for entry in alphas.submodules
    }
    with (
        job.clock.phase("measuring"),
        job.computing(),
        Progress("measuring", 1, quiet=job.options.quiet, num_layers=job.skeleton.num_layers) as progress,
        Passes(job, None, ALONE, progress) as passes,
    ):
        measured = passes.measure("", held_out, [None, alpha], title="measuring the merge")
    found = Statistics(
        row_tasks(held_out), len(job.labels), form="point", divergences=measured.divergences,
        tokens=answer_tokens(held_out),
        losses=measured.losses_per_token(held_out),
    )  # fmt: skip
    evaluation = evaluation_of(found, layout, [PointName(name="base"), PointName(name="merge")], 1)
    return alphas.model_copy(update={"evaluation": evaluation})
