"""The main comparison again with other experts: does its order hold?

`python examples/reproduce/repeat.py WORK/results.json AGAIN` splits the rows anew, trains five experts anew, and merges
them by every other method of the first run, at the settings that were best there on the test rows, and by ours, as a
recipe gets it that names an objective and nothing else. AGAIN/RESULTS.md is the first run's with the two side by side.
Like the run itself it goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import click
from evidence_run import load, read_json
from experts import Sizes, prepare
from gaps import Evidence
from grids import untuned
from merging import evaluate_references
from methods import ALL, CALIBRATED, CLOSED_FORMS, Candidate, Settings
from run import Run, calibrated_for, write_scores
from tables import write_tables

REPEATED: tuple[Settings, ...] = (
    {"granularity": "attn_mlp"},
    {"objective": "joint"},
)
"""Of ours: what a recipe gets that names an objective and nothing else."""


def others(evidence: Evidence) -> Iterator[Candidate]:
    """The other methods: those with a grid at its best on the test rows, and as recommended without tuning; those that
    have rows on the rows of a usual calibration."""
    yield from untuned(ALL, evidence.grids())
    for method in (*evidence.grids(), *CLOSED_FORMS, *CALIBRATED):
        found = [result for result in evidence.group(ALL, method, {}) if result.get("seed") is not None][:1]
        best = found[0] if found else evidence.tuned(ALL, method, "test")
        if best is not None:
            yield Candidate(ALL, method, best["settings"], best["recipe"], best["seed"])


def repeat(run: Run, first: Evidence) -> None:
    """Score everything, the quickest first."""
    evaluate_references(run.workdir, ALL, run.scoring())
    run.score([*others(first)])
    for settings in REPEATED:
        run.score([*calibrated_for(run, run.sizes.seeds[0], (ALL,), **settings)])


@click.command()
@click.argument("first", type=click.Path(exists=True, dir_okay=False, resolve_path=True, path_type=Path))
@click.argument("workdir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seed", type=int, default=1, show_default=True, help="Of the rows' split and of training.")
@click.option("--base", type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
              help="The base checkpoint of FIRST, where it was not the default one.")  # fmt: skip
@click.option("--processes", type=click.IntRange(min=1), default=2, show_default=True, help="Merges at a time.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of each merge  [default: cores / processes].")
@click.option("--device", default="cpu", show_default=True, help="torch device.")
def main(
    first: Path, workdir: Path, seed: int, base: Path | None, processes: int, threads: int | None, device: str
) -> None:
    """Repeat the comparison of FIRST, a run's results.json, in WORKDIR with other experts."""
    workdir = workdir.resolve()
    if first.parent == workdir:
        raise click.ClickException(f"{workdir} is the first run's own folder: choose another one")
    settings = read_json(first)["settings"]
    known = {key: tuple(value) if isinstance(value, list) else value for key, value in settings["sizes"].items()}
    sizes = dataclasses.replace(Sizes(**known), seed=seed)
    workdir.mkdir(parents=True, exist_ok=True)
    os.chdir(workdir)
    threads = threads or max(1, (os.cpu_count() or 1) // processes)
    run = Run(workdir, sizes, processes, threads, settings["precision"], device)
    prepare(workdir, sizes, base, run.precision, device)
    try:
        repeat(run, load(first).evidence)
    finally:
        write_tables(first, workdir / "RESULTS.md", repeated=write_scores(run))
        click.echo(f"Written: {workdir / 'RESULTS.md'}")


if __name__ == "__main__":
    main()
