"""What a merge of all five experts costs by every method: `python costs.py WORK` after `run.py WORK`.

One setting of each method, by the stock `mergekit-yaml` in a process of its own: wall seconds and the peak of anonymous
memory (what a process holds; pages of mapped checkpoints are the system's), libraries included. Linux only. Ours once
with its calibration and once with the weights at hand. Whatever has been measured is kept in WORK/costs.json.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml
from experts import QUICK, Sizes
from gaps import settings_label
from grids import baselines
from merging import RANDOM_SEED
from methods import ALL, OURS, Candidate, calibration_recipe, set_name, with_alphas
from shared import installed_command, read_json, write_json

from measure import watch  # isort: skip  # of the SmolLM2 example, which `shared` has put on the path

GRANULARITY = "attn_mlp"
CALIBRATED, AT_HAND = f"{OURS}, with calibration", f"{OURS}, weights at hand"
MIB = 2**20


@dataclass(frozen=True)
class Job:
    """A merge to measure.

    Attributes:
        title: its row.
        method: what `--only` names.
        settings: shown beside it.
        recipe: for mergekit.
    """

    title: str
    method: str
    settings: dict[str, Any]
    recipe: dict[str, Any]


def jobs(sizes: Sizes) -> Iterator[Job]:
    """The middle of the grid of every method that mergekit has; ours twice, the weights of the first for the second."""
    grids: dict[str, list[Candidate]] = {}
    for candidate in baselines(ALL):
        if "merge_method" in candidate.recipe:
            grids.setdefault(candidate.method, []).append(candidate)
    for method, candidates in grids.items():
        middle = candidates[len(candidates) // 2]
        title = f"{method} ({settings_label(middle.settings)})" if middle.settings else method
        yield Job(title, method, middle.settings, middle.recipe)
    settings = {"granularity": GRANULARITY}
    recipe = calibration_recipe(ALL, sizes.seeds[0], sizes.calibration_rows, **settings)
    yield Job(CALIBRATED, OURS, settings, recipe)
    yield Job(AT_HAND, OURS, settings, with_alphas(ALL, "costs/slta_alphas.json"))


def read_once(workdir: Path) -> None:
    """Have the system read the checkpoints, so that the first job does not wait for the disk alone."""
    for name in ("base", *ALL):
        for path in (workdir / name).glob("*.safetensors"):
            with path.open("rb") as file:
                while file.read(64 * MIB):
                    pass


def measure(workdir: Path, job: Job, repeat: int) -> dict[str, Any]:
    """Run a merge several times; medians, and all values."""
    folder = workdir / "costs"
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yml").write_text(yaml.safe_dump(job.recipe, sort_keys=False), encoding="utf-8")
    arguments = ["costs/recipe.yml", "costs/merged", "--quiet", "--no-copy-tokenizer", "--no-write-model-card"]
    found = []
    for _ in range(repeat):
        shutil.rmtree(folder / "merged", ignore_errors=True)
        found.append(
            watch([installed_command("mergekit-yaml"), *arguments, "--random-seed", str(RANDOM_SEED)], workdir)
        )
        if job.title == CALIBRATED:
            shutil.copy(folder / "merged" / "slta_alphas.json", folder / "slta_alphas.json")
    shutil.rmtree(folder / "merged")
    seconds = [each["seconds"] for each in found]
    peaks = [int(each["peak_anonymous_mib"] * MIB) for each in found]
    return {
        "title": job.title, "method": job.method, "settings": job.settings,
        "seconds": statistics.median(seconds), "peak_anonymous_bytes": statistics.median(peaks),
        "all_seconds": seconds, "all_peak_anonymous_bytes": peaks,
    }  # fmt: skip


@click.command()
@click.argument("workdir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--only", metavar="METHOD", multiple=True, help="Of these methods only; may be repeated.")
@click.option("--quick", is_flag=True, help="For a work directory that was made with --quick.")
@click.option("--again", is_flag=True, help="Measure anew what is there already.")
@click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each; medians count.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of each merge  [default: all cores].")
def main(workdir: Path, only: tuple[str, ...], quick: bool, again: bool, repeat: int, threads: int | None) -> None:
    """Measure what merging all experts of WORKDIR takes, and write WORKDIR/costs.json."""
    workdir = workdir.resolve()
    wanted = list(jobs(QUICK if quick else Sizes()))
    known = {job.method for job in wanted}
    if unknown := sorted(set(only) - known):
        raise click.ClickException(f"no method {unknown[0]!r}: one of {', '.join(sorted(known))}")
    threads = threads or os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the merges; nothing is computed in this process
    target = workdir / "costs.json"
    about = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {threads} threads",
        "set": set_name(ALL),
        "experts": list(ALL),
    }
    content = read_json(target) if target.exists() else {**about, "runs": []}
    if {key: content[key] for key in about} != about:
        raise click.ClickException(f"{target} was measured otherwise ({content['machine']}): remove it to begin anew")
    done = {each["title"]: each for each in content["runs"]}
    read_once(workdir)
    for job in wanted:
        if (only and job.method not in only) or (job.title in done and not again):
            continue
        done[job.title] = found = measure(workdir, job, repeat)
        ordered = [done[each.title] for each in wanted if each.title in done]
        write_json(target, {**about, "runs": ordered})
        peak = found["peak_anonymous_bytes"] / MIB
        click.echo(f"{job.title}: {found['seconds']:.1f} s, {peak:.0f} MiB")


if __name__ == "__main__":
    main()
