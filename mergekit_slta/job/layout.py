"""Make the layout of a job's alphas file: all its fields that are known before the solve."""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import Any

from mergekit_slta.data.rows import TaskRows
from mergekit_slta.files.alphas_file import SHARED_ROWS, TOO_FEW_ROWS
from mergekit_slta.files.layout import Layout, LayoutSubmodule, LayoutTask, SolveSettings
from mergekit_slta.job.job import Job
from mergekit_slta.models.submodules import Submodule

_SETTINGS = ("seed", "objective", "direction", "compute_dtype", "max_seq_length", "num_samples", "evaluate")


def layout_of(job: Job) -> Layout:
    """Describe a job's models, submodules, rows and settings."""
    recipe, settings = job.recipe, job.recipe.settings
    return Layout(
        granularity=settings.granularity,
        objective=settings.objective,
        base_model=recipe.label(recipe.base),
        models=recipe.model_labels,
        canonical=tuple(job.labels),
        directions=job.directions,
        submodules=tuple(_submodule(job, submodule) for submodule in job.submodules),
        copied=tuple(job.plan.carried),
        settings={
            **{key: getattr(settings, key) for key in _SETTINGS},
            "truncation": "right",
            "stock_definition": job.plan.is_stock,
            "date": job.day and job.day.isoformat(),
            **settings.own.model_dump(),
        },
        tasks=_tasks(job),
        solve=SolveSettings(
            ridge=settings.ridge,
            balance=settings.balance,
            importance={recipe.label(task.model): task.importance for task in recipe.tasks},
        ),
        solve_dependence=settings.own.solve_dependence,
        identity=job.identity,
        versions=dict(library_versions()),
    )


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of this package and of the libraries that its numbers depend on."""
    return {name: version(name) for name in ("mergekit_slta", "mergekit", "transformers", "torch")}


def _submodule(job: Job, submodule: Submodule) -> LayoutSubmodule:
    shared = job.plan.is_tied and submodule.kind == "embed"
    return LayoutSubmodule(
        name=submodule.name,
        kind=submodule.kind,
        layer=submodule.layer,
        tensors=tuple(dict.fromkeys(name for tensor in submodule.tensors for name in job.plan.tensors[tensor].names)),
        slices=_slices(job, submodule),
        objectives=("embed", "head") if shared else (submodule.name,),
    )


def _slices(job: Job, submodule: Submodule) -> dict[str, Any]:
    """name in OUT -> [axis, start, stop]; a list of these if the submodule owns several parts of a fused tensor."""
    slices: dict[str, Any] = {}
    for tensor in dict.fromkeys(part.tensor for part in submodule.slices):
        parts = [list(part[1:]) for part in submodule.slices if part.tensor == tensor]
        slices[job.plan.tensors[tensor].names[0]] = parts[0] if len(parts) == 1 else parts
    return slices


def _tasks(job: Job) -> tuple[LayoutTask, ...]:
    needs_rows = job.recipe.settings.own.needs_rows
    tokens = [{row.ids for row in drawn.rows} if drawn is not None else set() for drawn in job.rows]

    def flags(place: int, drawn: TaskRows) -> tuple[str, ...]:
        is_shared = any(tokens[place] & other for number, other in enumerate(tokens) if number != place)
        has_too_few = job.recipe.settings.evaluate and not drawn.held_out
        return (*[SHARED_ROWS] * is_shared, *[TOO_FEW_ROWS] * has_too_few)

    return tuple(
        LayoutTask(
            model=job.recipe.label(task.model),
            dataset=drawn.dataset,
            dataset_config=task.dataset_config,
            split=task.split,
            text=task.text,
            completion=task.completion,
            completion_eos=task.completion_eos,
            chat_template=drawn.chat_template,
            rows=tuple(row.number for row in drawn.rows) if needs_rows else (),
            tokens=drawn.num_tokens if needs_rows else None,
            sha256=drawn.sha256 if needs_rows else None,
            held_out=tuple(row.number for row in drawn.held_out),
            whole_rows=all(row.completion == 1 for row in drawn.rows),
            flags=flags(place, drawn),
        )
        for place, (task, drawn) in enumerate(zip(job.recipe.tasks, job.rows, strict=True))
        if drawn is not None
    )
