"""Make one merge of a comparison in a scratch folder, with mergekit; and the recipe that makes it again.

Scope: `run_merge` for mergekit's own methods and for this package's. Weights are calibrated beside the comparison file,
where they stay, so that a run that was killed goes on, and the merge can be made again without a calibration.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from mergekit.config import MergeConfiguration

from mergekit_slta.calibration.recorded_day import recorded_day
from mergekit_slta.calibration.reuse import calibrate_to, check_disk_space
from mergekit_slta.comparison.methods import Method
from mergekit_slta.errors import OutputError, RecipeError, RunError, SltaError, listing, show
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.atomic import write_text_atomically
from mergekit_slta.files.comparison_file import ComparedTask
from mergekit_slta.files.identity import hash_text
from mergekit_slta.files.inside import output_path
from mergekit_slta.files.names import ALPHAS_FOLDER, ALPHAS_NAME, RECIPES_FOLDER
from mergekit_slta.files.targets import check_alphas_target, check_overwrite, check_same_models
from mergekit_slta.host.finish import finish_output
from mergekit_slta.host.method import register
from mergekit_slta.host.wrap import wrap_run_merge
from mergekit_slta.job.forecast import forecast
from mergekit_slta.job.job import Job
from mergekit_slta.job.preflight import prepare
from mergekit_slta.libraries.mergekit_plan import defined, quiet_log
from mergekit_slta.libraries.transformers import without_dtype_warning
from mergekit_slta.objectives.registry import estimate
from mergekit_slta.recipe.read import read_recipe
from mergekit_slta.recipe.settings import TASK_KEYS
from mergekit_slta.runtime.clock import Clock, describe_phases

_MARK = "# Written by `mergekit-slta compare`"
"""Begins every recipe that is written here. A recipe without it is the user's."""
_NUMBERS = itertools.count(1)
_PACKAGE = "mergekit_slta"


def recipe_path(out: Path, method: str) -> Path:
    """The recipe of a method's merge in the folder of a comparison."""
    return out / RECIPES_FOLDER / f"{as_file_name(method)}.yml"


def as_file_name(method: str) -> str:
    """A method's name as part of a file's name."""
    return method.replace(":", "_")


