"""The commands that take mergekit's options, which are generated from mergekit's own model of them."""

from __future__ import annotations

from pathlib import Path

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_slta.errors import show


@click.command(cls=PrettyPrintHelp)
@click.argument("recipe", type=click.Path())
@add_merge_options
def check(merge_options: MergeOptions, recipe: str) -> None:
    """Check RECIPE against its models and data without reading weights; print the plan and what it costs."""
    from mergekit_slta.costs import estimate
    from mergekit_slta.host import check_room, stored
    from mergekit_slta.preflight import prepare
    from mergekit_slta.recipe import load_config, read_recipe
    from mergekit_slta.results import check_target
    from mergekit_slta.summary import describe_job

    merge_options.apply_global_options()
    read = read_recipe(load_config(recipe)[0])
    named = Path(read.settings.alphas).absolute() if read.settings.alphas else None
    if named:
        check_target(named)
    job = prepare(read, merge_options, need_rows=not (named and named.exists()))
    check_room(job, Path.cwd())
    if named:
        stored(job, named, must_match=True)
    click.echo(describe_job(job, estimate(job)))


@click.command(cls=PrettyPrintHelp)
@click.argument("recipe", type=click.Path())
@click.option(
    "-o", "--output", type=click.Path(), help="Alphas file to write  [default: the recipe's, or ./slta_alphas.json]"
)
@add_merge_options
def calibrate(merge_options: MergeOptions, recipe: str, output: str | None) -> None:
    """Run the pre-pass of RECIPE alone: write the alphas file, and the statistics beside it."""
    from mergekit_slta.host import calibrate_to
    from mergekit_slta.outfolder import ALPHAS_NAME
    from mergekit_slta.preflight import prepare
    from mergekit_slta.recipe import load_config, read_recipe
    from mergekit_slta.results import check_target
    from mergekit_slta.summary import describe_alphas

    merge_options.apply_global_options()
    read = read_recipe(load_config(recipe)[0])
    path = Path(output or read.settings.alphas or ALPHAS_NAME).absolute()
    check_target(path)
    job = prepare(read, merge_options, for_merge=False)
    alphas, reused = calibrate_to(job, path)
    if not merge_options.quiet:
        click.echo(describe_alphas(alphas))
    click.echo(f"{'Already' if reused else 'Written'}: {show(path)}", err=True)


@click.command(cls=PrettyPrintHelp)
@click.argument("recipe", type=click.Path())
@click.argument("out", type=click.Path())
@add_merge_options
def merge(merge_options: MergeOptions, recipe: str, out: str) -> None:
    """Calibrate RECIPE, let mergekit merge it into OUT: what `mergekit-yaml RECIPE OUT` does, wherever .pth files are
    not read."""
    import mergekit.merge

    from mergekit_slta.method import register, wrap_run_merge
    from mergekit_slta.recipe import load_config, read_recipe

    merge_options.apply_global_options()
    register()
    wrap_run_merge(mergekit.merge)
    config, source = load_config(recipe)
    read_recipe(config)
    mergekit.merge.run_merge(config, out, options=merge_options, config_source=source)
