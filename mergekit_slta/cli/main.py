"""`mergekit-slta ...`: parse, call, print."""

from __future__ import annotations

import traceback
from pathlib import Path

import click

from mergekit_slta import __version__
from mergekit_slta.errors import RunError, SltaError, show

SOLVED_NAME = "slta_alphas_solved.json"
"""Where `solve` writes beside a merged model."""
_WITH_MERGEKIT = ("check", "calibrate", "merge", "linearity")
"""Commands with mergekit's options: they live in `commands.py`, which is slow to import, and are loaded on use."""


class _Group(click.Group):
    """Unexpected errors end in one line, too; -v shows where they come from."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_WITH_MERGEKIT, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _WITH_MERGEKIT:
            from mergekit_slta.cli import mergekit_commands as commands

            return getattr(commands, cmd_name)
        return super().get_command(ctx, cmd_name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.obj = any(part.startswith("-v") for part in args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, click.UsageError):
            raise
        except Exception as error:
            if ctx.obj:
                traceback.print_exc()
            if isinstance(error, click.ClickException):
                raise
            raise RunError(f"{type(error).__name__}: {show(error)}; -v shows where") from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mergekit-slta")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Merge fine-tuned language models submodule by submodule, with weights in closed form."""


@main.command()
@click.argument("stats", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Alphas file to write  [default: beside STATS, slta_alphas.json, or slta_alphas_solved.json by a model]",
)
@click.option("--ridge", type=float, help="Relative ridge  [default: as calibrated]")
@click.option(
    "--importance",
    "importances",
    metavar="MODEL=W",
    multiple=True,
    help="Weight of a model's task in the objective; may be repeated  [default: as calibrated]",
)
@click.option("--balance/--no-balance", default=None, help="Per-sample balancing  [default: as calibrated]")
@click.option("--rows", type=int, help="Use the first so many rows of each task  [default: all]")
@click.option("--without", metavar="MODEL", multiple=True, help="Leave an expert and its task out; may be repeated")
def solve(
    stats: Path,
    output: Path | None,
    ridge: float | None,
    importances: tuple[str, ...],
    balance: bool | None,
    rows: int | None,
    without: tuple[str, ...],
) -> None:
    """Solve the statistics in STATS (slta_stats.safetensors) again, with other settings; touches no model."""
    from mergekit_slta.calibration.resolve import parse_importance, solve_again
    from mergekit_slta.files.alphas_file import describe_ridge
    from mergekit_slta.files.output_folder import ALPHAS_NAME, weight_files
    from mergekit_slta.files.statistics_file import Statistics
    from mergekit_slta.files.targets import check_target
    from mergekit_slta.reporting.terminal import describe_alphas

    beside_model = bool(weight_files(stats.parent))  # the file of the usual name says what that was merged with
    path = (output or stats.with_name(SOLVED_NAME if beside_model else ALPHAS_NAME)).absolute()
    check_target(path)
    alphas = solve_again(
        Statistics.load(stats),
        ridge=ridge,
        importance=parse_importance(importances),
        balance=balance,
        rows=rows,
        without=without,
    )
    alphas.save(path)
    click.echo(describe_alphas(alphas))
    used = alphas.calibration
    click.echo(
        f"Solved with ridge {describe_ridge(used)}; balance {used['balance']}, {used['num_samples']} rows"
        + " for each step" * bool(used.get("fresh_rows")),
        err=True,
    )
    click.echo(f"Written: {show(path)}", err=True)
    if beside_model:
        click.echo(
            "The model there was merged with other alphas; for one with these give its recipe `alphas` (this file) and "
            + (f"ridge {used['ridge']}, " if used["ridge"] is not None else "")
            + f"balance {str(used['balance']).lower()}"
            + (", and no dataset" if rows else ""),
            err=True,
        )


@main.command()
@click.argument("alphas", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Recipe to write  [default: standard output]")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="The recipe that ALPHAS are for  [default: mergekit_config.yml beside ALPHAS]",
)
def export(alphas: Path, output: Path | None, recipe: Path | None) -> None:
    """Print a stock mergekit recipe that gives the merge of ALPHAS (slta_alphas.json) without this plugin."""
    from mergekit_slta.files.atomic import write_text_atomically
    from mergekit_slta.recipe.stock_recipe import check_recipe_target, export

    text, notes, source = export(alphas, recipe)
    if output is not None:
        check_recipe_target(output, [alphas, source])
    for note in notes:
        click.echo(note, err=True)
    if output is None:
        click.echo(text, nl=False)
        return
    write_text_atomically(output, text)
    click.echo(f"Written: {show(output)}", err=True)


@main.command()
@click.argument("target", metavar="OUT_OR_FILE", type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for the figures  [default: beside]")
def report(target: Path, output: Path | None) -> None:
    """Draw the figures of an alphas, statistics or linearity file, or of a merged model and put them in its card."""
    from mergekit_slta.reporting.report import report

    for path in report(target, output):
        click.echo(f"Written: {show(path)}", err=True)


@main.command()
@click.argument("directory", type=click.Path(path_type=Path), default=Path("slta-demo"))
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of data and training")
@click.option("--quick", is_flag=True, help="A few training steps only: shows the steps, not the quality")
def demo(directory: Path, seed: int, quick: bool) -> None:
    """Train a tiny base and three experts in DIRECTORY, merge them, and compare with other methods."""
    from mergekit_slta.demo.run import run_demo

    try:
        run_demo(directory, seed=seed, quick=quick, echo=click.echo)
    except ValueError as error:
        raise SltaError(str(error)) from error


if __name__ == "__main__":
    main()
