"""The evidence run: train five experts, merge them in every way, score all merges, and write the tables.

One command, which goes on where it was stopped: every expert, calibration and score is a file of its own.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from experts import QUICK, Sizes, prepare
from five_tasks import TASKS
from merging import calibrate, evaluate_references, read_results, run_candidates
from methods import ALL, GRANULARITIES, OURS, SETS, TRIPLE, Candidate, baselines, calibration_recipe, with_alphas
from shared import write_json

from mergekit_slta import Alphas
from mergekit_slta.gram import Statistics
from mergekit_slta.resolve import solve_again

ROWS_STUDIED = ("layer", "attn_mlp")
"""Granularities whose number of rows is varied, as in the paper's Table 11."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Where, how much, and with what."""

    workdir: Path
    sizes: Sizes
    processes: int
    threads: int
    precision: str
    device: str

    def scoring(self, **changes: Any) -> dict[str, Any]:
        """Arguments of `merging.evaluate`."""
        known = {"calibration": None, "splits": ("test",), "precision": self.precision, "device": self.device}
        return {**known, **changes}

    def score(self, candidates: list[Candidate], **changes: Any) -> None:
        """Merge and score candidates."""
        run_candidates(self.workdir, candidates, self.processes, self.threads, self.scoring(**changes))


def solved(
    run: Run, statistics: Path, granularity: str, seed: int, **changes: Any
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Weights of every set of experts from the statistics of all: no model is touched.

    Yields:
        (tasks, path of the alphas file).
    """
    whole = Statistics.load(statistics)
    for tasks in SETS:
        label = ",".join([f"{key}={value}" for key, value in changes.items()]) or "as-calibrated"
        name = f"{granularity}-{seed}-{'+'.join(tasks)}-{label}.json"
        path = run.workdir / "alphas" / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            without = [task for task in ALL if task not in tasks]
            solve_again(whole, without=without, **changes).save(path)
        yield tasks, f"alphas/{name}"


def our_candidates(run: Run, granularity: str, seed: int) -> Iterator[Candidate]:
    """All merges that come from one calibration of all five experts."""
    counts = run.sizes.row_counts if granularity in ROWS_STUDIED else (run.sizes.calibration_rows,)
    most = max(*counts, run.sizes.calibration_rows)
    recipe = calibration_recipe(ALL, seed, most, granularity=granularity)
    statistics = calibrate(run.workdir, f"{granularity}-{seed}", recipe, run.device, click.echo)
    ways: list[dict[str, Any]] = [{}, {"balance": False}] if granularity in ROWS_STUDIED else [{}]
    for way in ways:
        for tasks, alphas in solved(run, statistics, granularity, seed, rows=run.sizes.calibration_rows, **way):
            if not way or tasks in (ALL, TRIPLE):
                shown = {"granularity": granularity, **way}
                yield Candidate(tasks, OURS, shown, with_alphas(tasks, alphas), seed)
    for count in counts:
        if count != run.sizes.calibration_rows:
            for tasks, alphas in solved(run, statistics, granularity, seed, rows=count):
                if tasks in (ALL, TRIPLE):
                    shown = {"granularity": granularity, "rows": count}
                    yield Candidate(tasks, OURS, shown, with_alphas(tasks, alphas), seed)


def merged_inputs(run: Run, seed: int) -> Iterator[Candidate]:
    """`inputs: merged` (A.5.3): the statistics depend on which experts there are."""
    for tasks in (ALL, TRIPLE):
        name = f"merged-inputs-{seed}-{'+'.join(tasks)}"
        recipe = calibration_recipe(tasks, seed, run.sizes.calibration_rows, granularity="attn_mlp", inputs="merged")
        statistics = calibrate(run.workdir, name, recipe, run.device, click.echo)
        path = run.workdir / "alphas" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            Alphas.load(statistics.with_name("slta_alphas.json")).save(path)
        # Such weights are bound to the setting, which the recipe must state.
        merge = with_alphas(tasks, f"alphas/{path.name}")
        merge["parameters"] |= {"granularity": "attn_mlp", "inputs": "merged"}
        yield Candidate(tasks, OURS, {"granularity": "attn_mlp", "inputs": "merged"}, merge, seed)


def run_all(run: Run) -> None:
    """Every experiment, the most telling ones first."""
    first = run.sizes.seeds[0]
    evaluate_references(run.workdir, ALL, run.scoring(calibration=(first, run.sizes.calibration_rows)))
    tuned = {"calibration": (first, run.sizes.calibration_rows)}
    for seed in run.sizes.seeds:
        run.score([*our_candidates(run, "attn_mlp", seed)])
    for tasks in SETS:
        run.score([*baselines(tasks, everything=tasks in (ALL, TRIPLE))], **tuned)
    for seed in run.sizes.seeds:
        run.score([*our_candidates(run, "layer", seed)])
    for granularity in [name for name in GRANULARITIES if name not in ROWS_STUDIED]:
        for seed in run.sizes.seeds:
            run.score([*our_candidates(run, granularity, seed)])
    for seed in run.sizes.seeds:
        run.score([*merged_inputs(run, seed)])


@click.command()
@click.argument("workdir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--quick", is_flag=True, help="Everything once and tiny: shows that it runs, not what is better.")
@click.option("--base", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Another base checkpoint.")
@click.option("--processes", type=click.IntRange(min=1), default=2, show_default=True, help="Merges at a time.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of each merge  [default: cores / processes].")
@click.option("--precision", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True,
              help="Of matrix products in training and scoring.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help="torch device.")
def main(
    workdir: Path, quick: bool, base: Path | None, processes: int, threads: int | None, precision: str, device: str
) -> None:
    """Do the whole evidence run in WORKDIR, and print where its tables are."""
    workdir = workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    sizes = QUICK if quick else Sizes()
    threads = threads or max(1, (os.cpu_count() or 1) // processes)
    run = Run(workdir, sizes, processes, threads, precision, device)
    prepare(workdir, sizes, base, precision, device)
    run_all(run)
    settings = {"sizes": dataclasses.asdict(sizes), "precision": precision, "tasks": list(TASKS)}
    write_json(workdir / "results.json", {"settings": settings, "results": read_results(workdir)})
    from tables import write_tables

    write_tables(workdir / "results.json", workdir / "RESULTS.md")
    click.echo(f"Written: {workdir / 'RESULTS.md'}")


if __name__ == "__main__":
    main()
