"""The tables of an evidence run, beside the paper's: `python tables.py WORK/results.json -o WORK/RESULTS.md`.

Scope: from the JSON of a run (or the folder of its results, while it is going on) to Markdown. Nothing is measured
here, and what has not been measured is a dash. The same files give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
from evidence_run import Run, load
from methods import ALL, SETS
from tables_of_repeat import other_experts
from tables_of_scores import (
    accuracy,
    by_task,
    experts,
    levels,
    main_comparison,
    number_of_experts,
    number_of_rows,
)
from tables_of_studies import claim_tables, cost, non_linearity

SECTIONS: tuple[Callable[[Run], str | None], ...] = (
    experts, main_comparison, other_experts, by_task, levels, number_of_rows, number_of_experts, non_linearity,
    cost, claim_tables, accuracy,
)  # fmt: skip


def document(run: Run) -> str:
    """The whole text."""
    sizes = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in run.settings.get("sizes", {}).items())
    precision = f" Products in {run.settings['precision']}." if "precision" in run.settings else ""
    head = (
        f"{len(run.evidence.candidates())} merges of {len(ALL)} experts in {len(SETS)} sets.{precision} "
        f"{sizes[:1].upper()}{sizes[1:]}{'.' if sizes else ''}"
    )
    definition = (
        "The share of the gap recovered at a task is (base's loss - merge's loss) / (base's loss - expert's loss) on "
        "its held-out rows: 0 is the base, 100% the expert. ± is the standard deviation (n - 1) over seeds, which draw "
        "the calibration rows; the paper's divides by n. – has not been measured."
    )
    parts = [part for write in SECTIONS if (part := write(run)) is not None]
    return "\n\n".join(["# Results", head.strip(), definition, *parts]) + "\n"


def write_tables(
    results: Path,
    target: Path,
    linearity: Path | None = None,
    costs: Path | None = None,
    repeated: Path | None = None,
) -> None:
    """Write the tables of a run.

    Args:
        results: its results.json, or its folder of results.
        target: the Markdown file.
        linearity: what `mergekit-slta linearity` wrote; else slta_linearity.json beside the results, if there is one.
        costs: what `costs.py` wrote; else costs.json beside the results, if there is one.
        repeated: the results.json of `repeat.py`; else repeated.json beside the results, if there is one.
    """
    target.write_text(document(load(results, linearity, costs, repeated)), encoding="utf-8")


_FILE = click.Path(exists=True, path_type=Path)


@click.command()
@click.argument("results", type=_FILE)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("RESULTS.md"),
              show_default=True, help="Markdown file to write.")  # fmt: skip
@click.option("--linearity", type=_FILE, help="Linearity file  [default: slta_linearity.json beside RESULTS]")
@click.option("--costs", type=_FILE, help="Measured costs  [default: costs.json beside RESULTS]")
@click.option("--repeated", type=_FILE, help="Results with other experts  [default: repeated.json beside RESULTS]")
def main(results: Path, output: Path, linearity: Path | None, costs: Path | None, repeated: Path | None) -> None:
    """Write the tables of RESULTS: a run's results.json, or its folder of results while it is going on."""
    write_tables(results, output, linearity, costs, repeated)
    click.echo(f"Written: {output}")


if __name__ == "__main__":
    main()
