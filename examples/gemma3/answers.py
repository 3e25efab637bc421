"""Print the greedy answers of base, experts and merged models to the first held-out rows of both tasks."""

from __future__ import annotations

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "smollm2"))

from common import TASKS, load_model, load_tokenizer, read_rows, set_threads
from prepare import answer


@click.command()
@click.argument("workdir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("models", nargs=-1)
@click.option("--rows", default=2, show_default=True, help="Rows per task.")
@click.option("--threads", type=int, help="CPU threads for torch (default: torch's choice).")
def main(workdir: Path, models: tuple[str, ...], rows: int, threads: int | None) -> None:
    """Print the answers of WORKDIR's base, experts and MODELS (names of folders in it)."""
    set_threads(threads)
    for name in ("base", *TASKS, *models):
        model, tokenizer = load_model(workdir / name), load_tokenizer(workdir / name)
        for task in TASKS:
            for question, expected in read_rows(workdir / "data" / f"{task}_test.jsonl")[:rows]:
                click.echo(f"[{name}, {task}] {question['content']}")
                click.echo(f"  -> {answer(model, tokenizer, question['content'])}")
                click.echo(f"  expected: {expected['content']}\n")


if __name__ == "__main__":
    main()
