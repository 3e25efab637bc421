"""`mergekit-slta ...`: parse, call, print. Options have mergekit's names, and are generated from mergekit's model."""

from __future__ import annotations

from pathlib import Path

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_slta import __version__
from mergekit_slta.errors import RunError, SltaError, show


class _Group(click.Group):
    """Unexpected errors end in one line, too; -v shows where they come from."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if any(part.startswith("-v") for part in ctx.protected_args + ctx.args) or ctx.obj == "verbose":
                raise
            raise RunError(f"{type(error).__name__}: {show(error)}; -v shows where") from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mergekit-slta")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Merge fine-tuned language models submodule by submodule, with weights in closed form."""


@main.command(cls=PrettyPrintHelp)
@click.argument("recipe", type=click.Path())
@add_merge_options
def check(merge_options: MergeOptions, recipe: str) -> None:
    """Check RECIPE against its models and data without reading weights; print the plan and what it costs."""
    from mergekit_slta.host import check_target, stored
    from mergekit_slta.preflight import estimate, prepare
    from mergekit_slta.recipe import load_config, read_recipe
    from mergekit_slta.summary import describe_job

    merge_options.apply_global_options()
    read = read_recipe(load_config(recipe)[0])
    named = Path(read.settings.alphas).absolute() if read.settings.alphas else None
    if named:
        check_target(named)
    job = prepare(read, merge_options, need_rows=not (named and named.exists()))
    if named:
        stored(job, named, must_match=True)
    click.echo(describe_job(job, estimate(job)))


@main.command(cls=PrettyPrintHelp)
@click.argument("recipe", type=click.Path())
@click.option(
    "-o", "--output", type=click.Path(), help="Alphas file to write  [default: the recipe's, or ./slta_alphas.json]"
)
@add_merge_options
def calibrate(merge_options: MergeOptions, recipe: str, output: str | None) -> None:
    """Run the pre-pass of RECIPE alone: write the alphas file, and the statistics beside it."""
    from mergekit_slta.host import calibrate_to, check_target
    from mergekit_slta.outfolder import ALPHAS_NAME
    from mergekit_slta.preflight import prepare
    from mergekit_slta.recipe import load_config, read_recipe
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


@main.command(cls=PrettyPrintHelp)
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


@main.command()
@click.argument("directory", type=click.Path(path_type=Path), default=Path("slta-demo"))
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of data and training")
@click.option("--quick", is_flag=True, help="A few training steps only: shows the steps, not the quality")
def demo(directory: Path, seed: int, quick: bool) -> None:
    """Train a tiny base and three experts in DIRECTORY, merge them, and compare with other methods."""
    from mergekit_slta.demo import run_demo

    try:
        run_demo(directory, seed=seed, quick=quick, echo=click.echo)
    except ValueError as error:
        raise SltaError(str(error)) from error


if __name__ == "__main__":
    main()
