"""The linearity analysis: recipe -> rows -> runner at interpolated experts -> the paper's measures -> linearity file.

Scope: the order of the steps, and going on after a kill. Three walks, since the rows meet the layers as a whole, the
blocks inside them, and the whole model: each reads every checkpoint once and holds one step of every model.

Inputs are the base's, as in the paper, whatever the recipe's `inputs`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_slta.analysis.measurements import Observation
from mergekit_slta.checkpoints.tensors import Checkpoints
from mergekit_slta.data.batches import plan_packs, plan_task_batches
from mergekit_slta.errors import ModelError, RecipeError
from mergekit_slta.files.identity import hash_identity, importance_label
from mergekit_slta.files.linearity_file import Combined, Level, Linearity, SubmoduleLinearity, number
from mergekit_slta.files.names import resume_folder
from mergekit_slta.job.job import Job
from mergekit_slta.maths.linearity import NUM_INTERVALS, PAIR_GRID, TRIPLE_GRID, Grid
from mergekit_slta.models.submodules import Submodule, partition
from mergekit_slta.recipe.recipe import Recipe
from mergekit_slta.recipe.settings import ObjectiveSettings
from mergekit_slta.runner.forward import evaluate_submodules
from mergekit_slta.runner.state import HEAD_ELEMENTS, ForwardState
from mergekit_slta.runtime.progress import Progress
from mergekit_slta.runtime.resume import ResumeStore

LOG = logging.getLogger(__name__)
BATCH_TOKENS = 512
"""Tokens per batch: the features at a dozen points stand side by side, so less than in a calibration."""
_PACKAGES = ("mergekit-slta", "mergekit", "transformers", "torch")
_LEVELS = ("layer", "head_mlp", "model")
_KINDS = ("model", "layer", "attention", "attention_head", "mlp", "norm", "head", "embed")
"""From the outside in: the order of the table and of the figures."""
_NOT_OURS = {"granularity", "objective", "balance", "ridge"}
"""Labels of a job's identity that do not change what is measured; the rows are told by their hashes."""


def for_linearity(recipe: Recipe) -> Recipe:
    """The recipe without the keys of its objective: nothing is solved, and every task's rows are drawn once."""
    return recipe.model_copy(update={"settings": recipe.settings.model_copy(update={"own": ObjectiveSettings()})})


def analyse(job: Job, path: Path, num_rows: int | None = None) -> tuple[Linearity, bool]:
    """Measure the linearity of a recipe's experts, and write it to `path`.

    A run that was killed goes on from the records beside `path`; a finished one is not repeated.

    Args:
        job: the recipe, prepared; `for_linearity` of it, where it is not to have rows for steps.
        path: the linearity file; checked by `check_linearity_target`.
        num_rows: of each task, in the order in which they were drawn; all by default.

    Returns:
        The measures, and whether they were there already.

    Raises:
        RecipeError, DataError, ModelError, RunError, OutputError: in one line.
    """
    job.check_rows()
    if num_rows is not None and num_rows < 1:
        raise RecipeError(f"--rows is {num_rows}: use at least 1 row of each task")
    rows = _rows(job, num_rows)
    mark = _fingerprint(job, rows)
    if path.exists():
        found = Linearity.load(path)
        if found.provenance.get("fingerprint") == mark:
            return found, True
    entries: list[SubmoduleLinearity] = []
    with (
        ResumeStore(resume_folder(path), mark) as records,
        torch.inference_mode(),
        job.advice_on_memory(),
    ):
        records.open()
        passes = [(level, _submodules(job, level)) for level in _LEVELS]
        total = sum(len({submodule.forward_group for submodule in submodules}) for _, submodules in passes)
        with Progress("Measuring", total, quiet=job.options.quiet) as progress:
            for level, submodules in passes:
                entries += _walk(job, rows, level, submodules, records, progress)
        result = _assemble(job, rows, entries, mark)
        result.save(path)
        records.remove()
    return result, False


def num_forwards(num_experts: int) -> int:
    """Forward passes of a row through the model: per state the base, the way to the own expert, the other experts,
    pairs and triples."""
    grid = Grid(0, num_experts)
    return len(_LEVELS) * (1 + len(grid.anchors) + len(grid.mixed))


@dataclass(frozen=True)
class _Rows:
    """Rows of all tasks, in canonical order of the experts: tokens, and whose they are."""

    tokens: list[Sequence[int]]
    task: list[int]
    numbers: list[list[int]]


def _rows(job: Job, num_rows: int | None) -> _Rows:
    by_model = {task.model: drawn for task, drawn in zip(job.recipe.tasks, job.rows, strict=True)}
    tokens, task, numbers = [], [], []
    for index, model in enumerate(job.plan.models[1:]):
        drawn = by_model[model].rows[:num_rows]  # type: ignore[union-attr] - check_rows
        tokens += [row.ids for row in drawn]
        task += [index] * len(drawn)
        numbers.append([row.number for row in drawn])
    return _Rows(tokens, task, numbers)


def _fingerprint(job: Job, rows: _Rows) -> str:
    left_out = _NOT_OURS | {importance_label(job.recipe.label(model)) for model in job.experts}
    record = {label: value for label, value in job.identity.items() if label not in left_out}
    grids = str((NUM_INTERVALS, PAIR_GRID, TRIPLE_GRID, BATCH_TOKENS, HEAD_ELEMENTS))
    versions = {package: version(package) for package in _PACKAGES}
    return hash_identity({**record, **versions, "rows": str(rows.numbers), "grids": grids, "device": job.device.type})


