"""The linearity analysis: from a recipe's rows to the linearity file.

Scope: which forward passes are made, and how a killed run resumes. There are three passes over the rows: for whole
layers, for the blocks and heads inside them, and for the whole model. Each pass reads every checkpoint once and holds
one forward group of every model in memory. `measurements` turns the outputs at interpolated experts into the paper's
measures.

The inputs of a submodule are the base's features, as in the paper. The recipe's `inputs` key is ignored.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from mergekit_slta.analysis.measurements import GroupMeasurement
from mergekit_slta.data.batches import plan_packs, plan_task_batches
from mergekit_slta.errors import ModelError, RecipeError
from mergekit_slta.files.identity import hash_identity, importance_label
from mergekit_slta.files.linearity_file import Combined, Level, Linearity, SubmoduleLinearity, is_linearity_file, number
from mergekit_slta.files.names import resume_folder
from mergekit_slta.job.job import Job
from mergekit_slta.maths.linearity import NUM_INTERVALS, PAIR_GRID, TRIPLE_GRID, Grid
from mergekit_slta.models.submodules import Submodule, partition
from mergekit_slta.recipe.recipe import Recipe
from mergekit_slta.recipe.settings import ObjectiveSettings
from mergekit_slta.runner.forward import evaluate_submodules
from mergekit_slta.runner.state import HEAD_ELEMENTS, ForwardState
from mergekit_slta.runtime.interruption import interruptible
from mergekit_slta.runtime.progress import Progress
from mergekit_slta.runtime.resume import ResumeStore

LOG = logging.getLogger(__name__)
BATCH_TOKENS = 512
"""Tokens per batch. Fewer than in a calibration, because features at a dozen points are in memory at the same time."""
_PACKAGES = ("mergekit-slta", "mergekit", "transformers", "torch")
_GRANULARITIES = ("layer", "head_mlp", "model")
"""Granularity of each of the three forward passes."""
_KINDS = ("model", "layer", "attention", "attention_head", "mlp", "norm", "head", "embed")
"""Kinds of submodules, in the order of the table and of the figures."""
_IRRELEVANT = {"granularity", "objective", "balance", "ridge", "seed"}
"""Labels of a job's identity that do not change the measures. The labels of the rows cover the seed."""


def for_linearity(recipe: Recipe) -> Recipe:
    """Return the recipe without its objective's own keys, and without directions.

    Nothing is solved, so each task's rows are drawn once, and only experts are measured.
    """
    stated = recipe.settings.stated | {"objective"}  # rows are needed, whatever the recipe leaves open
    settings = recipe.settings.model_copy(update={"own": ObjectiveSettings(), "direction": "none", "stated": stated})
    config = recipe.config.model_copy(
        update={"models": [entry for entry in recipe.config.models or [] if entry.model not in recipe.directions]}
    )
    return recipe.model_copy(update={"settings": settings, "directions": (), "config": config})


def analyse(job: Job, path: Path, num_rows: int | None = None) -> tuple[Linearity, bool]:
    """Measure the linearity of a recipe's experts, and write it to `path`.

    A killed run resumes from the work stored beside `path`. A finished run is not repeated.

    Args:
        job: prepared from the recipe that `for_linearity` returns.
        path: the linearity file; the caller has checked it with `check_linearity_target`.
        num_rows: use the first `num_rows` rows of each task; all by default.

    Returns:
        The measures, and whether the file already held them.

    Raises:
        RecipeError: `num_rows` is below 1.
        DataError: an expert has no `dataset`.
        AlphasError: the file at `path` is damaged or of another type.
        ModelError: a weight is NaN or Inf.
        RunError: a feature is NaN or Inf, or memory ran out.
        OutputError: the file cannot be written, or another process is writing it.
    """
    if num_rows is not None and num_rows < 1:
        raise RecipeError(f"--rows is {num_rows}: use at least 1 row of each task", code="invalid-value")
    rows = _Rows.of(job, num_rows)
    fingerprint = _fingerprint(job, rows)
    if is_linearity_file(path):
        found = Linearity.load(path)
        if found.provenance.get("fingerprint") == fingerprint:
            return found, True
    entries: list[SubmoduleLinearity] = []
    with (
        ResumeStore(resume_folder(path), fingerprint, job.day) as resume,
        interruptible(lambda: "the finished parts are kept; run the same command again, and it goes on"),
        torch.inference_mode(),
        job.computing(subtracts=True),
    ):
        resume.open()
        passes = [(granularity, _submodules(job, granularity)) for granularity in _GRANULARITIES]
        total = sum(len({submodule.forward_group for submodule in submodules}) for _, submodules in passes)
        num_layers = job.skeleton.num_layers
        with Progress("linearity", total, quiet=job.options.quiet, num_layers=num_layers) as progress:
            for granularity, submodules in passes:
                _measure(job, rows, granularity, submodules, resume, progress)
                entries += _entries(granularity, submodules, resume)
        result = _assemble(job, rows, entries, fingerprint)
        result.save(path)
        resume.remove()
    return result, False


