"""The rows that merges are compared on: the second half of the rows that each task holds out.

Scope: which rows, and their order. Scores are computed in canonical order of the tasks, and kept in the recipe's.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from mergekit_slta.data.rows import Example, Row, TaskRows
from mergekit_slta.errors import DataError, RecipeError, show
from mergekit_slta.files.comparison_file import ComparedTask
from mergekit_slta.job.job import Job
from mergekit_slta.recipe.recipe import Recipe
from mergekit_slta.recipe.settings import SELF

MIN_ROWS = 2
"""Compared rows of each task that are needed: one row has no error."""
SHORT_ANSWER = 32
"""Tokens of the longest answer that counts for the exact answers."""


class ComparedRows:
    """The compared rows of a job.

    Args:
        job: its held-out rows.
        limit: rows of each task, at most; None for all.

    Attributes:
        rows: of each task, in the recipe's order.
        places: for each task of the recipe, its index in canonical order.

    Raises:
        DataError: a task has fewer than `MIN_ROWS`.
    """

    def __init__(self, job: Job, limit: int | None = None) -> None:
        self._job = job
        by_name = {drawn.name: drawn for drawn in job.task_rows()}
        experts = [task.model for task in job.recipe.tasks]
        self._drawn = [by_name[job.recipe.names[model]] for model in experts]
        self.rows = [_compared(drawn)[:limit] for drawn in self._drawn]
        self.places = [job.experts.index(model) for model in experts]
        self._canonical = sorted(range(len(experts)), key=self.places.__getitem__)

    def examples(self) -> list[Example]:
        """All rows in canonical order."""
        return [Example(row, task) for task, place in enumerate(self._canonical) for row in self.rows[place]]

    def tasks(self, names: list[str]) -> tuple[ComparedTask, ...]:
        """The tasks of a comparison file.

        Args:
            names: of the experts, in the recipe's order.
        """
        longest = self._job.recipe.settings.max_seq_length
        return tuple(
            ComparedTask(
                model=name,
                dataset=drawn.dataset,
                rows=tuple(row.number for row in rows),
                answer_tokens=tuple(len(row.ids) - row.completion for row in rows),
                is_short=tuple(_is_short(row, longest) for row in rows),
            )
            for name, rows, drawn in zip(names, self.rows, self._drawn, strict=True)
        )

    def by_task(self, values: Tensor) -> list[list[Any]]:
        """Values [rows] of rows in canonical order, as a list for each task of the recipe; None if not finite."""
        parts = values.split([len(self.rows[place]) for place in self._canonical])
        found = dict(zip(self._canonical, parts, strict=True))
        return [[_plain(value) for value in found[place].tolist()] for place in range(len(self.rows))]


def _compared(drawn: TaskRows) -> tuple[Row, ...]:
    rows = drawn.comparison
    if len(rows) < MIN_ROWS:
        raise DataError(
            f"{show(drawn.dataset)} leaves {len(rows)} rows to compare merges on, and {MIN_ROWS} are needed: give 20 "
            "or more different rows per task (of 150, 15 are compared)",
            code="too-few-rows",
        )
    return rows


def _is_short(row: Row, longest: int) -> bool:
    """Whether a row has a prompt, and a short answer that `max_seq_length` has not cut."""
    return row.completion > 1 and len(row.ids) < longest and len(row.ids) - row.completion <= SHORT_ANSWER


def _plain(value: float | bool) -> float | bool | None:
    if isinstance(value, bool):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None


def check_datasets(recipe: Recipe) -> None:
    """Check that every task names rows. Those that experts would write are none: merges are to be compared on others.

    Raises:
        DataError: a task names no dataset.
        RecipeError: a task has `dataset: self`.
    """
    for task in recipe.tasks:
        name = show(recipe.names[task.model])
        if task.dataset is None:
            raise DataError(f"{name} has no `dataset`: name rows, on which merges are compared", code="missing-dataset")
        if task.dataset == SELF:
            raise RecipeError(
                f"{name} has `dataset: {SELF}`, and `compare` scores merges on rows of a `dataset`: name one, such as "
                "a file that `mergekit-slta rows` has written",
                code="conflicting-keys",
            )
