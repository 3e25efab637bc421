"""The evidence run: train five experts, merge them in every way, score all merges, and write the tables.

One command, which goes on where it was stopped: every expert, calibration and score is a file of its own.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from expert_merging import PASSES
from experts import QUICK, Sizes, prepare
from five_tasks import TASKS
from gaps import Evidence
from grids import GRIDS, baselines, extensions, nearest, planned, untuned
from merging import PEERS, add_answers, calibrate, evaluate_references, read_results, run_candidates
from methods import (
    ALL,
    CALIBRATED,
    CLOSED_FORMS,
    JOINT_STEPS,
    OURS,
    SETS,
    TRIPLE,
    Candidate,
    calibration_recipe,
    closed_forms,
    set_name,
    with_alphas,
)
from shared import write_json
from tables import write_tables

from mergekit_slta import Alphas, Statistics
from mergekit_slta.calibration.resolve import solve_again

ROWS_STUDIED = ("layer", "attn_mlp")
"""Granularities whose number of rows is varied, as in the paper's Table 11; the last also beyond the usual number."""
PEER_ROWS = 5
"""Rows of each task of Expert Merging, as in its paper."""
JOINT_PASSES = 1950
"""Of each task's rows by the joint objective with five experts, in forward passes; a backward pass counts as two."""
METHODS = (OURS, *GRIDS, *CLOSED_FORMS, *CALIBRATED)
FEW_ROWS = 5
"""Rows of each task at each step of the joint objective, to see what is left of it: 30 in all."""
BOTH_BALANCES = ("layer", "attn_mlp")
"""Granularities that are also solved without balancing."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Where, how much, and with what; `only`: methods that are run, all without."""

    workdir: Path
    sizes: Sizes
    processes: int
    threads: int
    precision: str
    device: str
    only: tuple[str, ...] = ()

    def wants(self, method: str) -> bool:
        """Whether a method is run."""
        return not self.only or method in self.only

    def sets(self, sets: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Those sets of experts that are merged."""
        return [tasks for tasks in sets if tasks in SETS[: self.sizes.sets]]

    @property
    def tuned(self) -> dict[str, Any]:
        """Arguments of `score` for what is chosen on the calibration rows of the first draw."""
        return {"calibration": (self.sizes.seeds[0], self.sizes.calibration_rows)}

    def scoring(self, **changes: Any) -> dict[str, Any]:
        """Arguments of `merging.evaluate`."""
        known = {"calibration": None, "splits": ("test",), "precision": self.precision, "device": self.device}
        return {**known, **changes}

    def score(self, candidates: list[Candidate], **changes: Any) -> None:
        """Merge and score candidates of the methods that are run."""
        wanted = [candidate for candidate in candidates if self.wants(candidate.method)]
        run_candidates(self.workdir, wanted, self.processes, self.threads, self.scoring(**changes))


def solved(
    run: Run, statistics: Path, label: str, experts: tuple[str, ...], **changes: Any
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Weights of every set among the calibrated experts, from their statistics: no model is touched.

    Yields:
        (tasks, path of the alphas file).
    """
    whole = Statistics.load(statistics)
    for tasks in [tasks for tasks in SETS[: run.sizes.sets] if set(tasks) <= set(experts)]:
        name = f"{label}-{'+'.join(tasks)}-{','.join(f'{key}={value}' for key, value in changes.items())}.json"
        path = run.workdir / "alphas" / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            without = [task for task in experts if task not in tasks]
            solve_again(whole, without=without, **changes).save(path)
        yield tasks, f"alphas/{name}"


def our_candidates(
    run: Run, granularity: str, seed: int, experts: tuple[str, ...] = ALL, **shared: Any
) -> Iterator[Candidate]:
    """All merges that come from one calibration: its experts, and every smaller set of them.

    Args:
        run, granularity, seed: of the calibration.
        experts: which are calibrated.
        shared: more keys of the recipe.
    """
    studied = granularity in ROWS_STUDIED and not shared
    usual = run.sizes.calibration_rows
    counts = run.sizes.row_counts if studied else (usual,)
    if seed != run.sizes.seeds[0] or granularity != ROWS_STUDIED[-1]:  # more rows than usual are tried once
        counts = tuple(count for count in counts if count <= usual)
    recipe = calibration_recipe(experts, seed, max(usual, *counts), granularity=granularity, **shared)
    name = "-".join([granularity, *map(str, shared.values()), set_name(experts), str(seed)])
    statistics = calibrate(run.workdir, name, recipe, run.device)
    ways: list[dict[str, Any]] = [{}, {"balance": False}] if granularity in BOTH_BALANCES and not shared else [{}]
    for way in ways:
        for tasks, alphas in solved(run, statistics, name, experts, rows=usual, **way):
            if not way or tasks in (ALL, TRIPLE):
                yield Candidate(
                    tasks, OURS, {"granularity": granularity, **shared, **way}, with_alphas(tasks, alphas), seed
                )
    for count in counts:
        if count != usual:
            for tasks, alphas in solved(run, statistics, name, experts, rows=count):
                if tasks == TRIPLE or (tasks == ALL and seed == run.sizes.seeds[0]):
                    shown = {"granularity": granularity, "rows": count}
                    yield Candidate(tasks, OURS, shown, with_alphas(tasks, alphas), seed)


def calibrated_for(run: Run, seed: int, sets: Sequence[tuple[str, ...]], **settings: Any) -> Iterator[Candidate]:
    """Merges with a calibration for each set of experts: what statistics at merged models need (`inputs: merged`,
    A.5.3, and the steps of the joint objective), since these depend on which experts there are."""
    for tasks in run.sets(sets):
        name = "-".join([*map(str, settings.values()), "+".join(tasks), str(seed)])
        shared = {key: value for key, value in settings.items() if key != "num_samples"}
        rows = settings.get("num_samples", run.sizes.calibration_rows)
        recipe = calibration_recipe(tasks, seed, rows, **shared)
        statistics = calibrate(run.workdir, name, recipe, run.device)
        path = run.workdir / "alphas" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            Alphas.load(statistics.with_name("slta_alphas.json")).save(path)
        merge = with_alphas(tasks, f"alphas/{path.name}")
        if "inputs" in settings:  # such weights are bound to the setting, which the recipe must state
            merge["parameters"] |= settings
        yield Candidate(tasks, OURS, settings, merge, seed)


def run_all(run: Run) -> None:
    """Every experiment, the most telling ones first; a quick run ends behind these."""
    first, seeds = run.sizes.seeds[0], run.sizes.seeds
    evaluate_references(run.workdir, ALL, run.scoring(**run.tuned))
    blocks(run, first)
    if run.sizes.grid_step > 1:
        run.score(baselines(ALL)[:: run.sizes.grid_step], **run.tuned)
        return
    grids(run, ALL, planned(ALL))
    for seed in seeds:
        for tasks in run.sets((ALL, TRIPLE) if seed == first else (ALL,)):
            run.score([*closed_forms(tasks, seed, run.sizes.calibration_rows)])
            run.score([*calibrated_peers(run, tasks, seed)])
    rows = JOINT_STEPS * run.sizes.calibration_rows  # as many as ours sees under the joint objective
    for seed in seeds:
        run.score([*closed_forms(ALL, seed, rows, ["RegMean++"], rows_per_task=rows)])
    for seed in seeds[1:2]:
        blocks(run, seed)
    levels(run, first)
    for tasks in run.sets(SETS[1:]):
        grids(run, tasks, planned(tasks))
    for seed in seeds[2:]:
        blocks(run, seed)
    for seed in seeds[1:]:
        levels(run, seed)
    if run.only:
        return
    run.score([*calibrated_for(run, first, (ALL, TRIPLE), granularity="attn_mlp", inputs="merged")])
    for name in ("base", *ALL, *with_answers(run)):
        add_answers(run.workdir, name, run.sizes.generated_tokens, run.precision, run.device)


def grids(run: Run, tasks: tuple[str, ...], methods: Sequence[str]) -> None:
    """Score the grids of methods, those without tuning first. All settings are tried on the calibration rows; on the
    test rows the best of them and those around it. Both go on while the best of a grid is at an edge."""
    methods = [method for method in methods if run.wants(method)]
    run.score(untuned(tasks, methods), **run.tuned)
    run.score(baselines(tasks, methods), splits=(), **run.tuned)
    while more := extensions(Evidence(read_results(run.workdir)), tasks, methods):
        run.score(more, splits=(), **run.tuned)
    run.score(nearest(Evidence(read_results(run.workdir)), tasks, methods), **run.tuned)
    while more := extensions(Evidence(read_results(run.workdir)), tasks, methods, "test"):
        run.score(more, **run.tuned)
    shutil.rmtree(run.workdir / PEERS, ignore_errors=True)


def calibrated_peers(run: Run, tasks: tuple[str, ...], seed: int) -> Iterator[Candidate]:
    """Methods that go on from task arithmetic at its best weight on the calibration rows. Expert Merging on as few rows
    as in its paper, once through; on the rows of the joint objective; with five experts by as many passes, too."""
    if not any(map(run.wants, CALIBRATED)):
        return
    grids(dataclasses.replace(run, only=()), tasks, ["task arithmetic"])
    best = Evidence(read_results(run.workdir)).tuned(tasks, "task arithmetic", "calibration")
    if best is None:  # an expert has learnt nothing
        return
    start = {"start": best["settings"]["weight"]}
    yield from closed_forms(tasks, seed, run.sizes.calibration_rows, ["FeatCal"], start)
    rows = JOINT_STEPS * run.sizes.calibration_rows
    shown: list[tuple[int, int, dict[str, int]]] = [(PEER_ROWS, PEER_ROWS, {}), (rows, rows, {"rows_per_task": rows})]
    if tasks == ALL and seed == run.sizes.seeds[0]:
        shown.append((rows, JOINT_PASSES // PASSES, {"rows_per_task": rows, "passes_per_task": JOINT_PASSES}))
    for count, steps, settings in shown:
        yield from closed_forms(tasks, seed, count, ["Expert Merging"], {**start, "steps": steps}, **settings)


def blocks(run: Run, seed: int) -> None:
    """The joint objective, whose steps every set of experts has to be calibrated for; and attention and MLP blocks of
    every set under the paper's objective, and under the joint one at the experts."""
    if not run.wants(OURS):
        return
    run.score([*calibrated_for(run, seed, (ALL, TRIPLE), objective="joint")])
    run.score([*calibrated_for(run, seed, (ALL, TRIPLE), objective="joint", direction="none")])
    run.score([*calibrated_for(run, seed, (ALL,), objective="joint", num_samples=FEW_ROWS)])
    for granularity, steps, sets in (("attn_mlp", 2, (ALL, TRIPLE)), ("linear", 4, (ALL,))):  # fewer, on the same rows
        own = {"granularity": granularity, "objective": "joint", "steps": steps, "fresh_rows": False}
        run.score([*calibrated_for(run, seed, sets, **own)])
    run.score([*our_candidates(run, "attn_mlp", seed, objective="joint", steps=0)])
    run.score([*our_candidates(run, "attn_mlp", seed)])


def levels(run: Run, seed: int) -> None:
    """The paper's levels, compared on pairs and the triple as there."""
    if not run.wants(OURS) or not run.sets([TRIPLE]):
        return
    for granularity in ("layer", "model", "head_mlp", "linear"):
        run.score([*our_candidates(run, granularity, seed, TRIPLE)])


def with_answers(run: Run) -> list[str]:
    """Merges of all experts whose greedy answers are counted: ours, and task arithmetic tuned on the test rows."""
    results = read_results(run.workdir)
    same = {"granularity": "attn_mlp", "objective": "joint", "steps": 2, "fresh_rows": False}
    mine = [{"granularity": "attn_mlp"}, {"objective": "joint"}, same]
    ours = [
        name
        for name, result in results.items()
        if result.get("tasks") == list(ALL) and result["settings"] in mine and result["seed"] == run.sizes.seeds[0]
    ]
    rivals = [name for name in results if name.startswith("all/task arithmetic/")]
    return [*ours, *sorted(rivals, key=lambda name: sum(part["loss"] for part in results[name]["test"].values()))[:1]]


@click.command()
@click.argument("workdir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--quick", is_flag=True, help="Everything once and tiny: shows that it runs, not what is better.")
@click.option("--base", type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
              help="Another base checkpoint, with a chat template.")  # fmt: skip
@click.option("--processes", type=click.IntRange(min=1), default=2, show_default=True, help="Merges at a time.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of each merge  [default: cores / processes].")
@click.option("--precision", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True,
              help="Of matrix products in training and scoring.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help="torch device.")
@click.option("--sets", type=click.IntRange(1, len(SETS)), default=len(SETS), show_default=True,
              help="Merge the first of the sets of experts; 1: all five only.")  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), default=Sizes.steps, show_default=True,
              help="Of an expert's training.")  # fmt: skip
@click.option("--lora", metavar="RANK", type=click.IntRange(min=0), default=0, show_default=True,
              help="Train adapters of this rank; 0: every weight.")  # fmt: skip
@click.option("--only", metavar="METHOD", multiple=True, help="Run this method only; may be repeated.")
def main(
    workdir: Path, quick: bool, base: Path | None, processes: int, threads: int | None, precision: str, device: str,
    sets: int, steps: int, lora: int, only: tuple[str, ...],
) -> None:  # fmt: skip
    """Do the whole evidence run in WORKDIR, and print where its tables are."""
    if unknown := sorted({*only} - {*METHODS}):
        raise click.ClickException(f"no method {unknown[0]!r}: one of {', '.join(METHODS)}")
    workdir = workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    os.chdir(workdir)
    sizes = QUICK if quick else Sizes(sets=sets, steps=steps, lora_rank=lora)
    threads = threads or max(1, (os.cpu_count() or 1) // processes)
    run = Run(workdir, sizes, processes, threads, precision, device, only)
    prepare(workdir, sizes, base, precision, device)
    try:
        run_all(run)
    finally:  # a run that is stopped has tables, too, of what it got to
        write_results(run)


def write_scores(run: Run) -> Path:
    """All scores that are there in one file, without those of single rows; returns its path."""
    settings = {"sizes": dataclasses.asdict(run.sizes), "precision": run.precision, "tasks": list(TASKS)}
    path = run.workdir / "results.json"
    results = read_results(run.workdir)
    for result in results.values():
        for scores in result.get("test", {}).values():
            scores.pop("rows", None)
    write_json(path, {"settings": settings, "results": results})
    return path


def write_results(run: Run) -> None:
    """All scores that are there in one file, and their tables."""
    write_tables(write_scores(run), run.workdir / "RESULTS.md")
    click.echo(f"Written: {run.workdir / 'RESULTS.md'}")


if __name__ == "__main__":
    main()
