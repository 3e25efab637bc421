"""Gather the statistics of `objective: features`: Gram matrices per submodule and calibration row (Eq. 14).

Scope: one forward pass over the rows, in one process or several; resumes a killed run. The first rows of each task also
run through their expert, beside the pass, so that its loss can be compared with the base's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mergekit_slta.data.batches import BATCH_TOKENS, plan_batches, plan_packs
from mergekit_slta.errors import RunError, show
from mergekit_slta.files.alphas_file import weights_by_tensor
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.job.job import Job
from mergekit_slta.job.layout import layout_of
from mergekit_slta.maths.task_arithmetic import WeightedSlice
from mergekit_slta.models.submodules import Submodule
from mergekit_slta.objectives.merging import merge_with
from mergekit_slta.objectives.solving import solve_submodule
from mergekit_slta.runner.forward import evaluate_submodules
from mergekit_slta.runner.row_losses import RowLosses, measured_rows, states_beside
from mergekit_slta.runner.state import Evaluation, ForwardState, MergeGroup
from mergekit_slta.runtime.distributed import Ranks
from mergekit_slta.runtime.progress import Progress
from mergekit_slta.runtime.resume import ResumeStore

_LOSSES = "losses"
"""Key of the losses in the resume store, beside the matrices of the last group."""


@torch.inference_mode()
def gather_grams(job: Job, *, resume: ResumeStore | None, ranks: Ranks, with_losses: bool = True) -> Statistics:
    """Run all rows through the base (or merged submodules), and evaluate every expert's submodules on these inputs.

    Args:
        job: the recipe, prepared.
        resume: the finished forward groups of an earlier run; this run adds to them. None stores nothing.
        ranks: the processes that share the rows; each process gets all matrices.
        with_losses: also measure the losses of base and expert on the first rows of each task.

    Returns:
        Gram matrices, submodule -> [rows, K, K] float64 for K models, rows in canonical order; and the losses of the
        first rows.

    Raises:
        DataError: an expert without rows.
        ModelError, RunError: NaN or Inf in weights or features, out of memory, or another process has ended.
    """
    examples = job.examples()
    row_task = torch.tensor([example.task for example in examples], dtype=torch.int64, device="cpu")
    statistics = Statistics(row_task, num_models=len(job.labels))
    by_group: dict[str, list[str]] = {}
    for submodule in job.submodules:
        by_group.setdefault(submodule.forward_group, []).append(submodule.name)
    measured = measured_rows(examples) if with_losses else []
    losses = RowLosses(examples, measured)
    averaged = job.averaged
    finished = _load_finished(statistics, by_group, resume, ranks)
    last = list(by_group)[-1]

    def finish(group: str) -> None:
        """Sum a group's results over all processes, and store them; called after the group's last evaluation."""
        if group in finished:
            return
        finished.add(group)
        for name in by_group[group]:
            grams = statistics.finish(name)
            _check_finite(name, grams, job.model_names)
            if name in averaged:
                grams[:, -1] = grams[..., -1] = 0
            ranks.all_reduce_(grams)
        found = {name: statistics.by_submodule[name] for name in by_group[group]}
        if group == last:
            statistics.losses = losses.losses()
            ranks.all_reduce_(statistics.losses)
            found[_LOSSES] = statistics.losses
        if resume is not None and ranks.is_first:
            resume.put(group, found)

    # Single matrices need batches of one row: see `runner.layers.evaluate_matrices`.
    limit = 0 if job.recipe.settings.granularity == "linear" else BATCH_TOKENS
    planned = plan_batches([example.row.ids for example in examples], limit)
    packs = plan_packs(planned, limit)
    sizes = [sum(sum(planned[number].lengths) for number in pack) for pack in packs]
    # Packs are not split, so products do not depend on the number of processes.
    own = [packs[place] for place in ranks.share(sizes)]
    whole_models = job.recipe.settings.granularity == "model"
    merge = _merge_as_solved(job, statistics, finish) if job.recipe.settings.own.inputs_are_merged else None
    checkpoints = job.checkpoints()
    beside = {}
    if not whole_models and last not in finished:
        own_rows = {row for pack in own for number in pack for row in planned[number].rows}
        chosen = [row for row in measured if row in own_rows]
        beside = states_beside(job.skeleton, checkpoints, examples, chosen, with_base=merge is not None)
    state = ForwardState(
        job.skeleton,
        checkpoints,
        [planned[number] for pack in own for number in pack],
        packs=_renumber(own),
        merge=merge,
        merged_inputs=merge is not None,
        max_pack_tokens=max(sizes),
        skip=frozenset(finished),
        folder=resume.activations_folder() if resume is not None and ranks.size == 1 and whole_models else None,
        beside=beside,
        take_logits=losses.add,
    )
    quiet = job.options.quiet or not ranks.is_first
    with (
        job.computing(subtracts=True),
        Progress("features", len(by_group), quiet=quiet, num_layers=job.skeleton.num_layers) as progress,
    ):
        state.announce = progress.announce
        progress.advance(len(finished))
        group = ""
        for evaluation in evaluate_submodules(state, job.submodules) if own else ():
            if group and evaluation.submodule.forward_group != group:
                finish(group)
            group = evaluation.submodule.forward_group
            progress.work_on(group)
            _accumulate(statistics, losses, state, evaluation)
            del evaluation  # frees this group's weights before the next group's are loaded
        for group in by_group:
            finish(group)
    return statistics


def _renumber(packs: Sequence[Sequence[int]]) -> list[list[int]]:
    """Number the batches of the packs from 0."""
    places = iter(range(sum(len(pack) for pack in packs)))
    return [[next(places) for _ in pack] for pack in packs]


def _load_finished(
    statistics: Statistics, by_group: Mapping[str, Sequence[str]], resume: ResumeStore | None, ranks: Ranks
) -> set[str]:
    """Load the matrices of the groups that an earlier run has finished, in every process; returns the groups."""
    known = [group for group in by_group if resume is not None and group in resume.finished]
    finished: list[str] = ranks.broadcast(known)
    for group in finished:
        found = resume.get(group) if resume is not None and ranks.is_first else {}
        for name in by_group[group]:
            statistics.begin(name)
            if name in found:
                statistics.by_submodule[name] += found[name]
            ranks.all_reduce_(statistics.by_submodule[name])
        if _LOSSES in found:
            statistics.losses = found[_LOSSES]
    return set(finished)


def _accumulate(statistics: Statistics, losses: RowLosses, state: ForwardState, evaluation: Evaluation) -> None:
    name, base = evaluation.submodule.name, evaluation.base
    models = [state.model_coefficients(model) for model in range(1, state.num_models)]
    outputs = [evaluation.outputs_at(coefficients) for coefficients in models]  # K x [N, d]
    statistics.add(name, evaluation.rows, outputs, evaluation.lengths, base)
    whole_models = evaluation.submodule.kind == "model"
    if whole_models or (evaluation.submodule.kind == "head" and not state.merged_inputs):
        for model, logits in enumerate([base, *outputs] if whole_models else [base]):
            for row, part in zip(evaluation.rows, logits.split(list(evaluation.lengths)), strict=True):
                losses.add(row, model, part)


def _check_finite(name: str, grams: Tensor, models: Sequence[str]) -> None:
    """Check a submodule's Gram matrices [rows, K, K].

    Raises:
        RunError: they hold NaN or Inf; the message names the model.
    """
    diagonal = grams.diagonal(dim1=1, dim2=2)  # [rows, K]
    if not torch.isfinite(diagonal).all():
        model = models[int((~torch.isfinite(diagonal)).any(0).nonzero()[0])]
        raise RunError(
            f"the features of {show(model)} behind {show(name)} hold NaN or Inf: "
            "use `compute_dtype: float32`, or check that expert",
            code="not-finite",
        )


def _merge_as_solved(job: Job, statistics: Statistics, finish: Callable[[str], None]) -> MergeGroup:
    """For `inputs: merged` (A.5.3): solve each forward group, and compute the next features with its merged tensors.

    `lambda` applies at merge time; here it is 1. For the next features, a tied table is merged with the alpha of the
    objective `embed` only, because the statistics of `head` do not exist yet; the alpha in the file is solved for both.
    Inside an attention block divided into heads, or a layer divided into matrices, the base's tensors compute the
    inputs, from the merged features before that block or layer.
    """
    layout = layout_of(job)
    by_name = {submodule.name: submodule for submodule in layout.submodules}

    def weights_of(group: Sequence[Submodule]) -> Mapping[str, Sequence[WeightedSlice]]:
        finish(group[0].forward_group)
        return weights_by_tensor(
            [solve_submodule(by_name[part.name], statistics, layout, objectives=[part.name]) for part in group]
        )

    return merge_with(job, layout.models, weights_of)
