"""The commands that read models. They take mergekit's options under mergekit's names.

Scope: parse, call, print. Importing this file takes seconds, because mergekit's options import torch, transformers and
peft. Everything else is imported inside the commands.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
from mergekit.options import MergeOptions

from mergekit_slta.cli.verbosity import with_verbose
from mergekit_slta.errors import show
from mergekit_slta.files.names import ROWS_FOLDER
from mergekit_slta.libraries.mergekit import PrettyPrintHelp, add_merge_options

_READING = ("check", "rows", "calibrate", "linearity", "compare")
_COMPUTING = ("rows", "calibrate", "linearity", "compare")
ACTING_OPTIONS = {
    "unsafe_truncate_embeddings": _READING,
    "transformers_cache": ("init", *_READING),
    "lora_merge_cache": ("init", *_READING),
    "lora_merge_dtype": _READING,
    "cuda": _READING,
    "device": _READING,
    "trust_remote_code": ("init", *_READING),
    "gpu_rich": _READING,
    "quiet": _READING,
    "multi_gpu": ("check", "compare"),
    "low_cpu_memory": ("compare",),
    "random_seed": ("compare",),
    "lazy_unpickle": _COMPUTING,
    "read_to_gpu": _COMPUTING,
    "num_threads": _COMPUTING,
}
"""mergekit's option -> the commands, besides `merge`, that take it. `merge` takes every option of mergekit.

