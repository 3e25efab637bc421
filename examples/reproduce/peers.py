"""Every merge of five experts beside `joint`, with intervals: `python peers.py WORK --version joint=auto`.

Reads what `run.py` (WORK/results, may be missing) and `compare_versions.py` (WORK/versions/five) have scored, row by
row; base and experts are scored if they are not yet. Methods with a grid have up to three rows: as their papers
recommend them, with the settings that are best on the calibration rows, and with those that are best on the test rows,
where these are others.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
from formatting import number
from gaps import Evidence, settings_label
from grids import GRIDS
from intervals import Draws, compare, publish
from merging import read_results
from methods import ALL, OURS
from shared import read_json
from tables_of_scores import choice
from versions import references


def tuned(evidence: Evidence) -> Iterator[tuple[str, Draws]]:
    """Methods with a grid."""
    for method in [name for name in GRIDS if name in evidence.grids()]:
        known = {}
        if (own := GRIDS[method].untuned) is not None:
            known = {f"{method}, untuned": found[0] for found in [evidence.group(ALL, method, own)] if found}
        for split, note in (("calibration", ""), ("test", ", tuned on the test rows")):
            best = evidence.tuned(ALL, method, split)
            if best is None or "test" not in best or any(best is other for other in known.values()):
                continue
            label = choice(evidence, ALL, method, split)
            known[method if label == "none" else f"{method}, {label}{note}"] = best
        yield from ((name, {None: result["test"]}) for name, result in known.items())


def calibrated(evidence: Evidence) -> Iterator[tuple[str, Draws]]:
    """Other methods with calibration rows."""
    for method, settings in evidence.untuned():
        found = evidence.group(ALL, method, settings)
        if method != OURS and found:
            label = settings_label(settings)
            yield ", ".join(filter(None, (method, label))), {result["seed"]: result["test"] for result in found}


def version(workdir: Path, folder: str, precision: str) -> Draws:
    """A version or setting of ours: the draws that have been scored.

    Raises:
        click.ClickException: there is none.
    """
    paths = sorted((workdir / "versions" / "five" / folder).glob(f"*/scores_{precision}.json"))
    if not paths:
        raise click.ClickException(f"{workdir / 'versions' / 'five' / folder} has no scores_{precision}.json")
    draws: Draws = {int(path.parent.name): read_json(path) for path in paths}
    is_free = "data_free" in (paths[0].parent / "recipe.yml").read_text(encoding="utf-8")
    return {None: next(iter(draws.values()))} if is_free else draws


@click.command()
@click.argument("workdir", type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path))
@click.option("--version", "versions", multiple=True, metavar="NAME=FOLDER",
              help="A folder of WORK/versions/five, and its name in the table; may be repeated.")  # fmt: skip
@click.option("--against", help="The name that the others are compared with  [default: the first].")
@click.option("--precision", default="bfloat16", show_default=True, help="Of the scores' matrix products.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Markdown file; beside it JSON.")
def main(workdir: Path, versions: tuple[str, ...], against: str | None, precision: str, output: Path | None) -> None:
    """Compare all merges of WORK's five experts."""
    evidence = Evidence(read_results(workdir))
    base, experts = references(workdir, workdir / "versions" / "five", ALL, precision)
    pairs = [each.split("=", 1) for each in versions]
    ours = {name: version(workdir, folder, precision) for name, folder in pairs}
    text, data = compare(base, experts, {**dict(tuned(evidence)), **dict(calibrated(evidence)), **ours},
                         against or next(iter(ours), None))  # fmt: skip
    losses = [f"{task} {number(base[task]['loss'])} and {number(experts[task]['loss'])}" for task in ALL]
    text = f"{text}\nLoss of the base and of the expert, in nats per token: {', '.join(losses)}.\n"
    publish(text, data, output)


if __name__ == "__main__":
    main()