class Merger:
    """Makes the merges of a comparison.

    Args:
        job: the models, prepared.
        out: folder of the comparison.
        scratch: folder for merges, inside `out`.
        tasks: the compared rows, which no weights may be fitted on.
    """

    def __init__(self, job: Job, out: Path, scratch: Path, tasks: Sequence[ComparedTask]) -> None:
        self._job, self._out, self._scratch, self._tasks = job, out.absolute(), scratch, tasks
        self._quiet = job.options.model_copy(update={"quiet": True, "write_model_card": False, "copy_tokenizer": True})

    def fingerprint(self, method: Method) -> dict[str, str] | str:
        """What a merge depends on besides the models, by label; or why it is left out.

        Raises:
            SltaError: it cannot be merged, and the user asked for it.
        """
        content = method.config.model_dump(mode="json", exclude={"models"} if method.is_ours else set())
        record = {"config": json.dumps(content, sort_keys=True)}
        if not method.is_ours:
            return record
        named = self._named(method)
        if named is not None:
            record["alphas"] = hash_text(named.read_text(encoding="utf-8", errors="replace"))
        places = [named or self._alphas(method)]
        try:
            job = self._prepare(method, need_rows=named is None)
            check_disk_space(job, self._out, places)
            if named is not None:
                self._check_unseen(Alphas.load(named))
        except SltaError as error:
            if method.is_asked or isinstance(error, OutputError):
                raise
            return error.message
        return {**job.identity, **record}

    def check_targets(self, methods: Sequence[Method]) -> None:
        """Check that the files beside the comparison may be written.

        Raises:
            OutputError, AlphasError: another file, or alphas of other models, are in the way.
        """
        for method in methods:
            check_overwrite(
                self._recipe(method),
                "recipe of `mergekit-slta compare`",
                _is_ours,
                remedy="name another folder with -o",
            )
            if method.is_ours and self._named(method) is None:
                read = read_recipe(method.config)
                check_alphas_target(self._alphas(method))
                models = [read.label(model) for model in read.models[1:]]
                check_same_models(self._alphas(method), read.label(read.base), models)

    def merge(self, method: Method, folder: Path, clock: Clock) -> tuple[tuple[int, ...], ...]:
        """Merge into a new folder; mergekit's cache has to hold the job's loaders.

        Returns:
            Numbers of the rows that were fitted, for each task; empty if none were.

        Raises:
            SltaError: the calibration or the merge failed, or the weights were fitted on compared rows.
        """
        import mergekit.merge

        fitted: tuple[tuple[int, ...], ...] = ()
        config = method.config.model_copy(deep=True)
        if method.is_ours:
            register()
            wrap_run_merge(mergekit.merge)
            path = self._named(method)
            if path is None:
                path = self._alphas(method)
                with clock.phase("calibrate"):
                    job = self._prepare(method)
                    if not path.exists():
                        _say_time(job)
                    calibrate_to(job, path)
            fitted = self._check_unseen(Alphas.load(path))
            config.parameters = {**(config.parameters or {}), "alphas": str(path)}
        quiet = quiet_log(_PACKAGE), without_dtype_warning()
        with clock.phase("merge"), torch.random.fork_rng(devices=[]), quiet[0], quiet[1]:
            if method.is_ours:
                mergekit.merge.run_merge(config, str(folder), self._quiet)
            else:
                self._merge_stock(config, folder)
        return fitted

    def _merge_stock(self, config: MergeConfiguration, folder: Path) -> None:
        """Run one of mergekit's methods with the job's loaders and with its definition of the model."""
        import mergekit.merge

        key = f"compare#{next(_NUMBERS)}"
        config.parameters = {**(config.parameters or {}), "alphas": key}  # finds the definition; read by no method
        seed = self._quiet.random_seed
        options = self._quiet.model_copy(
            update={"random_seed": self._job.recipe.settings.seed % 2**32 if seed is None else seed}
        )
        try:
            with defined(key, self._job.plan.definition):
                mergekit.merge.run_merge(config, str(folder), options)
            finish_output(self._job, folder)
        except click.ClickException:
            raise
        except Exception as error:
            raise RunError(
                f"the merge failed ({type(error).__name__}): {show(error)}; -v shows where", code="merge-failed"
            ) from error

    def write_recipes(self, methods: Sequence[Method]) -> None:
        """Write the recipe of each merge. Those of this package name the file of the weights, and no rows.

        They name the models as the user's recipe does, because the weights are for models of these names. So they are
        for the folder in which that recipe works.

        Raises:
            OutputError: a file cannot be written.
        """
        for method in methods:
            content = method.config.model_dump(mode="json", exclude_none=True)
            if method.is_ours:
                path = self._named(method) or self._alphas(method)
                stated = {key: value for key, value in content["parameters"].items() if key not in TASK_KEYS}
                content["parameters"] = {**stated, "alphas": str(path)}
                for entry in content["models"]:
                    own = entry.pop("parameters", {})
                    if own.get("role"):
                        entry["parameters"] = {"role": own["role"]}
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
            write_text_atomically(self._recipe(method), f"{_MARK}: {show(method.label)}.\n{text}")

    def _prepare(self, method: Method, *, need_rows: bool = True) -> Job:
        """The job of one of our merges. What it warns of has been said of the comparison's own job."""
        place = self._named(method) or self._alphas(method)
        with quiet_log(_PACKAGE):
            return prepare(
                read_recipe(method.config), self._job.options, need_rows=need_rows, for_merge=False,
                day=self._job.day or recorded_day([place]),
            )  # fmt: skip

    def _check_unseen(self, alphas: Alphas) -> tuple[tuple[int, ...], ...]:
        """Numbers of the rows that weights were fitted on, for each task.

        Raises:
            RecipeError: compared rows are among them.
        """
        tasks: list[dict[str, Any]] = alphas.calibration.get("tasks", [])
        fitted = []
        for task, compared in zip(tasks, self._tasks, strict=False):
            own = tuple(task.get("rows") or ())
            seen = sorted({*own} & {*compared.rows}) if task.get("dataset") == compared.dataset else []
            if seen:
                raise RecipeError(
                    f"`alphas` names weights that were fitted on compared rows of {show(compared.dataset)} "
                    f"({listing(seen, 5)}): drop `alphas`, and they are calibrated without these rows",
                    code="conflicting-keys",
                )
            fitted.append(own)
        return tuple(fitted)

    def _named(self, method: Method) -> Path | None:
        """The alphas file that the user's recipe names."""
        named = (method.config.parameters or {}).get("alphas")
        return output_path(str(named), ALPHAS_NAME).absolute() if named else None

    def _alphas(self, method: Method) -> Path:
        return self._out / ALPHAS_FOLDER / f"{as_file_name(method.name)}.json"

    def _recipe(self, method: Method) -> Path:
        return recipe_path(self._out, method.name)


def _say_time(job: Job) -> None:
    """Say how long a calibration will take, unless quiet: a trial on the device takes about a second."""
    seconds = None if job.options.quiet else forecast(job, estimate(job).phases)
    own = job.recipe.settings.own
    steps = f" for all {own.max_steps} steps, often fewer" if getattr(own, "steps", None) == "auto" else ""
    if seconds is not None:
        job.say(f"takes about {describe_phases(seconds)}{steps}")


def _is_ours(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(_MARK)) == _MARK.encode()