`check` plans for a device that it does not use.
"""


def with_merge_options(function: Callable[..., None]) -> click.Command:
    """Turn a function that takes `merge_options` into a command with `-v` and the mergekit options that it uses."""
    name = function.__name__
    command = click.command(cls=PrettyPrintHelp)(add_merge_options(function))
    command.params = [
        param
        for param in command.params
        if param.name not in MergeOptions.model_fields or name == "merge" or name in ACTING_OPTIONS.get(param.name, ())
    ]
    command.params = [param for param in command.params if param.name != "verbosity"]
    return with_verbose(command, expose_value=True)


_verify_option = click.option(
    "--verify", is_flag=True, help="Measure the residual of each merged submodule beside the predicted one"
)


@with_merge_options
@click.argument("recipe", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print the plan and its cost as JSON: bytes, operations, seconds")
def check(merge_options: MergeOptions, recipe: str, as_json: bool) -> None:
    """Check RECIPE, its models and its data; print the plan and its cost.

    No weights are read or downloaded: of models on the Hub, file sizes and the headers of weights are looked at. What
    `merge` would refuse is refused here, too. The device may be on another machine. If it is on this one, about a
    second of work on it tells how long calibration and merge will take. -v adds the parts of the memory.
    """
    from mergekit_slta.host.api import check_job, costs_of
    from mergekit_slta.reporting.plan import describe_job
    from mergekit_slta.reporting.plan_numbers import numbers_of_job
    from mergekit_slta.runtime.screen import print_parts

    merge_options.apply_global_options()
    job = check_job(recipe, merge_options)
    if merge_options.quiet and not as_json:
        return
    costs, seconds = costs_of(job)
    if as_json:
        click.echo(json.dumps(numbers_of_job(job, costs, seconds)))
    else:
        print_parts(*describe_job(job, costs, seconds, is_detailed=bool(merge_options.verbosity)))


@with_merge_options
@click.argument("recipe", type=click.Path())
@click.option("-o", "--output", type=click.Path(), default=ROWS_FOLDER, show_default=True, help="Folder of the files")
def rows(merge_options: MergeOptions, recipe: str, output: str) -> None:
    """Have experts write the calibration rows of RECIPE.

    Of each model with `dataset: self`, or of all if none names a dataset: MODEL.jsonl. Read them, edit them, and name
    the file as the model's `dataset`. A run that was killed goes on where it stopped; finished files are kept.
    """
    from mergekit_slta.generation.store import read_record
    from mergekit_slta.job.preflight import prepare
    from mergekit_slta.job.written_rows import with_writers, written_files
    from mergekit_slta.libraries.mergekit import forget_loaders
    from mergekit_slta.recipe.load import load_config
    from mergekit_slta.recipe.read import read_recipe
    from mergekit_slta.runtime.distributed import refuse_several

    refuse_several("rows")
    merge_options.apply_global_options()
    read = with_writers(read_recipe(load_config(recipe)[0]))
    job = prepare(read, merge_options, for_merge=False, rows_in=[Path(output)])
    forget_loaders(job.recipe.models)
    for path in written_files(job.recipe, Path(output)):
        click.echo(f"Written: {show(path)} ({read_record(path).get('rows')} rows)", err=True)


@with_merge_options
@click.argument("recipe", type=click.Path())
@click.option(
    "-o", "--output", type=click.Path(),
    help="Alphas file to write, or its folder  [default: the recipe's, or ./slta_alphas.json]",
)  # fmt: skip
@_verify_option
def calibrate(merge_options: MergeOptions, recipe: str, output: str | None, verify: bool) -> None:
    """Compute the merging weights of RECIPE, without merging.

    Writes the alphas file and, beside it, the statistics that `solve` reads. A run that was killed goes on where it
    stopped. A file named with -o that holds the weights of other models is not replaced.

    Several processes share the work under `torchrun --nproc-per-node N -m mergekit_slta calibrate RECIPE`.
    """
    from mergekit_slta.calibration.calibrate import statistics_fingerprint
    from mergekit_slta.calibration.recorded_day import recorded_day
    from mergekit_slta.calibration.reuse import calibrate_to, help_calibrate, is_calibrated
    from mergekit_slta.files.inside import output_path
    from mergekit_slta.files.names import ALPHAS_NAME
    from mergekit_slta.files.targets import check_alphas_target, check_same_models
    from mergekit_slta.job.preflight import prepare
    from mergekit_slta.recipe.load import load_config
    from mergekit_slta.recipe.read import read_recipe
    from mergekit_slta.reporting.terminal import describe_alphas
    from mergekit_slta.runtime.distributed import joined, own_device
    from mergekit_slta.runtime.interruption import before_calibration, interruptible
    from mergekit_slta.runtime.screen import print_parts

    merge_options.apply_global_options()
    with joined() as ranks:
        merge_options = merge_options.model_copy(update={"device": own_device(merge_options.device)})
        read = read_recipe(load_config(recipe)[0])
        named = output or read.settings.alphas
        path = output_path(named or ALPHAS_NAME, ALPHAS_NAME)
        check_alphas_target(path)
        if named:
            check_same_models(path, read.label(read.base), [read.label(model) for model in read.models[1:]])
        ready = partial(
            prepare, read, merge_options, for_merge=False, rows_in=[path.parent / ROWS_FOLDER],
            is_calibrated=partial(is_calibrated, places=[path], verified=verify),
        )  # fmt: skip
        if not ranks.is_first:  # waits for the first process, which downloads models and merges adapters on disk
            mark, day = ranks.broadcast(None)
            help_calibrate(ready(day=day), ranks, mark)
            return
        with interruptible(before_calibration):
            job = ready(day=recorded_day([path]))
        ranks.broadcast((statistics_fingerprint(job), job.day))
        alphas, reused = calibrate_to(job, path, verified=verify, ranks=ranks)
    if not merge_options.quiet:
        print_parts(*describe_alphas(alphas))
    click.echo(f"{'Already' if reused else 'Written'}: {show(path)}", err=True)


@with_merge_options
@click.argument("recipe", type=click.Path())
@click.argument("out", type=click.Path())
@_verify_option
@click.option("--overwrite", is_flag=True, help="Replace weights in OUT that no merge of this package wrote")
def merge(merge_options: MergeOptions, recipe: str, out: str, verify: bool, overwrite: bool) -> None:
    """Calibrate RECIPE and merge it into OUT.

    Does what `mergekit-yaml RECIPE OUT` does, and also works where Python reads no .pth files.

    With --overwrite, weights of another origin in OUT are replaced when the merge is complete: those that transformers
    or mergekit could load in its place. Other files stay; one whose name a new file takes, or that
    transformers would read as the merge's, is kept as NAME.old.
    """
    from mergekit_slta.host.api import merge
    from mergekit_slta.runtime.distributed import refuse_several

    refuse_several("merge")
    merge_options.apply_global_options()
    quiet_options = merge_options.model_copy(update={"verbosity": 0})  # the group prints the traceback
    merge(recipe, out, quiet_options, verify=verify, overwrite=overwrite)


@with_merge_options
@click.argument("recipe", type=click.Path())
@click.option(
    "-o", "--output", type=click.Path(),
    help="Linearity file to write, or its folder  [default: ./slta_linearity.json]",
)  # fmt: skip
@click.option("--rows", type=int, help="Use the first so many calibration rows of each task  [default: all]")
def linearity(merge_options: MergeOptions, recipe: str, output: str | None, rows: int | None) -> None:
    """Measure how linear the experts of RECIPE are.

    Measures the whole model, its layers, attention and MLP blocks and attention heads (the paper's sections 2 and A.1
    to A.2). A run that was killed goes on where it stopped.
    """
    from mergekit_slta.analysis.analyse import analyse, for_linearity, num_forwards
    from mergekit_slta.calibration.recorded_day import recorded_day
    from mergekit_slta.files.inside import output_path
    from mergekit_slta.files.names import LINEARITY_NAME
    from mergekit_slta.files.targets import check_linearity_target
    from mergekit_slta.job.preflight import prepare
    from mergekit_slta.recipe.load import load_config
    from mergekit_slta.recipe.read import read_recipe
    from mergekit_slta.reporting.terminal import describe_linearity
    from mergekit_slta.runtime.distributed import refuse_several
    from mergekit_slta.runtime.screen import print_parts

    refuse_several("linearity")
    merge_options.apply_global_options()
    read = read_recipe(load_config(recipe)[0])
    path = output_path(output or LINEARITY_NAME, LINEARITY_NAME)
    check_linearity_target(path)
    job = prepare(
        for_linearity(read),
        merge_options,
        for_merge=False,
        day=recorded_day([path]),
        rows_in=[path.parent / ROWS_FOLDER],
    )
    if not merge_options.quiet:
        click.echo(f"{num_forwards(len(read.tasks))} forward passes of every row; --rows N takes fewer rows", err=True)
    measured, reused = analyse(job, path, rows)
    if not merge_options.quiet:
        print_parts(describe_linearity(measured))
    click.echo(f"{'Already' if reused else 'Written'}: {show(path)}", err=True)


@with_merge_options
@click.argument("recipe", type=click.Path())
@click.option(
    "--methods", metavar="A,B",
    help="average, task_arithmetic (or task_arithmetic:0.4), ties, dare, data_free, features, joint, recipe  "
    "[default: all]",
)  # fmt: skip
@click.option("--rows", type=int, help="Score on the first so many held-out rows of each task  [default: all]")
@click.option(
    "-o", "--output", type=click.Path(), default="slta_compare", show_default=True, help="Folder of the results"
)
@click.option(
    "--lm-eval", metavar="TASKS", help="Print the lm_eval commands for these tasks; run them if it is installed"
)
def compare(
    merge_options: MergeOptions, recipe: str, methods: str | None, rows: int | None, output: str, lm_eval: str | None
) -> None:
    """Merge RECIPE's models by several methods, and score all on held-out rows.

    The base, the experts and one merge at a time are scored on rows of the recipe's own data that no calibration uses.
    A merge is written into a hidden folder inside the output folder, and removed after it. A run that was killed goes
    on where it stopped.

    Writes slta_compare.json, .md, .png and .svg, the recipe of each merge, and the weights that were calibrated.
    """
    from mergekit_slta.comparison.compare import compare as run
    from mergekit_slta.comparison.merging import recipe_path
    from mergekit_slta.comparison.tables import describe_comparison
    from mergekit_slta.files.names import COMPARISON_NAME
    from mergekit_slta.recipe.load import load_config
    from mergekit_slta.runtime.distributed import refuse_several
    from mergekit_slta.runtime.screen import print_parts

    refuse_several("compare")
    merge_options.apply_global_options()
    quiet_options = merge_options.model_copy(update={"verbosity": 0})  # the group prints the traceback
    found = run(load_config(recipe)[0], output, quiet_options, methods=methods, rows=rows, lm_eval=lm_eval)
    if lines := found.settings.get("lm_eval"):
        click.echo("\n".join([*lines, ""]))
    print_parts(*describe_comparison(found))
    if found.best is not None:
        best = shlex.quote(str(recipe_path(Path(output), found.best)))
        click.echo(f"To make it: mergekit-yaml {show(best)} out/")
    click.echo(f"Written: {show(Path(output) / COMPARISON_NAME)}", err=True)
