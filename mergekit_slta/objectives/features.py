"""Rows through the runner to Gram matrices: in one process or several, whole or from where a killed run stood.

Scope: one state; which rows, and what is made of the matrices, is `calibration.py`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mergekit_slta.checkpoints.tensors import Checkpoints, Weights
from mergekit_slta.data.batches import BATCH_TOKENS, plan_batches, plan_packs
from mergekit_slta.errors import RunError, show
from mergekit_slta.files.alphas_file import weights_by_tensor
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.job.preflight import Job, check_rows
from mergekit_slta.job.solve import layout_of, solve_submodule
from mergekit_slta.maths.task_arithmetic import WeightedSlice, merge_tensor
from mergekit_slta.models.submodules import Submodule
from mergekit_slta.runner.forward import evaluate_submodules
from mergekit_slta.runner.state import Evaluation, ForwardState, MergeGroup
from mergekit_slta.runtime.distributed import Ranks
from mergekit_slta.runtime.progress import Progress
from mergekit_slta.runtime.resume import ResumeStore

LOG = logging.getLogger(__name__)
MAX_RELATIVE_DISTANCE = 0.7
"""An expert's change of a layer over the layer, as Frobenius norms: two models that were trained apart have about 1.4,
full fine-tuning rarely passes 0.1."""


def warn_of_distance(job: Job) -> None:
    """Say which experts lie so far from the base that they were hardly fine-tuned from it, by the middle layer.

    Raises:
        ModelError: a tensor there is missing, or holds NaN or Inf.
    """
    prefix = f"{job.skeleton.layers_path}.{job.skeleton.num_layers // 2}."
    checkpoints = Checkpoints(job.plan, job.recipe.names, job.device, job.dtype, job.tokenizer)

    def measured(name: str) -> Tensor:
        """Squared norms: of the base's tensor, and of every expert's change."""
        base, *experts = (weights[name] for weights in checkpoints.load([name]))
        parts = [base, *(expert - base for expert in experts)]
        return torch.tensor([float(part.float().square().sum()) for part in parts], dtype=torch.float64)

    squares = torch.zeros(len(job.plan.models), dtype=torch.float64)
    for name in job.plan.tensors:
        if name.startswith(prefix) and len(job.skeleton.shapes.get(name, ())) > 1:
            squares += measured(name)
    for model, square in zip(job.plan.models[1:], squares[1:].tolist(), strict=True):
        share = (square / max(float(squares[0]), 1e-30)) ** 0.5
        if share > MAX_RELATIVE_DISTANCE:
            LOG.warning(
                "%s differs from the base by %.0f%% of the weights in %s: was it fine-tuned from this very base?",
                show(job.recipe.names[model]), 100 * share, prefix[:-1],
            )  # fmt: skip


def canonical_rows(job: Job) -> tuple[list[Sequence[int]], list[int]]:
    """The calibration rows' tokens and tasks, in the canonical order of the experts.

    Args:
        job: the recipe, prepared.

    Raises:
        DataError: an expert without rows.
    """
    check_rows(job.rows, [job.recipe.names[task.model] for task in job.recipe.tasks])
    by_model = {task.model: drawn for task, drawn in zip(job.recipe.tasks, job.rows, strict=True)}
    tokens: list[Sequence[int]] = []
    row_task: list[int] = []
    for index, model in enumerate(job.plan.models[1:]):
        for row in by_model[model].rows:  # type: ignore[union-attr] - check_rows
            tokens.append(row.ids)
            row_task.append(index)
    return tokens, row_task


@torch.inference_mode()
def gather(
    job: Job,
    tokens: Sequence[Sequence[int]],
    row_task: Sequence[int],
    *,
    records: ResumeStore | None,
    ranks: Ranks,
) -> Statistics:
    """Feed rows through the base, every expert's submodules beside it, and keep the Gram matrices.

    Args:
        job: the recipe, prepared.
        tokens, row_task: the rows, and the canonical number of each one's task.
        records: finished groups of this pass, and where more are kept; None keeps none.
        ranks: processes that share the rows; each gets the matrices of all.

    Raises:
        ModelError, RunError: NaN or Inf in weights or features, memory runs out, or another process is gone.
    """
    names = [job.recipe.names[model] for model in job.plan.models[1:]]
    statistics = Statistics(torch.tensor(list(row_task), dtype=torch.int64, device="cpu"), num_models=len(names))
    by_group: dict[str, list[str]] = {}
    for submodule in job.submodules:
        by_group.setdefault(submodule.forward_group, []).append(submodule.name)
    finished = _take_up(statistics, by_group, records, ranks)

    def finish(group: str) -> None:
        """All rows have passed a group: sum over the processes, and keep."""
        if group in finished:
            return
        finished.add(group)
        for name in by_group[group]:
            statistics.begin(name)
            ranks.all_reduce_(statistics.by_submodule[name])
        if records is not None and ranks.is_first:
            records.put(group, {name: statistics.by_submodule[name] for name in by_group[group]})

    # Single matrices take rows one by one: see the runner.
    limit = 0 if job.recipe.settings.granularity == "linear" else BATCH_TOKENS
    planned = plan_batches(tokens, limit)
    packs = plan_packs(planned, limit)
    sizes = [sum(sum(planned[number].lengths) for number in pack) for pack in packs]
    own = [packs[place] for place in ranks.share(sizes)]  # whole, so that no product depends on how many share the work
    model_level = job.recipe.settings.granularity == "model"
    merge = _merge_as_solved(job, statistics, finish) if job.recipe.settings.inputs == "merged" else None
    state = ForwardState(
        job.skeleton,
        Checkpoints(job.plan, job.recipe.names, job.device, job.dtype, job.tokenizer),
        [planned[number] for pack in own for number in pack],
        packs=_renumbered(own),
        merge=merge,
        merged_inputs=merge is not None,
        max_pack_tokens=max(sizes),
        skip=frozenset(finished),
        folder=records.activations_folder() if records is not None and ranks.size == 1 and model_level else None,
    )
    quiet = job.options.quiet or not ranks.is_first
    with job.advice_on_memory(), Progress("Calibrating", len(by_group), quiet=quiet) as progress:
        state.announce = progress.announce
        progress.advance(len(finished))
        group = ""
        for evaluation in evaluate_submodules(state, job.submodules) if own else ():
            if group and evaluation.submodule.forward_group != group:
                finish(group)
            group = evaluation.submodule.forward_group
            progress.work_on(group)
            _accumulate(statistics, state, evaluation, names)
            del evaluation  # or this group's weights would live through the loading of the next
        for group in by_group:
            finish(group)
    return statistics


def _renumbered(packs: Sequence[Sequence[int]]) -> list[list[int]]:
    """The same packs over batches of their own."""
    places = iter(range(sum(len(pack) for pack in packs)))
    return [[next(places) for _ in pack] for pack in packs]


def _take_up(
    statistics: Statistics, by_group: Mapping[str, Sequence[str]], records: ResumeStore | None, ranks: Ranks
) -> set[str]:
    """Matrices of the groups that are finished already, in every process."""
    known = [group for group in by_group if records is not None and group in records.finished]
    finished: list[str] = ranks.broadcast(known)
    for group in finished:
        found = records.get(group) if records is not None and ranks.is_first else {}
        for name in by_group[group]:
            statistics.begin(name)
            if name in found:
                statistics.by_submodule[name] += found[name]
            ranks.all_reduce_(statistics.by_submodule[name])
    return set(finished)


def _accumulate(statistics: Statistics, state: ForwardState, evaluation: Evaluation, names: Sequence[str]) -> None:
    base = evaluation.base
    experts = [state.model_coefficients(model) for model in range(1, state.num_models)]
    outputs = [evaluation.outputs_at(coefficients) for coefficients in experts]  # T x [N, d]
    statistics.add(evaluation.submodule.name, evaluation.rows, outputs, evaluation.lengths, base)
    diagonal = statistics.by_submodule[evaluation.submodule.name][list(evaluation.rows)].diagonal(
        dim1=1, dim2=2
    )  # [rows, T]
    if not torch.isfinite(diagonal).all():
        model = names[int((~torch.isfinite(diagonal)).any(0).nonzero()[0])]
        raise RunError(
            f"the features of {show(model)} behind {show(evaluation.submodule.name)} hold NaN or Inf: "
            "use `compute_dtype: float32`, or check that expert"
        )


def _merge_as_solved(job: Job, statistics: Statistics, finish: Callable[[str], None]) -> MergeGroup:
    """`inputs: merged` (A.5.3): behind each group the rows move on through what it has just been merged to.

    `lambda` acts at merge time and is taken as 1 here. A tied table moves the rows by the embedding's objective alone:
    the head's is not known yet; the file's alpha is solved for both. Heads of one attention block, and matrices of one
    layer, see what the base makes of the merged features before that block or layer.
    """
    layout = layout_of(job)
    by_name = {submodule["name"]: submodule for submodule in layout["submodules"]}
    settings = job.recipe.settings
    importance = [task.importance for task in job.recipe.tasks]

    def solved(group: Sequence[Submodule]) -> Mapping[str, Sequence[WeightedSlice]]:
        finish(group[0].forward_group)
        return weights_by_tensor(
            [
                solve_submodule(
                    by_name[submodule.name], statistics, layout, importance=importance, balance=settings.balance,
                    ridge=settings.ridge, objectives=[submodule.name],
                )
                for submodule in group
            ]
        )  # fmt: skip

    return merge_with(job, layout["models"], solved)


def merge_with(
    job: Job, models: Sequence[str], pieces: Callable[[Sequence[Submodule]], Mapping[str, Sequence[WeightedSlice]]]
) -> MergeGroup:
    """Make a state's merged tensors, as the merge method will make them but for the recipe's `lambda`.

    Args:
        job: whose models are merged.
        models: the order of the pieces' alphas.
        pieces: submodules of a group -> the slices of (at least) their tensors, with their alphas.
    """
    columns = [models.index(job.recipe.label(model)) for model in job.plan.models[1:]]

    def merge(group: Sequence[Submodule], weights: Sequence[Weights]) -> Weights:
        known = pieces(group)
        merged = {}
        for tensor in weights[0]:
            tied = job.plan.is_tied and tensor == job.skeleton.head_weight
            own = known[job.skeleton.embedding_weight if tied else tensor]
            ordered = [piece._replace(alpha=tuple(piece.alpha[column] for column in columns)) for piece in own]
            base, *experts = (given[tensor] for given in weights)
            merged[tensor] = merge_tensor(base, experts, ordered, 1.0, base.dtype)
        return merged

    return merge
