"""Draft a recipe from what the models say: find rows for each expert, choose the objective, and check the result.

Scope: everything but questions to the user, which `cli.init_command` asks, and the text, which is in `draft_text.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import yaml
from huggingface_hub import HfApi
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_slta.checkpoints.origins import Origin
from mergekit_slta.checkpoints.tokenizers import own_tokenizer
from mergekit_slta.checkpoints.vocabulary import shared_vocabulary
from mergekit_slta.data.columns import Keys, guess_keys
from mergekit_slta.data.loading import Rows, load_rows
from mergekit_slta.data.rows import TaskRows
from mergekit_slta.data.templates import MODEL, control_tokens
from mergekit_slta.errors import DataError, RecipeError, SltaError, listing, show
from mergekit_slta.job.draft_text import Draft, DraftTask, recipe_text
from mergekit_slta.job.job import Job
from mergekit_slta.job.preflight import prepare
from mergekit_slta.job.templates import describe_template
from mergekit_slta.libraries.mergekit_plan import quiet_log
from mergekit_slta.recipe.load import as_config
from mergekit_slta.recipe.objectives import DATA_FREE, JOINT
from mergekit_slta.recipe.read import read_recipe

ENOUGH_ROWS = 30
"""`joint` is proposed if every task has so many rows: a fifth of them is held out to measure its steps."""
LARGEST_DOWNLOAD = 2 * 2**30
"""Bytes. A larger dataset that a card names is not downloaded to look at it."""
_SAMPLE = 20
_CONFIGS, _SPLITS = ("default", "main", "en"), ("train",)
"""Configs and splits to take first."""


@dataclass(frozen=True)
class Source:
    """Rows that were found for an expert.

    Attributes:
        name: the dataset.
        config, split: the keys; None if the default is right.
        num_rows: number of its rows; None if it could not be looked at.
        columns: its columns.
        keys: what they hold; None if that is not clear.
        why_unseen: why it could not be looked at.
        is_from_card: whether the expert's card names it.
    """

    name: str
    config: str | None = None
    split: str | None = None
    num_rows: int | None = None
    columns: tuple[str, ...] = ()
    keys: Keys | None = None
    why_unseen: str = ""
    is_from_card: bool = False


def parse_data(texts: Sequence[str], experts: Sequence[Origin]) -> dict[str, str]:
    """Parse `MODEL=SOURCE` arguments of the command line.

    Returns:
        Name of an expert -> its dataset.

    Raises:
        RecipeError: an argument has another form, names no expert or several, or names one twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        cuts = [(text[:place].rstrip("/\\"), text[place + 1 :]) for place, mark in enumerate(text) if mark == "="]
        if not cuts or not all(cuts[0]):
            raise RecipeError(
                f"--data {show(text)} is not MODEL=SOURCE: name a model and its rows", code="invalid-value"
            )
        named = {cut: [one for one in experts if cut[0] in (one.name, one.short)] for cut in cuts}
        (name, source), models = next((item for item in named.items() if item[1]), (cuts[0], []))
        if len(models) != 1:
            reason = "names several models" if models else "is none of the models"
            raise RecipeError(
                f"--data: {show(name)} {reason}: name one of {listing(one.name for one in experts)}",
                code="unknown-model",
            )
        if models[0].name in found:
            raise RecipeError(f"--data names {show(name)} twice: give it one dataset", code="duplicate-model")
        found[models[0].name] = source
    return found


