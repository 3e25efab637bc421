"""Merge the experts of both ways of fine-tuning, measure how linear they are, and set the results side by side.

Finished steps are skipped when the script is run again: to repeat one, delete what it wrote.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
from ways import LEARNING_RATES_NAME, TRAINING_NAME, WAYS, align, evaluate, expert_name, read_json, write_json

# isort: split
from common import (
    TASKS,
    Losses,
    installed_command,
    recovered_shares,
    set_threads,
)  # of the SmolLM2 example, by way of `ways`

WEIGHTS = (0.3, 0.4, 0.5, 1.0)
"""Weights of stock task arithmetic, the same for both task vectors."""
LEVELS = {
    "model": "whole model",
    "layer": "layers",
    "attention": "attention",
    "mlp": "MLP",
    "head": "output head",
    "embed": "embeddings",
}
MEASURES = {
    "non-linearity": ("non_linearity",),
    "projection distance": ("projection_distance", "pairs"),
    "cosine": ("cosine", "pairs"),
    "cosine of the experts": ("cosine_base",),
    "disentanglement": ("disentanglement",),
    "disagreement": ("disagreement",),
}
"""Rows of the table, and where their mean and standard deviation are in a level of the linearity file."""
ABSENT = "–"

TASK_ARITHMETIC = """\
merge_method: task_arithmetic
base_model: ./base
models:
  - model: ./{way}_math
    parameters: {{weight: {weight}}}
  - model: ./{way}_translate
    parameters: {{weight: {weight}}}
parameters: {{normalize: false}}
dtype: float32
"""
# Written in float32: many changes are one unit in the last place of bfloat16, which a weight of 0.3 would round away.


def call(command: list[str], workdir: Path, threads: int | None) -> None:
    """Run a command in the work directory, or fail in one line."""
    click.echo(f"$ {' '.join([Path(command[0]).name, *command[1:]])}")
    limit = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    code = subprocess.run(command, cwd=workdir, env={**os.environ, **limit}).returncode
    if code:
        raise click.ClickException(f"{Path(command[0]).name} ended with exit code {code}: see its output above")


def once(path: Path, job: Callable[[], None]) -> None:
    """Do a job unless what it makes is there."""
    if path.exists():
        click.echo(f"{path.name}: already there, skipped")
    else:
        job()


def merge(workdir: Path, recipe: str, name: str, threads: int | None) -> None:
    """Merge a recipe of the work directory into WORKDIR/``name``, which is there only when it is complete."""
    temporary = workdir / f"{name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    call([installed_command("mergekit-yaml"), recipe, temporary.name, "--quiet"], workdir, threads)
    os.replace(temporary, workdir / name)


def measure_linearity(workdir: Path, recipe: str, name: str, rows: int, threads: int | None) -> None:
    """Let `mergekit-slta linearity` measure the experts of a recipe."""
    command = [installed_command("mergekit-slta"), "linearity"]
    if subprocess.run([*command, "--help"], capture_output=True).returncode:
        raise click.ClickException("this mergekit-slta has no command `linearity`: install a version that has it")
    call([*command, recipe, "-o", name, "--rows", str(rows)], workdir, threads)


def run_steps(workdir: Path, rows: int, threads: int | None) -> dict[str, dict[str, str]]:
    """Do what is not done yet; return, per way, directory names by what the table calls the models."""
    models: dict[str, dict[str, str]] = {}
    for way in WAYS:
        recipe, merged = f"recipe_{way}.yml", f"merged_{way}"
        once(workdir / merged, partial(merge, workdir, recipe, merged, threads))
        models[way] = {"base": "base", **{task: expert_name(way, task) for task in TASKS}, "submodule_linear": merged}
        for weight in WEIGHTS:
            name = f"task_arithmetic_{way}_{weight}"
            (workdir / f"{name}.yml").write_text(TASK_ARITHMETIC.format(way=way, weight=weight), encoding="utf-8")
            once(workdir / name, partial(merge, workdir, f"{name}.yml", name, threads))
            models[way][f"task_arithmetic {weight}"] = name
    # Last, so that everything else is there where this command is not.
    evaluate(workdir, [name for names in models.values() for name in names.values()], click.echo)
    for way in WAYS:
        name = f"linearity_{way}.json"
        once(workdir / name, partial(measure_linearity, workdir, f"recipe_{way}.yml", name, rows, threads))
    return models


def collect(workdir: Path, models: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Return everything that was measured, by way of fine-tuning."""
    rates = read_json(workdir / LEARNING_RATES_NAME)
    results: dict[str, Any] = {}
    for way, names in models.items():
        by_name = evaluate(workdir, names.values(), click.echo)
        losses = {shown: by_name[name] for shown, name in names.items()}
        linearity = read_json(workdir / f"linearity_{way}.json")
        if not any(value for level in LEVELS for value in level_values(linearity, level).values()):
            raise click.ClickException(f"linearity_{way}.json has none of the known measures: delete it, and run again")
        results[way] = {
            "trained": WAYS[way],
            "learning_rate": rates.get(way),
            "training": {task: read_json(workdir / names[task] / TRAINING_NAME) for task in TASKS},
            "held_out_completion_loss": losses,
            "gap_recovered": recovered_shares(losses),
            "linearity": linearity["levels"],
        }
    return results