def num_forwards(num_experts: int) -> int:
    """Number of forward passes per row.

    For each granularity: the base, the points between it and the row's own expert, the other experts, pairs, triples.
    """
    grid = Grid(0, num_experts)
    return len(_GRANULARITIES) * (1 + len(grid.anchors) + len(grid.mixed))


@dataclass(frozen=True)
class _Rows:
    """The rows that are measured, in canonical order of their tasks.

    Attributes:
        tokens: token ids, per row.
        task: index of the task, per row.
        numbers: row numbers in the dataset, per task.
        datasets: name of the dataset, per task.
    """

    tokens: list[Sequence[int]]
    task: list[int]
    numbers: list[list[int]]
    datasets: list[str]

    @classmethod
    def of(cls, job: Job, num_rows: int | None) -> _Rows:
        """The first `num_rows` rows of each task."""
        tasks = job.task_rows()
        chosen = [drawn.rows[:num_rows] for drawn in tasks]
        return cls(
            tokens=[row.ids for rows in chosen for row in rows],
            task=[task for task, rows in enumerate(chosen) for _ in rows],
            numbers=[[row.number for row in rows] for rows in chosen],
            datasets=[drawn.dataset for drawn in tasks],
        )


def _fingerprint(job: Job, rows: _Rows) -> str:
    left_out = _IRRELEVANT | set(job.recipe.settings.own.effective())
    left_out |= {importance_label(job.recipe.label(model)) for model in job.experts}
    record = {label: value for label, value in job.identity.items() if label not in left_out}
    grids = str((NUM_INTERVALS, PAIR_GRID, TRIPLE_GRID, BATCH_TOKENS, HEAD_ELEMENTS))
    versions = {package: version(package) for package in _PACKAGES}
    return hash_identity({**record, **versions, "rows": str(rows.numbers), "grids": grids, "device": job.device.type})


def _submodules(job: Job, granularity: str) -> list[Submodule]:
    """Submodules to measure at a granularity. The output head is measured with the layers only."""
    tied = job.plan.is_tied
    names, anatomy = job.plan.tensors, job.skeleton.anatomy
    try:
        submodules = partition(names, anatomy, granularity, tied=tied)
    except ModelError:
        if granularity != "head_mlp":
            raise
        LOG.warning("attention heads cannot be told apart in this architecture: they are left out")
        submodules = partition(names, anatomy, "attn_mlp", tied=tied)
    if granularity == "head_mlp":
        return [submodule for submodule in submodules if submodule.kind != "head"]
    return submodules


