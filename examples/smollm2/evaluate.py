"""Print and save the held-out completion loss of the base model, the experts and merged models on both tasks."""

from __future__ import annotations

from pathlib import Path

import click
from common import evaluate_models, format_table, set_threads, write_evaluation


@click.command()
@click.argument("workdir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("models", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--threads", type=int, help="CPU threads for torch (default: torch's choice).")
def main(workdir: Path, models: tuple[Path, ...], threads: int | None) -> None:
    """Evaluate base, experts and MODELS (default: WORKDIR/merged, if it exists) on the data of WORKDIR."""
    set_threads(threads)
    default = [path for path in [workdir / "merged"] if path.exists()]
    losses = evaluate_models(workdir, models or default, click.echo)
    write_evaluation(workdir, losses)
    click.echo(f"\nHeld-out completion loss:\n{format_table(losses)}")


if __name__ == "__main__":
    main()
