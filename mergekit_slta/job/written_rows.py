"""Rows that experts write themselves (`dataset: self`): which tasks have them, what they depend on, and their files.

Scope: `generation` writes them. Until then other rows stand in for them, as many and as long as they can be, so
that costs are estimated from above.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_slta.data.draw import HELD_OUT_SHARE, MAX_HELD_OUT, missing_dataset
from mergekit_slta.data.rows import Row, TaskRows
from mergekit_slta.errors import RecipeError, show
from mergekit_slta.files.identity import hash_text, rows_run
from mergekit_slta.files.names import rows_names
from mergekit_slta.generation import choices
from mergekit_slta.generation.choices import num_needed
from mergekit_slta.generation.prompts import Prompt, make_prompt, special_ids
from mergekit_slta.generation.store import find_rows
from mergekit_slta.generation.write import Writer, write_all
from mergekit_slta.job.job import Job
from mergekit_slta.job.templates import Templates
from mergekit_slta.recipe.objectives import DATA_FREE, with_objective
from mergekit_slta.recipe.recipe import Recipe, Task
from mergekit_slta.recipe.self_written import check_no_dataset_is_missed
from mergekit_slta.recipe.settings import SELF, TaskSettings
from mergekit_slta.runtime.interruption import interruptible

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_KEYS_WITHOUT_ROWS = frozenset({"alphas", "compute_dtype", "direction", "evaluate", "uncalibrated"})
"""Shared keys that do not ask for weights that are fitted to rows."""
_CHOICES = {name: value for name, value in vars(choices).items() if name.isupper() and name != "DAY"}
"""The constants that rows depend on; `DAY` only where a template reads the clock."""


def without_datasets(recipe: Recipe, options: MergeOptions, *, is_allowed: bool) -> Recipe:
    """A recipe whose tasks name no dataset, with what stands in for rows.

    A recipe that asks for weights that are fitted to rows gets `dataset: self` for all tasks. One that leaves the
    choice gets `objective: data_free`, which is better than `features` on rows that the experts write
    (examples/reproduce).

    Args:
        recipe: the recipe.
        options: with `quiet` nothing is said.
        is_allowed: whether rows are needed and can be written. If not, only a `hint` counts, so that weights which were
            fitted to rows of another one are not taken.

    Raises:
        RecipeError: a `hint` that has no effect, because other tasks name a dataset; or a key about the rows of a
            dataset, and there is none.
    """
    named = [task for task in recipe.tasks if task.dataset is not None]
    hinted = [task for task in recipe.tasks if task.hint and task.dataset is None]
    if not named and recipe.settings.own.needs_rows and (is_allowed or hinted):
        if is_allowed:
            check_no_dataset_is_missed(recipe)
        if _leaves_the_choice(recipe):
            _say(f"the merge has `objective: {DATA_FREE}`; with `dataset: {SELF}` the experts write rows", options)
            return recipe.model_copy(update={"settings": with_objective(recipe.settings, DATA_FREE)})
        if is_allowed:
            _say(f"each expert writes its own rows (`dataset: {SELF}`)", options)
        return _all_writing(recipe)
    if hinted:
        raise RecipeError(
            f"{show(recipe.names[hinted[0].model])} has a `hint` and no `dataset`: set `dataset: {SELF}`, or drop it",
            code="conflicting-keys",
        )
    return recipe


def _leaves_the_choice(recipe: Recipe) -> bool:
    """Whether no key of a recipe asks for weights that are fitted to rows, and its experts can be merged without."""
    settings = recipe.settings
    is_fitted = settings.stated - _KEYS_WITHOUT_ROWS or any(task.model_fields_set - {"model"} for task in recipe.tasks)
    has_direction = "direction" not in settings.stated or settings.direction != "none"
    return not is_fitted and has_direction and not recipe.directions and len(recipe.tasks) > 1


def _say(line: str, options: MergeOptions) -> None:
    if not options.quiet:
        click.echo(f"No model names a dataset: {line}", err=True)


def _all_writing(recipe: Recipe) -> Recipe:
    tasks = tuple(task.model_copy(update={"dataset": SELF}) for task in recipe.tasks)
    return recipe.model_copy(update={"tasks": tasks})


def with_writers(recipe: Recipe) -> Recipe:
    """A recipe some experts of which write their rows: those with `dataset: self`, or all if none has a dataset.

    Raises:
        RecipeError: all have a dataset, the objective fits no rows, or a key is about the rows of a dataset.
    """
    named = [task.dataset for task in recipe.tasks if task.dataset is not None]
    if not recipe.settings.own.needs_rows or (named and SELF not in named):
        raise RecipeError(
            f"no expert of the recipe writes rows: set `dataset: {SELF}` for a model, and an `objective` that fits "
            "rows",
            code="conflicting-keys",
        )
    if named:
        return recipe
    check_no_dataset_is_missed(recipe)
    return _all_writing(recipe)


def written_files(recipe: Recipe, folder: Path) -> list[Path]:
    """The files of rows that experts of a recipe write into a folder, in the recipe's order."""
    names = rows_names(recipe.label(task.model) for task in recipe.tasks)
    return [folder / names[recipe.label(task.model)] for task in recipe.tasks if task.dataset == SELF]


def reading(task: Task, path: Path) -> TaskSettings:
    """The keys of a task with a file of written rows as its dataset."""
    return TaskSettings(dataset=str(path), chat_template=task.chat_template, importance=task.importance)