def level_values(linearity: dict[str, Any], level: str) -> dict[str, dict[str, float] | None]:
    """Return mean and standard deviation of every measure on one level of a linearity file, None where it has none."""
    values: dict[str, dict[str, float] | None] = {}
    for shown, path in MEASURES.items():
        found: Any = (linearity.get("levels") or {}).get(level)
        for key in path:
            found = (found or {}).get(key)
        values[shown] = found if found and found.get("mean") is not None else None
    return values


def loss_cells(losses: Losses, shares: Losses | None) -> str:
    """Render the losses on all tasks in one cell, with the recovered shares where there are any."""
    text = " / ".join(f"{losses[task]:.3f}" for task in TASKS)
    return text + (f" ({' / '.join(f'{shares[task]:.0%}' for task in TASKS if task in shares)})" if shares else "")


def number_cell(value: dict[str, float] | None) -> str:
    """Render mean and standard deviation."""
    if value is None:
        return ABSENT
    spread = value.get("std")
    return f"{value['mean']:.3g}" + (f" ± {spread:.2g}" if spread is not None else "")


def make_table(results: dict[str, Any]) -> list[list[str]]:
    """Return the table: a heading, then a row per model and per measure, with a column per way of fine-tuning."""
    table = [["", *(results[way]["trained"] for way in WAYS)]]
    steps = [results[way]["training"][TASKS[0]] for way in WAYS]
    table.append(["learning rate", *(f"{training['learning_rate']:g}" for training in steps)])
    table.append(["million trained parameters", *(f"{training['trained_parameters'] / 1e6:.1f}" for training in steps)])
    for name in results["all"]["held_out_completion_loss"]:
        cells = [
            loss_cells(results[way]["held_out_completion_loss"][name], results[way]["gap_recovered"].get(name))
            for way in WAYS
        ]
        table.append([f"loss {' / '.join(TASKS)}: {name}{' expert' if name in TASKS else ''}", *cells])
    for level, level_shown in LEVELS.items():
        values = [level_values({"levels": results[way]["linearity"]}, level) for way in WAYS]
        for measure in MEASURES:
            if any(value[measure] for value in values):
                table.append([f"{level_shown}: {measure}", *(number_cell(value[measure]) for value in values)])
    return table


def markdown(table: list[list[str]]) -> str:
    """Render a table, whose first row is its heading, in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "|---" + "|---:" * (len(table[0]) - 1) + "|")
    return "\n".join(lines)


@click.command()
@click.argument("workdir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--rows", type=click.IntRange(min=1), default=10, show_default=True, help="Rows per task for the linearity."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads  [default: torch's choice]")
def main(workdir: Path, rows: int, threads: int | None) -> None:
    """Merge and measure what prepare.py left in WORKDIR; print one table, write results.json and results.md there."""
    set_threads(threads)
    needed = ["base", "data", *(expert_name(way, task) for way in WAYS for task in TASKS)]
    missing = [name for name in [*needed, *(f"recipe_{way}.yml" for way in WAYS)] if not (workdir / name).exists()]
    if missing:
        raise click.ClickException(f"{workdir} has no {missing[0]}: run prepare.py {workdir} first")
    results = collect(workdir, run_steps(workdir, rows, threads))
    write_json(workdir / "results.json", results)
    table = make_table(results)
    (workdir / "results.md").write_text(markdown(table) + "\n", encoding="utf-8")
    click.echo(f"\n{align(table)}\n\nThe same as Markdown:\n\n{markdown(table)}")
    click.echo(f"\nWritten: {workdir / 'results.json'}, {workdir / 'results.md'}")


if __name__ == "__main__":
    main()