def _submodules(job: Job, level: str) -> list[Submodule]:
    """What a state evaluates; the blocks' state ends before the head, which the layers' has measured."""
    tied = job.plan.is_tied
    names, anatomy = job.plan.tensors, job.skeleton.anatomy
    try:
        submodules = partition(names, anatomy, level, tied=tied)
    except ModelError:
        if level != "head_mlp":
            raise
        LOG.warning("attention heads cannot be told apart in this architecture: they are left out")
        submodules = partition(names, anatomy, "attn_mlp", tied=tied)
    if level == "head_mlp":
        return [submodule for submodule in submodules if submodule.kind != "head"]
    return submodules


def _walk(
    job: Job, rows: _Rows, level: str, submodules: list[Submodule], records: ResumeStore, progress: Progress
) -> Iterator[SubmoduleLinearity]:
    """Measure every submodule of one state; steps that have a record are not evaluated again."""
    # An expert's interpolations are looked at on its own task's rows only.
    batches = plan_task_batches(rows.tokens, rows.task, BATCH_TOKENS)
    num_models = len(job.plan.models) - 1
    grids = [Grid(rows.task[batch.rows[0]], num_models) for batch in batches]
    steps = list(dict.fromkeys(submodule.forward_group for submodule in submodules))
    done = {step for step in steps if f"{level}/{step}" in records.finished}
    if level == "head_mlp":
        done.add("embed")  # measured with the layers; here it only lets the rows in
    progress.advance(len(done))
    if len(done) < len(steps):
        state = ForwardState(
            job.skeleton,
            Checkpoints(job.plan, job.recipe.names, job.device, job.dtype, job.tokenizer),
            batches,
            coefficients=[[*grid.anchors, *grid.mixed] for grid in grids],
            packs=plan_packs(batches, BATCH_TOKENS, [grid.task for grid in grids]),
            skip=done,
            folder=records.activations_folder() if level == "model" else None,
            head_elements=HEAD_ELEMENTS // 2,
            announce=progress.announce,
        )
        step = Observation(rows.task, grids)
        for evaluation in evaluate_submodules(state, submodules):
            if evaluation.submodule.forward_group != step.step:
                _finish(step, level, records)
                step = Observation(rows.task, grids, evaluation.submodule.forward_group)
            progress.work_on(f"{level}/{step.step}")
            step.add(evaluation)
            del evaluation
        _finish(step, level, records)
    for submodule in submodules:
        if f"{level}/{submodule.forward_group}" in records.finished:
            found = records.get(f"{level}/{submodule.forward_group}")
            yield _entry(submodule, {key.rpartition("|")[2]: value for key, value in found.items()
                                     if key.rpartition("|")[0] == submodule.name})  # fmt: skip


def _finish(step: Observation, level: str, records: ResumeStore) -> None:
    if step.step:
        records.put(f"{level}/{step.step}", step.measures())


def _entry(submodule: Submodule, found: dict[str, Tensor]) -> SubmoduleLinearity:
    def numbers(values: Tensor) -> tuple:
        if values.dim() == 1:
            return tuple(number(value) for value in values.tolist())
        return tuple(numbers(part) for part in values)

    apart = found["pair_disagreement"]
    return SubmoduleLinearity(
        name=submodule.name,
        kind=submodule.kind,
        layer=submodule.layer,
        non_linearity=numbers(found["score"]),
        non_linearity_std=numbers(found["score_std"]),
        distances=None if submodule.kind == "attention_head" else numbers(found["ratios"]),
        projection_distance=Combined(
            pairs=numbers(found["pair_projection"]), triples=numbers(found["triple_projection"])
        ),
        cosine=Combined(pairs=numbers(found["pair_cosine"]), triples=numbers(found["triple_cosine"])),
        cosine_base=number(float(found["cosine_base"])),
        disentanglement=numbers(found["pair_disentanglement"]),
        disagreement=numbers(apart) if submodule.kind in ("model", "head") else None,
    )


def _assemble(job: Job, rows: _Rows, entries: list[SubmoduleLinearity], mark: str) -> Linearity:
    experts = job.plan.models[1:]
    kinds = [kind for kind in _KINDS if any(entry.kind == kind for entry in entries)]
    settings = job.recipe.settings
    by_model = {task.model: drawn for task, drawn in zip(job.recipe.tasks, job.rows, strict=True)}
    tasks: list[dict[str, Any]] = [
        {
            "model": job.recipe.label(model),
            "dataset": by_model[model].dataset,  # type: ignore[union-attr] - check_rows
            "rows": numbers,
            "tokens": sum(len(ids) for ids, task in zip(rows.tokens, rows.task, strict=True) if task == index),
        }
        for index, (model, numbers) in enumerate(zip(experts, rows.numbers, strict=True))
    ]
    return Linearity(
        base_model=job.recipe.label(job.recipe.base),
        models=tuple(job.recipe.label(model) for model in experts),
        pairs=tuple(combinations(range(len(experts)), 2)),
        triples=tuple(combinations(range(len(experts)), 3)),
        settings={
            "intervals": NUM_INTERVALS,
            "pair_grid": list(PAIR_GRID),
            "triple_grid": list(TRIPLE_GRID),
            "seed": settings.seed,
            "max_seq_length": settings.max_seq_length,
            "compute_dtype": settings.compute_dtype,
            "tasks": tasks,
        },
        submodules=tuple(entries),
        levels={kind: Level.of([entry for entry in entries if entry.kind == kind]) for kind in kinds},
        provenance={
            **{package: version(package) for package in _PACKAGES},
            "fingerprint": mark,
        },
    )
