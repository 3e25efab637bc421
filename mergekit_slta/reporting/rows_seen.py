"""Draw the calibration rows of a finished merge again, to show them on its page.

Scope: rows are not kept with a merge, because they may be private. They are shown if they are still at hand on this
machine, and are the ones that were used.
"""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path

from mergekit_slta.errors import SltaError
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.names import MERGED_RECIPE_NAME, ROWS_FOLDER
from mergekit_slta.libraries.mergekit_plan import quiet_log
from mergekit_slta.recipe.load import load_config
from mergekit_slta.recipe.read import read_recipe
from mergekit_slta.recipe.recipe import Recipe
from mergekit_slta.recipe.settings import SELF
from mergekit_slta.reporting.names import PublicNames
from mergekit_slta.reporting.page import RowAsSeen


def rows_as_seen(out: Path, alphas: Alphas, names: PublicNames) -> list[RowAsSeen]:
    """The first row of each task, as the model sees it.

    Args:
        out: the folder of the merge, with its recipe.
        alphas, names: its alphas, and public names of their models.

    Returns:
        The rows; none of a task whose rows are not those of the alphas file, and none at all if the recipe names models
        or data that are not local: nothing is downloaded for a page.
    """
    hashes = {
        str(task["model"]): task.get("sha256") for task in alphas.calibration.get("tasks", ()) if task.get("rows")
    }
    try:
        recipe = _with_writers(read_recipe(load_config(out / MERGED_RECIPE_NAME)[0]), alphas)
        if not hashes or not _is_local(recipe):
            return []
        from mergekit.options import MergeOptions  # both take seconds to import

        from mergekit_slta.job.preflight import prepare

        with quiet_log("mergekit_slta"):
            day = alphas.calibration.get("date")
            job = prepare(
                recipe, MergeOptions(), need_rows=False, for_merge=False, plan_only=True,
                rows_in=[out / ROWS_FOLDER],
                day=date.fromisoformat(day) if isinstance(day, str) else None,
            )  # fmt: skip
    except (SltaError, ValueError, OSError):  # something has changed since: the page goes without rows
        return []
    found = []
    for task, drawn in zip(recipe.tasks, job.rows, strict=True):
        label = recipe.label(task.model)
        if drawn is None or job.row_tokenizer is None or hashes.get(label) != drawn.sha256:
            continue
        from mergekit_slta.reporting.row_view import row_parts

        parts = row_parts(drawn.rows[0], job.row_tokenizer)
        found.append(RowAsSeen(names.model(label), drawn.rows[0].number, parts["prompt"], parts["answer"]))
    return found


def _with_writers(recipe: Recipe, alphas: Alphas) -> Recipe:
    """The recipe with `dataset: self` for the experts that wrote their rows because no model named a dataset."""
    wrote = {str(task["model"]) for task in alphas.calibration.get("tasks", ()) if task.get("dataset") == SELF}
    tasks = [
        task.model_copy(update={"dataset": SELF}) if recipe.label(task.model) in wrote else task
        for task in recipe.tasks
    ]
    return recipe.model_copy(update={"tasks": tuple(tasks)})


def _is_local(recipe: Recipe) -> bool:
    models = [part.path for model in recipe.models for part in (model.model, model.lora) if part is not None]
    data = [os.path.expanduser(task.dataset) for task in recipe.tasks if task.dataset]
    data = [each for each in data if each != SELF]
    return all(map(os.path.isdir, models)) and all(map(os.path.exists, data))
