"""Check the keys of models whose experts write their rows themselves: `dataset: self` and `hint`."""

from __future__ import annotations

from collections.abc import Collection

from mergekit_slta.errors import RecipeError, listing, show
from mergekit_slta.recipe.recipe import Recipe
from mergekit_slta.recipe.settings import SELF, TaskSettings

_OF_DATASETS = ("dataset_config", "split", "text", "completion", "completion_eos")
"""Keys that are about the rows of a dataset."""


def check_self_written(task: TaskSettings, name: str, stated: Collection[str]) -> None:
    """Check the keys of one model.

    Args:
        task: its keys.
        name: its name, for messages.
        stated: the keys under its own `parameters`.

    Raises:
        RecipeError: two keys conflict.
    """
    if task.hint and task.dataset not in (None, SELF):
        raise RecipeError(
            f"{show(name)} has a `hint`, which steers rows that it writes itself, and a `dataset`: drop one of them, "
            f"or set `dataset: {SELF}`",
            code="conflicting-keys",
        )
    for key in _OF_DATASETS:
        if task.dataset == SELF and key in stated:
            raise RecipeError(
                f"{show(name)} has `dataset: {SELF}`, and `{key}` is about rows of a dataset: drop one of them",
                code="conflicting-keys",
            )


def check_no_dataset_is_missed(recipe: Recipe) -> None:
    """Refuse keys about the rows of a dataset in a recipe that names none.

    Raises:
        RecipeError: see above.
    """
    for task in recipe.tasks:
        if found := [f"`{key}`" for key in _OF_DATASETS if key in task.model_fields_set]:
            raise RecipeError(
                f"{show(recipe.names[task.model])} has {listing(found)}, and no `dataset` for that: name it, or drop "
                f"{listing(found)}",
                code="conflicting-keys",
            )


def check_rows_are_fitted(recipe: Recipe) -> None:
    """Refuse models that would write rows for an objective that fits none.

    Raises:
        RecipeError: see above.
    """
    for task in recipe.tasks:
        if not recipe.settings.own.needs_rows and (task.dataset == SELF or task.hint):
            key = "hint" if task.hint else f"dataset: {SELF}"
            raise RecipeError(
                f"{show(recipe.names[task.model])} has `{key}`, and `objective: {recipe.settings.objective}` fits no "
                f"rows that it could write: drop `{key}`, or change `objective`",
                code="conflicting-keys",
            )
