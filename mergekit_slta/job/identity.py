"""Compute the identity of a job: labels -> values of all settings, rows and checkpoints that its alphas depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from mergekit.common import ModelPath, ModelReference

from mergekit_slta.checkpoints.configs import stored_settings
from mergekit_slta.checkpoints.content_hash import checkpoint_fingerprint
from mergekit_slta.checkpoints.plan import Plan
from mergekit_slta.data.rows import TaskRows, hash_rows
from mergekit_slta.files.identity import (
    hash_text,
    held_out_label,
    importance_label,
    role_label,
    rows_label,
    weights_label,
)
from mergekit_slta.recipe.recipe import Recipe, map_models
from mergekit_slta.recipe.settings import Settings

ROW_SETTINGS = ("num_samples", "max_seq_length", "seed")
"""Settings that only choose rows. The hashes of the rows replace them in the identity. If a recipe names no dataset,
the settings that it states are compared with those in the alphas file."""


def job_identity(
    recipe: Recipe, plan: Plan, rows: Sequence[TaskRows | None], written: Mapping[ModelReference, str]
) -> dict[str, str]:
    """Everything that the alphas depend on, by label.

    Args:
        recipe: the recipe; `lambda` only acts at merge time and is left out.
        plan: mergekit's plan; its loaders and headers are used to hash the checkpoints.
        rows: the rows of each of the recipe's tasks; None for a task without a dataset.
        written: expert that writes its rows itself -> hash of the settings that they depend on, besides the weights.
            It stands for the hash of the rows, so that the identity is known before they are written.

    Returns:
        label -> value. If an expert names no dataset and needs one, only the settings that the recipe states are
        included. Models whose tensors cannot be read yet are left out.
    """
    settings = recipe.settings
    record = {
        key: str(value)
        for key, value in _settings(settings).items()
        if key in settings.stated or None not in rows or not settings.needs_rows
    }
    record["dtype"] = str(recipe.config.dtype)
    labelled = map_models(recipe.config, lambda model: ModelReference(model=ModelPath(path=recipe.label(model))))
    tokenizer = labelled.tokenizer.model_dump_json() if labelled.tokenizer else labelled.tokenizer_source
    record["tokenizer"] = str(tokenizer)
    record["config of the base"] = hash_text(json.dumps(stored_settings(recipe.base), sort_keys=True))
    for task, drawn in zip(recipe.tasks, rows, strict=True):
        name = recipe.label(task.model)
        if task.model in written:
            record[rows_label(name)] = written[task.model]
        elif drawn is not None:
            record[rows_label(name)] = drawn.sha256
            if drawn.held_out:
                record[held_out_label(name)] = hash_rows(drawn.held_out)
        if drawn is not None or "importance" in task.model_fields_set:
            record[importance_label(name)] = str(task.importance)
    for model in recipe.directions:
        record[role_label(recipe.label(model))] = "direction"
    for model in plan.models:
        if model in plan.unread:
            continue
        record[weights_label(recipe.label(model))] = checkpoint_fingerprint(
            plan.loaders[model], plan.headers.get(model)
        )
    return dict(sorted(record.items()))


def _settings(settings: Settings) -> dict[str, object]:
    """The shared settings that change the alphas for given rows."""
    left_out = {"alphas", "own", "stated", "uncalibrated", *ROW_SETTINGS} - (
        {"seed"} if settings.own.uses_seed else set()
    )
    found = {**settings.model_dump(exclude=left_out), **settings.own.effective()}
    if settings.compute_dtype == "auto" and not settings.allows_bfloat16:
        found["compute_dtype"] = settings.tensor_dtype  # "auto" is the same then
    return found


def statistics_identity(recipe: Recipe, identity: dict[str, str]) -> dict[str, str]:
    """The part of a job's identity that its statistics depend on.

    All of it if the statistics depend on earlier solves; else all but the settings of the solve, and what only the
    evaluation depends on.
    """
    if recipe.settings.own.solve_dependence is not None:
        return identity
    names = [recipe.label(task.model) for task in recipe.tasks]
    solve_only = {"balance", "ridge", "evaluate"}
    solve_only |= {label(name) for name in names for label in (importance_label, held_out_label)}
    return {label: value for label, value in identity.items() if label not in solve_only}
