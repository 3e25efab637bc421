"""What alphas are valid for: a labelled record of settings, calibration rows and checkpoint contents."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mergekit_slta.checkpoints.configs import stored_settings
from mergekit_slta.checkpoints.content_hash import checkpoint_fingerprint
from mergekit_slta.checkpoints.plan import Plan
from mergekit_slta.data.rows import TaskRows
from mergekit_slta.files.identity import hash_text
from mergekit_slta.recipe.read import OBJECTIVE_KEYS, Recipe


def job_identity(
    recipe: Recipe,
    plan: Plan,
    rows: Sequence[TaskRows | None],
) -> dict[str, str]:
    """Everything that alphas depend on, by label.

    Args:
        recipe: the recipe; `lambda` only acts at merge time and is left out.
        plan: mergekit's plan, for the checkpoints.
        rows: the rows of each of the recipe's tasks; None where the recipe names no dataset.

    Returns:
        label -> value. Without rows the settings of the calibration do not matter, and only those that the recipe
        states are there.
    """
    stated = recipe.settings.model_fields_set if None in rows else set(type(recipe.settings).model_fields)
    record = {
        key: str(value) for key, value in recipe.settings.model_dump().items() if key in stated and key != "alphas"
    }
    for key in OBJECTIVE_KEYS["joint"]:
        if key not in recipe.settings.objective_keys:
            record.pop(key, None)
    if recipe.settings.row_groups == 1:  # says nothing then
        record.pop("fresh_rows", None)
    record["dtype"] = str(recipe.config.dtype)
    tokenizer = recipe.config.tokenizer.model_dump_json() if recipe.config.tokenizer else recipe.config.tokenizer_source
    record["tokenizer"] = str(tokenizer)
    record["config of the base"] = hash_text(json.dumps(stored_settings(recipe.base), sort_keys=True))
    for task, drawn in zip(recipe.tasks, rows, strict=True):
        name = recipe.label(task.model)
        if drawn is not None:
            record[f"rows of {name}"] = drawn.sha256
        if drawn is not None or "importance" in task.model_fields_set:
            record[f"importance of {name}"] = str(task.importance)
    for model in plan.models:
        record[f"weights of {recipe.label(model)}"] = checkpoint_fingerprint(
            plan.loaders[model], plan.headers.get(model)
        )
    return dict(sorted(record.items()))
