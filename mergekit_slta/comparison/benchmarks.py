"""lm-evaluation-harness: the command lines that run its tasks on every compared model, and running them.

Scope: `--lm-eval`. A merge is run while it is in the scratch folder. Nothing is imported from the harness.
"""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mergekit.options import MergeOptions

from mergekit_slta.errors import RecipeError, RunError, show
from mergekit_slta.files.names import BENCHMARKS_FOLDER, RECIPES_FOLDER
from mergekit_slta.job.job import Job


class Benchmarks:
    """Runs tasks of the harness, if there are any and it is installed.

    Args:
        tasks: names of its tasks, joined by commas; None for none.
        out: folder of the comparison.
        options: mergekit's options; the device and `trust_remote_code` are passed on.

    Raises:
        RecipeError: `tasks` names none, or begins with a dash.
    """

    def __init__(self, tasks: str | None, out: Path, options: MergeOptions) -> None:
        self._tasks = None if tasks is None else ",".join(filter(None, map(str.strip, tasks.split(","))))
        if self._tasks is not None and (not self._tasks or self._tasks.startswith("-")):
            raise RecipeError(
                f"--lm-eval is {show(tasks)!r}: it must be a list of tasks, such as gsm8k,ifeval", code="invalid-value"
            )
        self._out, self._options = out, options

    @property
    def is_running(self) -> bool:
        """Whether tasks are run, not only printed."""
        return self._tasks is not None and importlib.util.find_spec("lm_eval") is not None

    def misses(self, name: str) -> bool:
        """Whether a model has to be run that has no results yet."""
        return self.is_running and not self._results(name).is_dir()

    def run_references(self, job: Job) -> None:
        """Run the base and the experts.

        Raises:
            RunError: see `run`.
        """
        for name, arguments in self._references(job):
            if self.misses(name):
                self._run(name, arguments)

    def run(self, name: str, folder: Path) -> None:
        """Run a merged model, if it is missing.

        Raises:
            RunError: the harness has failed.
        """
        if self.misses(name):
            self._run(name, f"pretrained={folder.absolute()}")

    def lines(self, job: Job, methods: Sequence[str]) -> list[str]:
        """Command lines that run every model; a merge is made first, since its folder has been removed."""
        if self._tasks is None:
            return []
        found = [shlex.join(self._command("lm_eval", name, arguments)) for name, arguments in self._references(job)]
        for name in methods:
            file = name.replace(":", "_")
            merge = ["mergekit-yaml", str(self._out / RECIPES_FOLDER / f"{file}.yml"), f"merged/{file}"]
            found.append(
                f"{shlex.join(merge)} && {shlex.join(self._command('lm_eval', name, f'pretrained=merged/{file}'))}"
            )
        return found

    def _references(self, job: Job) -> list[tuple[str, str]]:
        """(name, model arguments) of the base and the experts."""
        recipe = job.recipe
        found = [("base", _model_arguments(recipe.base))]
        return found + [
            (f"expert_{number}", _model_arguments(task.model)) for number, task in enumerate(recipe.tasks, start=1)
        ]

    def _command(self, program: str, name: str, arguments: str) -> list[str]:
        options = self._options
        trusted = ",trust_remote_code=True" if options.trust_remote_code else ""
        device = ["--device", options.device] if options.device and options.device != "auto" else []
        return [
            *shlex.split(program), "--model", "hf", "--model_args", f"{arguments},dtype=auto{trusted}",
            "--tasks", self._tasks or "", "--batch_size", "auto", *device, "--output_path", str(self._results(name)),
        ]  # fmt: skip

    def _run(self, name: str, arguments: str) -> None:
        command = [sys.executable, "-m", *self._command("lm_eval", name, arguments)]
        result = subprocess.run(command)
        if result.returncode:
            raise RunError(
                f"lm_eval ended with exit code {result.returncode} ({show(shlex.join(command), 600)}): read what it "
                "printed, then run the same command again",
                code="benchmark-failed",
            )
        self._results(name).mkdir(parents=True, exist_ok=True)

    def _results(self, name: str) -> Path:
        return self._out / BENCHMARKS_FOLDER / name.replace(":", "_")


def _model_arguments(model: object) -> str:
    base, _, adapter = str(model).partition("+")
    path, _, revision = base.partition("@")
    parts = [f"pretrained={path}", *([f"revision={revision}"] if revision else [])]
    return ",".join([*parts, *([f"peft={adapter}"] if adapter else [])])