class WrittenRows:
    """The tasks of a recipe whose experts write their rows.

    Args:
        recipe: the recipe.
        templates: its chat templates.
        configs: the models' configs.
        folders: where the files are looked for; the last one is written to. None: no expert may write any.
        need_rows: whether all tasks need rows.

    Attributes:
        hashes: expert -> hash of all settings that its rows depend on.
        planned: expert -> rows that stand in for those that are not written yet.

    Raises:
        DataError: a model has neither a chat template nor a `hint`, its template cannot be cut, or no rows can be
            written here.
    """

    def __init__(
        self, recipe: Recipe, templates: Templates, configs: Mapping[ModelReference, PretrainedConfig],
        folders: Sequence[Path] | None, *, need_rows: bool,
    ) -> None:  # fmt: skip
        tasks = [task for task in recipe.tasks if task.dataset == SELF] if recipe.settings.needs_rows else []
        self._recipe, self._templates, self._folders = recipe, templates, folders or ()
        self._tasks = {task.model: task for task in tasks}
        self._prompts = {model: self._prompt(task, configs[model]) for model, task in self._tasks.items()}
        self.hashes = {model: self._hash(task) for model, task in self._tasks.items()}
        self.planned = {model: self._planned(task) for model, task in self._tasks.items()}
        self.is_needed = need_rows and bool(tasks)

    def _prompt(self, task: Task, config: PretrainedConfig) -> Prompt:
        name, length = self._recipe.names[task.model], self._recipe.settings.max_seq_length
        ends = self._templates.ends_of(task, config).acting
        return make_prompt(self._templates.of(task), task.hint, name, length, ends)

    def _hash(self, task: Task) -> str:
        """Hash of the settings. The date that calibration writes into rows is none of them, so that rows stay good."""
        settings, prompt = self._recipe.settings, self._prompts[task.model]
        template, ends = prompt.template, prompt.ends - special_ids(self._templates.tokenizer)
        parts: dict[str, object] = {
            "choices": _CHOICES, "hint": task.hint, "rows": num_needed(settings), "seed": settings.seed,
            "max_seq_length": settings.max_seq_length, "dtype": settings.tensor_dtype, "template": template.text,
            "vocabulary": self._vocabulary,
        }  # fmt: skip
        parts |= {"ends": sorted(ends)} if ends else {}
        parts |= {"day": template.written_day.isoformat()} if template.written_day else {}
        return hash_text(json.dumps(parts, sort_keys=True))

    @cached_property
    def _vocabulary(self) -> str:
        return hash_text(json.dumps(sorted(map(str, self._templates.tokenizer.get_vocab().items()))))

    def _planned(self, task: Task) -> TaskRows:
        settings, prompt = self._recipe.settings, self._prompts[task.model]
        count, length, size = num_needed(settings), settings.max_seq_length, len(self._templates.tokenizer)
        first = len(prompt.before_ids)
        rows = tuple(
            Row(number, "", tuple((number * length + place) % size for place in range(length)), min(first, length - 1))
            for number in range(count)
        )
        held_out = min(MAX_HELD_OUT, count // HELD_OUT_SHARE) if settings.evaluate else 0
        name = self._recipe.names[task.model]
        return TaskRows(name, SELF, rows[held_out:], rows[:held_out], is_planned=True)

    def obtain(self, job: Job, *, write: bool) -> Mapping[ModelReference, Path]:
        """Find the files of all written rows; write those that are missing.

        Args:
            job: the job; its models are at hand if `write` is set.
            write: whether missing files are written.

        Returns:
            expert -> file; without `write`, of those experts that have one.

        Raises:
            DataError: nothing can be written here, or an expert writes too few rows that can be used.
            OutputError: a file that is needed was edited, or one cannot be written.
            RunError: an expert does not fit into the memory.
        """
        labels = {model: self._recipe.label(model) for model in self._tasks}
        names = rows_names(self._recipe.label(task.model) for task in self._recipe.tasks)
        base = self._recipe.label(self._recipe.base)
        keys = {model: rows_run(job.identity, label, base) for model, label in labels.items()}
        if None in keys.values():  # weights are not downloaded
            return {}
        find = partial(find_rows, self._folders, are_needed=self.is_needed)
        found = {model: find(names[labels[model]], keys[model]) for model in self._tasks}
        missing = [model for model in job.plan.models if model in found and found[model] is None]
        if missing and write:
            if not self._folders:
                raise missing_dataset(self._recipe.names[missing[0]], is_self_written=True)
            folder = self._folders[-1]
            writers = [
                Writer(
                    job.plan.models.index(model), self._recipe.names[model], self._prompts[model],
                    folder / names[labels[model]], keys[model] or "",
                )
                for model in missing
            ]  # fmt: skip
            settings = self._recipe.settings
            kept = "finished batches of rows are kept; run the same command again, and it goes on"
            with interruptible(lambda: kept), job.computing(), job.clock.phase("rows"):
                write_all(
                    writers, job.checkpoints(), self._templates.tokenizer, wanted=num_needed(settings),
                    max_length=settings.max_seq_length, seed=settings.seed, say=job.say, quiet=job.options.quiet,
                )  # fmt: skip
            found |= {model: writer.path for model, writer in zip(missing, writers, strict=True)}
        return {model: path for model, path in found.items() if path is not None}
