"""The commands that read saved files, and the demo: no option of mergekit acts on them.

Scope: parse, call, print. What a command needs is imported inside it.
"""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_slta.cli.verbosity import with_verbose
from mergekit_slta.errors import show


@with_verbose
@click.command()
@click.argument("target", metavar="OUT_OR_FILE", type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for what is written  [default: beside]")
@click.option("--html", is_flag=True, help="Also write slta_report.html: one page to look at, which needs no network")
def report(target: Path, output: Path | None, html: bool) -> None:
    """Draw the figures of a saved file or of a merged model.

    OUT_OR_FILE is an alphas, statistics or linearity file, or the folder of a merged model. A merged model's card
    (README.md) also gets its section on the merge. Any other README stays as it is.
    """
    from mergekit_slta.reporting.report import report

    for path in report(target, output, html=html):
        click.echo(f"Written: {show(path)}", err=True)


@with_verbose
@click.command()
@click.argument("stats", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    help="Alphas file to write, or its folder  [default: beside STATS, slta_alphas_solved.json or A_solved.json]",
)
@click.option("--overwrite", is_flag=True, help="Replace an alphas file that a calibration or a merge wrote")
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
    output: str | None,
    overwrite: bool,
    ridge: float | None,
    importances: tuple[str, ...],
    balance: bool | None,
    rows: int | None,
    without: tuple[str, ...],
) -> None:
    """Compute new weights from saved statistics, with other settings.

    STATS is the statistics file of a calibration (slta_stats.safetensors; A.stats.safetensors beside A.json), or the
    folder that holds it. No model is read. Prints what to write into the recipe to merge with the new weights.
    """
    from mergekit_slta.calibration.resolve import merged_scale, parse_importance, recipe_fragment, solve_again
    from mergekit_slta.files.alphas_file import describe_ridge
    from mergekit_slta.files.inside import output_path, statistics_in
    from mergekit_slta.files.names import solved_path
    from mergekit_slta.files.statistics_file import Statistics
    from mergekit_slta.files.targets import check_alphas_target, check_solved_target
    from mergekit_slta.reporting.terminal import describe_alphas
    from mergekit_slta.runtime.screen import print_parts

    stats = statistics_in(stats).absolute()
    path = output_path(output, solved_path(stats).name) if output else solved_path(stats)
    check_alphas_target(path)
    if not overwrite:
        check_solved_target(path)
    alphas = solve_again(
        Statistics.load(stats),
        ridge=ridge,
        importance=parse_importance(importances),
        balance=balance,
        rows=rows,
        without=without,
        source=stats.name,
    )
    alphas.save(path)
    print_parts(*describe_alphas(alphas))
    used = alphas.calibration
    click.echo(
        f"Solved with ridge {describe_ridge(used)}; balance {used['balance']}, {used['num_samples']} rows"
        + " for each step" * bool(used.get("fresh_rows")),
        err=True,
    )
    fragment = recipe_fragment(alphas, path, without, merged_scale(stats.parent))
    click.echo(f"Written: {show(path)}\n\n{fragment}", err=True)


@with_verbose
@click.command()
@click.argument("alphas", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(), help="Recipe to write, or its folder (stock.yml)  [default: standard output]"
)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="The recipe that ALPHAS are for  [default: mergekit_config.yml beside ALPHAS]",
)
def export(alphas: Path, output: str | None, recipe: Path | None) -> None:
    """Write a stock mergekit recipe that gives the same merge.

    ALPHAS is the alphas file (slta_alphas.json), or the folder that holds it. The recipe needs mergekit alone, without
    this plugin.

    If the merge has a closed form as a direction, that is written, too, as a checkpoint in float32 beside the recipe
    (stock_direction). Give -o then.
    """
    from mergekit_slta.files.atomic import write_text_atomically
    from mergekit_slta.files.inside import alphas_in, output_path
    from mergekit_slta.files.names import STOCK_RECIPE_NAME
    from mergekit_slta.recipe.stock_recipe import check_recipe_target, export

    alphas = alphas_in(alphas)
    path = output_path(output, STOCK_RECIPE_NAME) if output else None
    direction = path.absolute().with_name(f"{path.stem}_direction") if path else None
    exported = export(alphas, recipe, direction)
    if path is not None:
        check_recipe_target(path, [alphas, exported.source])
    for note in exported.notes:
        click.echo(note, err=True)
    if path is None:
        click.echo(exported.text, nl=False)
        return
    if exported.direction is not None and direction is not None:
        from mergekit_slta.host.merge import merge_recipe

        click.echo(f"Computing the direction, a checkpoint in float32: {show(direction)}", err=True)
        merge_recipe(exported.direction, direction)
        click.echo(f"Written: {show(direction)}", err=True)
    write_text_atomically(path, exported.text)
    click.echo(f"Written: {show(path)}", err=True)


@with_verbose
@click.command()
@click.argument("directory", type=click.Path(path_type=Path), default=Path("slta-demo"))
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of data and training")
@click.option("--quick", is_flag=True, help="Train for seconds only: shows that everything runs, not how well")
def demo(directory: Path, seed: int, quick: bool) -> None:
    """Train tiny models, merge them, and compare with other methods.

    Everything is written to DIRECTORY (default: slta-demo): a base of a million parameters, three experts, their data,
    the recipe and the merged model. Takes about three minutes on two CPU cores; nothing is downloaded.
    """
    from mergekit_slta.demo.run import run_demo

    run_demo(directory, seed=seed, quick=quick, echo=click.echo)
