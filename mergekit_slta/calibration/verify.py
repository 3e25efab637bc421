"""Measure the residual of each submodule after the merge, to compare it with the one that linearity predicts.

Scope: one more pass over the rows. It evaluates every submodule with its merged tensors and with those of the row's own
expert. This takes 3 forward passes per row; a calibration takes T + 1.

The inputs of a submodule are the base's features with `inputs: base`, as in the calibration. With `inputs: merged` they
are the features of the merged submodules before it, with the final alphas.
"""

from __future__ import annotations

import math

import torch

from mergekit_slta.data.batches import BATCH_TOKENS, plan_packs, plan_task_batches
from mergekit_slta.errors import RunError, show
from mergekit_slta.files.alphas_file import Alphas, weights_by_tensor
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.job.job import Job
from mergekit_slta.job.layout import layout_of
from mergekit_slta.maths.closed_form import measured_residual
from mergekit_slta.objectives.merging import merge_with
from mergekit_slta.runner.forward import evaluate_submodules
from mergekit_slta.runner.state import ForwardState
from mergekit_slta.runtime.progress import Progress

TOLERANCE = 0.1
"""A submodule is flagged if its measured residual differs from the predicted one by more than this. The features of the
experts then do not add up linearly, as the closed form assumes."""
FLAG = "nonlinear"


def is_verified(alphas: Alphas) -> bool:
    """Whether every submodule has been measured."""
    return all(entry.residual_measured is not None for entry in alphas.submodules)


@torch.inference_mode()
def verify(job: Job, alphas: Alphas, statistics: Statistics) -> Alphas:
    """Measure the residual of every submodule, and flag it if it differs from the predicted one.

    Args:
        job: the recipe, prepared, with rows.
        alphas: the alphas of this job.
        statistics: the Gram matrices from which they were solved.

    Returns:
        The same alphas with measured residuals and flags.

    Raises:
        DataError: an expert without rows.
        ModelError, RunError: as in a calibration.
    """
    settings = job.recipe.settings
    examples = job.examples()
    row_task = [example.task for example in examples]
    limit = 0 if settings.granularity == "linear" else BATCH_TOKENS  # as in the calibration
    batches = plan_task_batches([example.row.ids for example in examples], row_task, limit)
    slices = weights_by_tensor(alphas.submodules)
    state = ForwardState(
        job.skeleton,
        job.checkpoints(),
        batches,
        merge=merge_with(job, alphas.models, lambda group: slices),
        merged_inputs=settings.own.inputs_are_merged,
        packs=plan_packs(batches, limit, [row_task[batch.rows[0]] for batch in batches]),
    )
    experts = [state.model_coefficients(row_task[batch.rows[0]] + 1) for batch in batches]
    state.coefficients = [[expert, "merged"] for expert in experts]
    errors = {name: torch.zeros(len(examples), dtype=torch.float64) for name in statistics.by_submodule}
    num_groups = len({submodule.forward_group for submodule in job.submodules})
    num_layers = job.skeleton.num_layers
    with (
        job.computing(subtracts=True),
        Progress("verifying", num_groups, quiet=job.options.quiet, num_layers=num_layers) as progress,
    ):
        state.announce = progress.announce
        for evaluation in evaluate_submodules(state, job.submodules):
            progress.work_on(evaluation.submodule.forward_group)
            apart = (evaluation.outputs_at("merged") - evaluation.outputs_at(experts[evaluation.batch])).to(
                torch.float64
            )
            for row, part in zip(evaluation.rows, apart.split(list(evaluation.lengths)), strict=True):
                errors[evaluation.submodule.name][row] += float((part * part).sum())
            del evaluation, apart

    importance = [alphas.calibration["importance"][job.recipe.label(model)] for model in job.experts]
    entries = []
    for entry, layout in zip(alphas.submodules, layout_of(job).submodules, strict=True):
        measured = measured_residual(
            [errors[name] for name in layout.objectives],
            [statistics.by_submodule[name] for name in layout.objectives],
            statistics.row_task,
            importance=importance,
            balance=settings.balance,
        )
        if not math.isfinite(measured):
            raise RunError(
                f"the merged features behind {show(entry.name)} hold NaN or Inf: use `compute_dtype: float32`, "
                "or a `ridge`",
                code="not-finite",
            )
        flags = [flag for flag in entry.flags if flag != FLAG]
        flags += [FLAG] * (abs(measured - entry.residual) > TOLERANCE)
        entries.append(entry.model_copy(update={"residual_measured": measured, "flags": tuple(flags)}))
    return alphas.model_copy(update={"submodules": tuple(entries)})
