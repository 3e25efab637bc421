"""One version of the package, or one of its settings: its weights on every draw, the merges, and their scores.

Every draw has a folder of its own, so that a stopped comparison goes on where it was.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from experts import Sizes
from methods import calibration_recipe
from scoring import Scores, score_test_rows
from shared import load_model, read_json, write_json
from torch import Tensor

from mergekit_slta.files.alphas_file import Direction

ALPHAS, RECIPE, TIMES = "slta_alphas.json", "recipe.yml", "times.json"
USUAL = {"objective": "joint", "num_samples": Sizes().calibration_rows}
"""Keys of a recipe unless told."""
SOURCE = """
import hashlib, pathlib, mergekit_slta
folder = pathlib.Path(mergekit_slta.__file__).parent
digest = hashlib.sha256()
for path in sorted(folder.rglob("*.py")):
    digest.update(path.read_bytes())
print(digest.hexdigest()[:12])
"""
"""Run by a version's Python: which source it has."""


@dataclass(frozen=True)
class Variant:
    """A command line that starts Python, and keys of the recipe.

    Attributes:
        name: of its folder and in tables.
        command: words of the command line; `-m mergekit_slta` follows.
        keys: keys of the recipe, beside `seed`.
    """

    name: str
    command: tuple[str, ...]
    keys: dict[str, Any] = field(hash=False)

    @classmethod
    def of(cls, name: str, command: str, pairs: Sequence[str]) -> Variant:
        """From the command line's strings; KEY=VALUE, the value read as YAML, belongs to the name.

        Raises:
            click.BadParameter: a pair is not one.
        """
        if wrong := [pair for pair in pairs if "=" not in pair]:
            raise click.BadParameter(f"{wrong[0]!r} is not KEY=VALUE")
        keys = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs)}
        return cls("-".join([name, *pairs]).replace("/", "_"), tuple(shlex.split(command)), {**USUAL, **keys})

    def recipe(self, tasks: Sequence[str], seed: int) -> dict[str, Any]:
        """The recipe of a draw; its paths start at the work folder."""
        keys = {key: value for key, value in self.keys.items() if key != "num_samples"}
        return calibration_recipe(tasks, seed, self.keys["num_samples"], **keys)


def calibrate(workdir: Path, folder: Path, one: Variant, tasks: Sequence[str], seed: int) -> dict[str, Any]:
    """Compute the weights of a draw, unless they are there; return what it took.

    Returns:
        The variant's command and source, wall and CPU `seconds`, peak memory, whether an earlier try had been stopped
        (the seconds are those of the last), and what `check` says.

    Raises:
        click.ClickException: the folder is that of another recipe, or the command fails.
    """
    recipe = yaml.safe_dump(one.recipe(tasks, seed), sort_keys=False)
    path = folder / RECIPE
    if path.exists() and path.read_text(encoding="utf-8") != recipe:
        raise click.ClickException(f"{path} is of another recipe: choose another name for {one.name}")
    if (folder / ALPHAS).exists() and (folder / TIMES).exists():
        return read_json(folder / TIMES)
    stopped = path.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(recipe, encoding="utf-8")
    source = subprocess.run([*one.command, "-c", SOURCE], cwd=workdir, capture_output=True, text=True, check=True)
    checked = subprocess.run(
        [*one.command, "-m", "mergekit_slta", "check", str(path)], cwd=workdir, capture_output=True, text=True
    )
    click.echo(f"{one.name}, {seed}: calibrating")
    started = time.monotonic()
    job = subprocess.Popen(
        [*one.command, "-m", "mergekit_slta", "calibrate", str(path), "-o", str(folder / ALPHAS)], cwd=workdir
    )
    _, status, usage = os.wait4(job.pid, 0)
    job.returncode = os.waitstatus_to_exitcode(status)
    if job.returncode:
        raise click.ClickException(f"{one.name}, {seed}: calibrate ended with {job.returncode}")
    times = {
        "command": shlex.join(one.command),
        "source": source.stdout.strip(),
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_kilobytes": usage.ru_maxrss,
        "stopped_before": stopped,
        "check": (checked.stdout + checked.stderr).splitlines(),
    }
    write_json(folder / TIMES, times)
    return times


def models_of(
    alphas: Mapping[str, Any], base: Mapping[str, Tensor], load: Callable[[str], Mapping[str, Tensor]]
) -> dict[str, Mapping[str, Tensor]]:
    """The tensors of every model that has weights in an alphas file, by its name there.

    Args:
        alphas: the content of the file.
        base: the base's tensors.
        load: name of a checkpoint -> its tensors.
    """
    directions = {part["model"]: Direction.model_validate(part) for part in alphas.get("directions", ())}
    forms = {name: direction for name, direction in directions.items() if direction.closed_form}
    models = {name: load(name) for name in alphas["models"] if name not in forms}
    experts = [tensors for name, tensors in models.items() if name not in directions]
    for name, form in forms.items():
        models[name] = {key: form.combine(key, value, [each[key] for each in experts]) for key, value in base.items()}
    return models


@torch.inference_mode()
def merged(workdir: Path, alphas: dict[str, Any]) -> torch.nn.Module:
    """The base plus the weighted task vectors, in float32, without a file of it.

    Raises:
        click.ClickException: the weights are those of parts of a tensor, or of no tensor of the model.
    """
    model = load_model(workdir / "base").eval()
    parameters = dict(model.named_parameters())
    weights: dict[str, list[float]] = {}
    for submodule in alphas["submodules"]:
        if submodule.get("slices"):
            raise click.ClickException(f"{submodule['name']} has weights for parts of tensors, which is not done here")
        weights |= dict.fromkeys(submodule["tensors"], submodule["alpha"])
    if unknown := sorted(weights.keys() - parameters.keys()):
        raise click.ClickException(f"{unknown[0]} is no parameter of {workdir / 'base'}")
    if missing := sorted(parameters.keys() - weights.keys()):
        raise click.ClickException(f"{missing[0]} has no weight")
    base = {name: value.clone() for name, value in parameters.items()}
    changes = models_of(alphas, base, lambda name: dict(load_model(workdir / name).named_parameters()))
    for number, model_name in enumerate(alphas["models"]):
        for name, value in changes[model_name].items():
            parameters[name].add_((value - base[name]).mul_(weights[name][number]))
    return model


def scores_of(workdir: Path, folder: Path, tasks: Sequence[str], precision: str) -> Scores:
    """Scores of a draw's merge on the test rows, unless they are there."""
    path = folder / f"scores_{precision}.json"
    if not path.exists():
        click.echo(f"scoring {folder.relative_to(workdir)}")
        write_json(path, score_test_rows(workdir, merged(workdir, read_json(folder / ALPHAS)), tasks, precision))
    return read_json(path)


def references(workdir: Path, folder: Path, tasks: Sequence[str], precision: str) -> tuple[Scores, Scores]:
    """Scores of the base, and of each task's own expert, on the test rows."""
    found: list[Scores] = []
    for name in ("base", "experts"):
        path = folder / f"{name}_{precision}.json"
        if not path.exists():
            click.echo(f"scoring {name}")
            scores: Scores = {}
            for task in tasks:
                model = load_model(workdir / ("base" if name == "base" else task)).eval()
                scores |= score_test_rows(workdir, model, [task], precision)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, scores)
        found.append(read_json(path))
    return found[0], found[1]