def look_at(name: str) -> Source:
    """Open a dataset and find out what its columns hold.

    Returns:
        What was found. A dataset on the Hub that cannot be reached has no number of rows.

    Raises:
        DataError: there is no such dataset, or it cannot be read.
    """
    with quiet_log("mergekit_slta"):
        try:
            rows, config, split = _open(name)
        except DataError as error:
            if not _is_unreachable(error):
                raise
            return Source(name, why_unseen="the Hub cannot be reached")
        sample = []
        for number in range(0, len(rows), max(1, len(rows) // _SAMPLE)):
            with suppress(DataError):
                sample.append(rows[number])
        columns = rows.columns
        return Source(name, config, split, len(rows), tuple(columns), guess_keys(sample, columns))


def from_card(expert: Origin) -> Source | None:
    """The first dataset of an expert's card that can be looked at; else the first that cannot be reached.

    None if its card names none that can be used.
    """
    unseen = None
    for name in expert.datasets:
        try:
            if not os.path.exists(name) and _download_size(name) > LARGEST_DOWNLOAD:
                continue
            source = replace(look_at(name), is_from_card=True)
        except DataError:  # a name that only its training knew, or a dataset of another type
            continue
        if source.num_rows is not None and source.keys is not None:
            return source
        unseen = unseen or (source if source.num_rows is None else None)
    return unseen


def _open(name: str) -> tuple[Rows, str | None, str | None]:
    """Load a dataset. Returns its rows, and its config and split where the defaults do not exist."""
    try:
        return load_rows(name, None, "train"), None, None
    except DataError as error:
        path = os.path.expanduser(name)
        if error.code != "unreadable-dataset" or os.path.isfile(path) or _is_unreachable(error):
            raise
        import datasets

        try:
            place = os.path.realpath(path) if os.path.isdir(path) else name
            config = _first(_CONFIGS, datasets.get_dataset_config_names(place))
            split = _first(_SPLITS, datasets.get_dataset_split_names(place, config))
        except Exception:  # `datasets` and the Hub raise different errors; the first one says more
            raise error from None
        config = None if config == "default" else config
        return load_rows(name, config, split), config, None if split == "train" else split


def _first(preferred: Sequence[str], names: Sequence[str]) -> str:
    return next((name for name in preferred if name in names), names[0])


def _is_unreachable(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ConnectionError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _download_size(name: str) -> int:
    """Bytes of a dataset on the Hub; 0 if it cannot be asked."""
    try:
        return sum(file.size or 0 for file in HfApi().dataset_info(name, files_metadata=True).siblings or [])
    except Exception:  # the Hub is switched off, cannot be reached, or has no such dataset
        return 0


def draft_task(model: str, source: Source | None) -> DraftTask:
    """The entry of an expert.

    Args:
        model: its name in the recipe.
        source: its rows; None for none.

    Raises:
        DataError: it is not clear what the columns hold.
    """
    if source is None:
        return DraftTask(model)
    origin = ", from its card" if source.is_from_card else ""
    task = DraftTask(model, (), source.name, source.config, source.split)
    if source.num_rows is None:
        notes = (
            f"{source.name}{origin}, could not be looked at ({source.why_unseen}).",
            "`check` says which of its columns are found, and whether `text` is needed.",
        )
        return replace(task, notes=notes, is_unseen=True)
    if source.keys is None:
        raise DataError(
            f"the columns of {show(source.name)}, {listing(source.columns)}, hold none of what is found without "
            "`text`: run this on a terminal without --yes, where `text` and `completion` are asked for, or give the "
            "columns the names of docs/data.md",
            code="missing-column",
        )
    used = source.keys.held.split(" with ")
    held = " and ".join(f"`{column}`" for column in used)
    if source.keys.text is not None or used == ["text"]:  # other formats read further columns, if they are there
        rest = [column for column in source.columns if column not in used]
        held += f"; not used: {listing(rest, 6)}" if rest else ""
    notes = (f"{source.num_rows} rows{origin}: {held}.",)
    return replace(task, notes=notes, text=source.keys.text, completion=source.keys.completion)


def check_data(experts: Sequence[Origin], sources: Sequence[Source | None]) -> None:
    """Check that rows are known for all experts, or for none, and then that a merge without rows is possible.

    Raises:
        DataError: some experts have rows and others do not, or there is one expert, without rows.
    """
    missing = [one for one, source in zip(experts, sources, strict=True) if source is None]
    if missing and (len(missing) < len(experts) or len(experts) == 1):
        shorts = [one.short for one in experts]
        names = [one.short if shorts.count(one.short) == 1 else one.name for one in missing]
        line = " ".join(f"--data {show(name)}=FILE_OR_ID" for name in names)
        raise DataError(
            f"no rows are known for {listing(one.name for one in missing)}: add {line}", code="missing-dataset"
        )


def complete(draft: Draft, options: MergeOptions) -> Draft:
    """Complete a draft so that it passes `check`.

    Adds what `checked` adds, what renders chats to the notes, and `objective: joint` if every task has enough rows with
    answers.

    Raises:
        SltaError: see `checked`.
    """
    draft, job = checked(draft, options)
    if draft.objective == DATA_FREE:
        return draft
    pairs = list(zip(draft.tasks, job.rows, job.recipe.tasks, strict=True))
    tasks = [
        replace(task, notes=(*task.notes, _chat_note(rows.chat_template, origin.model, options)))
        if rows and rows.chat_template
        else task
        for task, rows, origin in pairs
    ]
    draft = replace(draft, tasks=tasks)
    if why := why_not_joint([(task, rows) for task, rows, _ in pairs]):
        return replace(draft, why_objective=why)
    why = f"Every task has at least {ENOUGH_ROWS} rows with answers."
    return checked(replace(draft, objective=JOINT, why_objective=why), options)[0]


def why_not_joint(pairs: Sequence[tuple[DraftTask, TaskRows | None]]) -> str:
    """Why `joint` is not proposed: a task has too few rows, or few in which it is known where the answer begins. Empty
    if nothing speaks against it."""
    unseen = [task.model for task, rows in pairs if rows is None]
    few = [task.model for task, rows in pairs if rows is not None and len(rows.rows) < ENOUGH_ROWS]
    unmarked = [str(task.dataset) for task, rows in pairs if rows is not None and not _has_answers(rows)]
    reasons = []
    if unseen:
        reasons.append(f"`joint` needs rows with answers, and those of {listing(unseen, 3)} could not be looked at.")
    if few:
        reasons.append(f"`joint` needs {ENOUGH_ROWS} rows for every task; there are fewer for {listing(few, 3)}.")
    if unmarked:
        verb = "is plain text" if len(unmarked) == 1 else "are plain text"
        reasons.append(
            f"`joint` needs to know where answers begin, and {listing(unmarked, 3)} {verb}: give prompt and answer in "
            "two columns, or set `text` and `completion`."
        )
    return " ".join(reasons)


def _has_answers(rows: TaskRows) -> bool:
    """Whether it is known in nine of ten rows where the answer begins."""
    answered = sum(1 < row.completion < len(row.ids) for row in rows.rows)
    return 10 * answered >= 9 * len(rows.rows)


def _chat_note(origin: str, model: ModelReference, options: MergeOptions) -> str:
    template = own_tokenizer(model, options).template if origin == MODEL else None
    tokens = listing((f"`{token}`" for token in control_tokens(template or "")), 3) if template else "none"
    markers = f" ({tokens})" if tokens != "none" else ""
    return f"Chats are rendered with {describe_template(origin)} chat template{markers}."


def checked(draft: Draft, options: MergeOptions) -> tuple[Draft, Job]:
    """Check a draft as `check` does, and add a `tokenizer` section and `uncalibrated` where the models need them.

    Rows that could not be looked at are not checked.

    Raises:
        SltaError: what `check` would say of the recipe, where neither of these keys would help.
    """
    while True:
        content = yaml.safe_load(recipe_text(draft))
        for task, entry in zip(draft.tasks, content["models"], strict=True):
            if task.is_unseen:
                del entry["parameters"]
        recipe = read_recipe(as_config(content))
        all_seen = not any(task.is_unseen for task in draft.tasks)
        try:
            with quiet_log("mergekit_slta"):
                return draft, prepare(recipe, options, need_rows=all_seen, plan_only=True)
        except SltaError as error:
            if error.code == "differing-vocabularies" and not draft.tokenizer:
                base = recipe.base.config(trust_remote_code=options.trust_remote_code).get_text_config()
                draft = replace(draft, tokenizer=shared_vocabulary(recipe, base, options))
            elif error.code == "split-token" and draft.tokenizer.get("source") != "union":
                draft = replace(draft, tokenizer={"source": "union"})
            elif error.code == "uncalibrated-tensors" and draft.uncalibrated is None:
                draft = replace(draft, uncalibrated="base")
            else:
                raise
