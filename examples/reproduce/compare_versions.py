"""Two versions of the package, or two settings of it, on the same experts, draws and test rows: which is better?

`python examples/reproduce/compare_versions.py WORK --old PYTHON --new PYTHON` calibrates with each version on every
draw, merges in memory, scores every test row, and prints the differences with a paired bootstrap's intervals
(`paired`). WORK is a folder of `run.py`. PYTHON is a command line, such as "env PYTHONPATH=/old/checkout python". With
--old-key and --new-key one version is compared under two recipes: `--new-key objective=features`, say.

Whatever is done stays in WORK/versions, and the same command goes on from there. Without --new, --old is measured
alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from formatting import number, table
from intervals import percent
from methods import ALL, TRIPLE
from paired import Estimate, Scores, bootstrap, spread
from shared import write_json
from versions import Variant, calibrate, references, scores_of

SETS = {"five": ALL, "three": TRIPLE}
SHOWN = {
    "mean": "gap recovered, mean task",
    "worst": "gap recovered, worst task",
    "divergence": "of the base's divergence left, mean task",
}


def report(
    base: Scores, experts: Scores, scores: Mapping[str, Sequence[Scores]], times: Mapping[str, Sequence[dict[str, Any]]]
) -> tuple[str, dict[str, Any]]:
    """The comparison as Markdown and as data: every method, then the last minus the first where there are two."""
    found = bootstrap(base, experts, scores)
    estimates = {name: {key: Estimate.of(value) for key, value in values.items()} for name, values in found.items()}
    if len(found) > 1:
        first, last = next(iter(found)), list(found)[-1]
        title = f"{last} - {first}"
        estimates[title] = {key: Estimate.of(found[last][key] - found[first][key]) for key in found[first]}
    measures = list(next(iter(found.values())))
    rows = [[SHOWN.get(key, key), *(percent(values[key], ".2f") for values in estimates.values())] for key in measures]
    parts = [table(["%", *estimates], rows)]
    spreads = {name: spread(base, experts, draws) for name, draws in scores.items()}
    rows = [
        [
            name,
            *(number(None if (value := spreads[name][key]) is None else 100 * value, ".2f") for key in SHOWN),
            number(statistics.fmean(one["seconds"] for one in times[name]), ".0f"),
            number(statistics.fmean(one["cpu_seconds"] for one in times[name]), ".0f"),
            number(max(one["peak_kilobytes"] for one in times[name]) / 1024, ".0f"),
            ", ".join(sorted({one["source"] for one in times[name]})),
            "yes" if any(one["stopped_before"] for one in times[name]) else "no",
        ]
        for name in scores
    ]
    head = [
        "",
        *(f"std over draws: {name}" for name in SHOWN),
        "seconds",
        "CPU seconds",
        "peak MiB",
        "source",
        "stopped",
    ]
    parts.append(table(head, rows))
    parts.append(
        "Value ± standard error (95% interval) over test rows and draws, paired. Seconds are means over draws; where a "
        "calibration was stopped and went on, only those of its last part."
    )
    data = {name: {key: asdict(value) for key, value in values.items()} for name, values in estimates.items()}
    return "\n\n".join(parts) + "\n", {"estimates": data, "spread_over_draws": spreads, "times": dict(times)}


def measure(
    workdir: Path, folder: Path, variants: Sequence[Variant], tasks: Sequence[str], seeds: Sequence[int], precision: str
) -> tuple[str, dict[str, Any]]:
    """Calibrate, merge and score what is missing; draw by draw, so that a stopped comparison has whole pairs."""
    draws = {one.name: {seed: folder / one.name / str(seed) for seed in seeds} for one in variants}
    times: dict[str, list[dict[str, Any]]] = {one.name: [] for one in variants}
    for seed in seeds:
        for one in variants:
            times[one.name].append(calibrate(workdir, draws[one.name][seed], one, tasks, seed))
    base, experts = references(workdir, folder, tasks, precision)
    scores = {
        name: [scores_of(workdir, draw, tasks, precision) for draw in by_seed.values()]
        for name, by_seed in draws.items()
    }
    text, data = report(base, experts, scores, times)
    return text, {"tasks": list(tasks), "seeds": list(seeds), "precision": precision, **data}


@click.command()
@click.argument("workdir", type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path))
@click.option("--old", required=True, metavar="PYTHON", help="Command line of the first version's Python.")
@click.option("--new", metavar="PYTHON", help="That of the second version.")
@click.option("--old-name", default="old", show_default=True, help="Name of the first version, and of its folder.")
@click.option("--new-name", default="new", show_default=True, help="Name of the second version, and of its folder.")
@click.option("--old-key", multiple=True, metavar="KEY=VALUE", help="Key of the first version's recipe.")
@click.option("--new-key", multiple=True, metavar="KEY=VALUE", help="Key of the second version's recipe.")
@click.option("--recipe-key", multiple=True, metavar="KEY=VALUE",
              help="Key of both recipes  [default: objective=joint, 30 samples].")  # fmt: skip
@click.option("--seeds", default="42,43,44", show_default=True, help="Of the draws.")
@click.option("--set", "experts", type=click.Choice(list(SETS)), default="five", show_default=True, help="Experts.")
@click.option("--precision", type=click.Choice(["bfloat16", "float32"]), default="float32", show_default=True,
              help="Of the scores' matrix products.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of the scores.")
def main(
    workdir: Path, old: str, new: str | None, old_name: str, new_name: str, old_key: tuple[str, ...],
    new_key: tuple[str, ...], recipe_key: tuple[str, ...], seeds: str, experts: str, precision: str,
    threads: int | None,
) -> None:  # fmt: skip
    """Compare two versions of the package on the experts of WORKDIR."""
    if threads:
        torch.set_num_threads(threads)
    variants = [Variant.of(old_name, old, [*recipe_key, *old_key])]
    if new:
        variants.append(Variant.of(new_name, new, [*recipe_key, *new_key]))
    if len({one.name for one in variants}) < len(variants):
        raise click.BadParameter("two versions of one name: give --new-name or a --new-key")
    folder = workdir / "versions" / experts
    text, data = measure(workdir, folder, variants, SETS[experts], [int(seed) for seed in seeds.split(",")], precision)
    path = folder / f"{'--'.join(one.name for one in variants)}.json"
    write_json(path, data)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    click.echo(f"{text}\nWritten: {path} and .md")


if __name__ == "__main__":
    main()
