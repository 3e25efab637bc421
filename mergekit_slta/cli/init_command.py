"""`mergekit-slta init`: writes a recipe, and asks on a terminal.

Scope: parse, ask, print. `job.lineage` finds the base, `job.draft` the rows and the rest.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from mergekit.options import MergeOptions

from mergekit_slta.cli.mergekit_commands import with_merge_options
from mergekit_slta.errors import DataError, RecipeError, listing, show

if TYPE_CHECKING:
    from mergekit_slta.checkpoints.origins import Origin
    from mergekit_slta.job.draft import Source
    from mergekit_slta.job.draft_text import Draft
    from mergekit_slta.job.lineage import Lineage

_NO_ROWS = "-"


@with_merge_options
@click.argument("models", metavar="[BASE] EXPERT...", nargs=-1, required=True)
@click.option("--base", help="The base model, where it is not clear which one it is")
@click.option(
    "--data", "datasets", metavar="MODEL=SOURCE", multiple=True,
    help="Rows of an expert's task: a file, folder, pattern or Hub id; MODEL as given, or its last part; may be "
    "repeated  [default: what the expert's card names]",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(), default="recipe.yml", show_default=True,
    help="Recipe to write, or its folder",
)  # fmt: skip
@click.option("--yes", is_flag=True, help="Ask nothing and take the defaults, as where there is no terminal")
@click.option("--overwrite", is_flag=True, help="Replace the file to write, if there is one")
def init(
    merge_options: MergeOptions,
    models: tuple[str, ...],
    base: str | None,
    datasets: tuple[str, ...],
    output: str,
    yes: bool,
    overwrite: bool,
) -> None:
    """Write a recipe from what models say of themselves.

    Models are folders, ids on the Hub, LoRA adapters, or BASE+ADAPTER. They name their base in adapter_config.json, in
    their card, or in config.json. The first rule that applies finds the base:

    \b
    1. --base.
    2. The given model that the others name as their base.
    3. The model that all of them name as their base; it need not be given.
    4. The first given model, if it names no base itself.

    Rows come from --data, or from the datasets of an expert's card. The recipe has `objective: joint` if there are at
    least 30 rows with answers for every expert, `features` with other rows, and `data_free` without any rows.

    On a terminal each choice is asked, with its default. The recipe passes `mergekit-slta check`.
    """
    from mergekit_slta.checkpoints.origins import config_dtype, read_origin
    from mergekit_slta.files.atomic import write_text_atomically
    from mergekit_slta.files.inside import output_path
    from mergekit_slta.files.names import RECIPE_NAME
    from mergekit_slta.files.targets import check_new_recipe
    from mergekit_slta.job.draft import check_data, checked, draft_task, from_card, look_at, parse_data
    from mergekit_slta.job.draft_text import Draft, recipe_text
    from mergekit_slta.recipe.objectives import DATA_FREE, FEATURES, JOINT

    merge_options.apply_global_options()
    path = output_path(output, RECIPE_NAME)
    check_new_recipe(path, overwrite)
    asks = not yes and is_terminal()
    lineage = _find_lineage([read_origin(name) for name in models], base.rstrip("/\\") if base else None, asks)
    given = parse_data(datasets, lineage.experts)
    _say(f"Base: {lineage.base} ({lineage.why})")
    if lineage.others:
        named = listing((f"{one.name} names {one.base}" for one in lineage.others), 4)
        _say(f"Warning: {named} as its base: right only if these are the same weights")
    sources: list[Source | None] = []
    for expert in lineage.experts:
        if expert.name in given:
            source = look_at(given[expert.name])
        else:
            source = _ask_for_rows(expert) if asks else from_card(expert)
        if asks and source is not None and (source.keys is None or source.keys.is_guess):
            source = _ask_for_keys(source)
        _say(f"Expert: {expert.name}, {_described(source)}")
        sources.append(source)
    check_data(lineage.experts, sources)
    check_new_recipe(path, overwrite, [Path(source.name).expanduser() for source in sources if source is not None])
    has_rows = any(source is not None for source in sources)
    draft = Draft(
        path=_short(path),
        base=lineage.base,
        why_base=lineage.why,
        tasks=[
            draft_task(lineage.reference(expert), source)
            for expert, source in zip(lineage.experts, sources, strict=True)
        ],
        objective=FEATURES if has_rows else DATA_FREE,
        out_dtype=config_dtype(lineage.base),
    )
    draft = _completed(draft, merge_options, asks)
    if asks and has_rows:
        _say(draft.why_objective)
        objective = click.prompt("Objective", type=click.Choice([FEATURES, JOINT]), default=draft.objective, err=True)
        if objective != draft.objective:
            draft = checked(replace(draft, objective=objective), merge_options)[0]
    _say(f"Objective: {draft.objective}" + (f" ({draft.why_objective})" if draft.why_objective else ""))
    write_text_atomically(path, recipe_text(draft))
    _say(f"Written: {draft.path}\nNext: mergekit-slta check {draft.path}")


def is_terminal() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def _say(text: str) -> None:
    click.echo("\n".join(show(line, 1000) for line in text.splitlines()), err=True)


def _short(path: Path) -> str:
    """A path as it would be typed in the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _find_lineage(origins: list[Origin], base: str | None, asks: bool) -> Lineage:
    from mergekit_slta.job.lineage import find_lineage

    try:
        found = find_lineage(origins, base)
    except RecipeError as error:
        if not asks:
            raise
        _say(error.message)
        return find_lineage(origins, click.prompt("Base model", default=origins[0].name, err=True))
    if asks and base is None:
        stated = click.prompt(f"Base model ({found.why})", default=found.base, err=True)
        return found if stated == found.base else find_lineage(origins, stated)
    return found