def _measure(
    job: Job, rows: _Rows, granularity: str, submodules: list[Submodule], resume: ResumeStore, progress: Progress
) -> None:
    """Measure the submodules of one granularity and store the measures. Finished forward groups are skipped."""
    # A batch holds rows of one task, because an interpolated expert is evaluated only on rows of its own task.
    batches = plan_task_batches(rows.tokens, rows.task, BATCH_TOKENS)
    grids = [Grid(rows.task[batch.rows[0]], len(job.experts)) for batch in batches]
    groups = list(dict.fromkeys(submodule.forward_group for submodule in submodules))
    finished = {group for group in groups if _key(granularity, group) in resume.finished}
    if granularity == "head_mlp":
        finished.add("embed")  # measured with the layers
    progress.advance(len(finished))
    if len(finished) == len(groups):
        return
    state = ForwardState(
        job.skeleton,
        job.checkpoints(),
        batches,
        coefficients=[[*grid.anchors, *grid.mixed] for grid in grids],
        packs=plan_packs(batches, BATCH_TOKENS, [grid.task for grid in grids]),
        skip=finished,
        folder=resume.activations_folder() if granularity == "model" else None,
        head_elements=HEAD_ELEMENTS // 2,
        announce=progress.announce,
    )
    group, measurement = "", GroupMeasurement(rows.task, grids)
    for evaluation in evaluate_submodules(state, submodules):
        if evaluation.submodule.forward_group != group:
            if group:
                resume.put(_key(granularity, group), measurement.measures())
            group, measurement = evaluation.submodule.forward_group, GroupMeasurement(rows.task, grids)
        progress.work_on(_key(granularity, group))
        measurement.add(evaluation)
        del evaluation  # frees its features before the next ones are computed
    if group:
        resume.put(_key(granularity, group), measurement.measures())


def _key(granularity: str, group: str) -> str:
    """The key of a forward group's measures in the resume store."""
    return f"{granularity}/{group}"


def _entries(granularity: str, submodules: list[Submodule], resume: ResumeStore) -> Iterator[SubmoduleLinearity]:
    """The measures in the resume store, as entries of the linearity file."""
    for submodule in submodules:
        key = _key(granularity, submodule.forward_group)
        if key in resume.finished:
            stored = resume.get(key)
            fields = {name.rpartition("|")[2]: value for name, value in stored.items()
                      if name.rpartition("|")[0] == submodule.name}  # fmt: skip
            yield _entry(submodule, fields)


def _entry(submodule: Submodule, measures: dict[str, Tensor]) -> SubmoduleLinearity:
    def numbers(values: Tensor) -> tuple:
        if values.dim() == 1:
            return tuple(number(value) for value in values.tolist())
        return tuple(numbers(part) for part in values)

    return SubmoduleLinearity(
        name=submodule.name,
        kind=submodule.kind,
        layer=submodule.layer,
        non_linearity=numbers(measures["score"]),
        non_linearity_std=numbers(measures["score_std"]),
        distances=None if submodule.kind == "attention_head" else numbers(measures["ratios"]),
        projection_distance=Combined(
            pairs=numbers(measures["pair_projection"]), triples=numbers(measures["triple_projection"])
        ),
        cosine=Combined(pairs=numbers(measures["pair_cosine"]), triples=numbers(measures["triple_cosine"])),
        cosine_base=number(float(measures["cosine_base"])),
        disentanglement=numbers(measures["pair_disentanglement"]),
        disagreement=numbers(measures["pair_disagreement"]) if submodule.kind in ("model", "head") else None,
    )


def _assemble(job: Job, rows: _Rows, entries: list[SubmoduleLinearity], fingerprint: str) -> Linearity:
    settings = job.recipe.settings
    models = tuple(job.recipe.label(model) for model in job.experts)
    kinds = [kind for kind in _KINDS if any(entry.kind == kind for entry in entries)]
    tasks = [
        {
            "model": model,
            "dataset": rows.datasets[task],
            "rows": rows.numbers[task],
            "tokens": sum(len(ids) for ids, own in zip(rows.tokens, rows.task, strict=True) if own == task),
        }
        for task, model in enumerate(models)
    ]
    return Linearity(
        base_model=job.recipe.label(job.recipe.base),
        models=models,
        pairs=tuple(combinations(range(len(models)), 2)),
        triples=tuple(combinations(range(len(models)), 3)),
        settings={
            "intervals": NUM_INTERVALS,
            "pair_grid": list(PAIR_GRID),
            "triple_grid": list(TRIPLE_GRID),
            "seed": settings.seed,
            "max_seq_length": settings.max_seq_length,
            "date": job.day and job.day.isoformat(),
            "compute_dtype": settings.compute_dtype,
            "tasks": tasks,
        },
        submodules=tuple(entries),
        levels={kind: Level.of([entry for entry in entries if entry.kind == kind]) for kind in kinds},
        provenance={
            **{package: version(package) for package in _PACKAGES},
            "fingerprint": fingerprint,
        },
    )