def _ask_for_rows(expert: Origin) -> Source | None:
    """Ask for an expert's rows until they can be read; None for no rows. Its card proposes some."""
    from mergekit_slta.job.draft import look_at

    proposed = iter(expert.datasets)
    while True:
        name = click.prompt(
            f"Rows of {show(expert.name)} (file, folder, pattern or Hub id; {_NO_ROWS} for none)",
            default=next(proposed, _NO_ROWS), err=True,
        )  # fmt: skip
        if name == _NO_ROWS:
            return None
        try:
            return replace(look_at(name), is_from_card=name in expert.datasets)
        except DataError as error:
            _say(f"Error: {error.message}")


def _ask_for_keys(source: Source) -> Source:
    """Ask how prompt and answer are joined, where the columns do not say it."""
    from mergekit_slta.data.columns import Keys

    if source.num_rows is None:
        return source
    _say(
        f"Columns of {source.name}: {listing(source.columns)}. Write {{column}} for a column and \\n for a line break."
    )
    keys = source.keys or Keys(source.columns[0], f"{{{source.columns[0]}}}")
    text = click.prompt("Prompt, as in the training", default=_typed(keys.text or ""), err=True)
    completion = click.prompt(
        f"Answer ({_NO_ROWS} if the prompt is a whole text)", default=_typed(keys.completion or _NO_ROWS), err=True
    )
    answer = None if completion == _NO_ROWS else _untyped(completion)
    used = [name for name in source.columns if name in (text, answer) or f"{{{name}}}" in f"{text}{answer}"]
    return replace(source, keys=Keys(" with ".join(used), _untyped(text), answer))


def _completed(draft: Draft, options: MergeOptions, asks: bool) -> Draft:
    """Complete a draft; ask for a chat template where the rows are chats and no model has one."""
    from mergekit_slta.job.draft import complete
    from mergekit_slta.libraries.mergekit import chat_template_names

    while True:
        try:
            return complete(draft, options)
        except DataError as error:
            if not asks or not (error.code == "missing-chat-template" or draft.chat_template):
                raise
            _say(error.message)
        named = click.prompt(
            "Chat template that the experts were trained with", type=click.Choice(chat_template_names()),
            default="alpaca", err=True,
        )  # fmt: skip
        draft = replace(draft, chat_template=named)


def _typed(text: str) -> str:
    return text.replace("\n", "\\n")


def _untyped(text: str) -> str:
    return text.replace("\\n", "\n")


def _described(source: Source | None) -> str:
    if source is None:
        return "no rows"
    held = "" if source.keys is None else f": {source.keys.held}"
    count = "not looked at" if source.num_rows is None else f"{source.num_rows} rows"
    return f"{source.name}, {count}{held}"
