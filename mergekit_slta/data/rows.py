"""Calibration rows: datasets, templates and chat templates turned into token ids.

Scope: rows in, tokens out; knows no models. Where the paper is silent ("30 samples per task", "FastChat template"):
rows are drawn without replacement with a generator of their own; the first n rows drawn are the same for every
`num_samples` >= n; a row is cut to `max_seq_length` tokens; special tokens are those the tokenizer itself adds, once.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergekit_slta.errors import DataError, listing, show
from mergekit_slta.recipe.settings import Settings, TaskSettings

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

LOG = logging.getLogger(__name__)
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
MIN_TOKENS = 2
"""A row with fewer tokens shows a submodule at most its begin-of-sequence token, and is refused."""


@dataclass(frozen=True)
class Row:
    """One calibration row.

    Attributes:
        number: its number in the dataset.
        text: as rendered.
        ids: tokens, after the cut.
        completion: the first token of the answer, whose loss counts where an objective asks for one; 1 where the whole
            row is the answer (no loss is defined for a first token).
    """

    number: int
    text: str
    ids: tuple[int, ...]
    completion: int = 1


@dataclass(frozen=True)
class Example:
    """A calibration row and its task.

    Attributes:
        row: the row.
        task: the canonical number of the task's expert, from 0.
    """

    row: Row
    task: int


@dataclass(frozen=True)
class TaskRows:
    """The rows drawn for one task, in the order they were drawn."""

    name: str
    dataset: str
    rows: tuple[Row, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows together."""
        return sum(len(row.ids) for row in self.rows)

    def part(self, number: int, parts: int) -> tuple[Row, ...]:
        """One of so many even parts of the rows, from 0, in the order they were drawn."""
        count = len(self.rows)
        return self.rows[count * number // parts : count * (number + 1) // parts]

    @property
    def sha256(self) -> str:
        """Hash over the rendered texts and the token ids, hence over the data, the template and the tokenizer."""
        digest = hashlib.sha256()
        for row in self.rows:
            content = [row.text, row.ids, *([row.completion] if row.completion > 1 else [])]
            digest.update(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def draw_rows(task: TaskSettings, name: str, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> TaskRows:
    """Load a task's dataset, draw its rows, and tokenize them.

    Args:
        task: where the rows are and how a row becomes text.
        name: the expert's name in messages.
        settings: `num_samples`, `seed` and `max_seq_length`.
        tokenizer: that of the base (or of the merged model, where the recipe makes another).

    Raises:
        DataError: no dataset, file, split, column or template field; a row that is empty or too short.
    """
    if task.dataset is None:
        raise DataError(f"{show(name)} has no `dataset`: name its calibration rows, or an existing file with `alphas`")
    dataset = load_rows(task.dataset, task.dataset_config, task.split)
    render = renderer(task.text, dataset.column_names, tokenizer, task.dataset, task.completion)
    wanted, groups = settings.num_samples * settings.own.row_groups, settings.own.row_groups
    if len(dataset) < groups:
        raise DataError(
            f"{show(task.dataset)} has {len(dataset)} rows for {groups} steps with rows of their own: "
            "add rows, lower `steps`, or set `fresh_rows: false`"
        )
    if len(dataset) < wanted:
        LOG.warning(
            "%s has %d rows, fewer than num_samples = %d%s", show(task.dataset), len(dataset), settings.num_samples,
            ": using all" if groups == 1 else f" for each of {groups} steps, {wanted} in all: using all, "
            f"{len(dataset) // groups} or so at a step; add rows, lower `steps`, or set `fresh_rows: false`",
        )  # fmt: skip
    rows, unmarked = [], 0
    for number in sample_numbers(len(dataset), wanted, settings.seed):
        where = f"row {number} of {show(task.dataset)}"
        text, is_chat, answer = render(dataset[number], where)
        ids = encode(text, tokenizer, settings.max_seq_length, add_special_tokens=not is_chat)
        if not text.strip() or len(ids) < MIN_TOKENS:
            raise DataError(
                f"{where} is {'empty' if not text.strip() else 'too short'} ({len(ids)} tokens, {MIN_TOKENS} needed): "
                "remove such rows or choose another `text`"
            )
        first = 1
        if settings.own.needs_answers and answer:
            first = completion_start(text, answer, ids, tokenizer, add_special_tokens=not is_chat)
        unmarked += is_chat and not answer
        rows.append(Row(number, text, tuple(ids), first))
    if len(rows) > 1 and len({row.ids for row in rows}) == 1:
        LOG.warning(
            "all %d rows of %s are the same %d tokens: raise `max_seq_length` if they are cut, or choose another "
            "`text`", len(rows), show(task.dataset), len(rows[0].ids),
        )  # fmt: skip
    if settings.own.needs_answers:
        _check_answers(task.dataset, rows, unmarked)
    return TaskRows(name, task.dataset, tuple(rows))


def _check_answers(dataset: str, rows: Sequence[Row], unmarked: int) -> None:
    """Say which rows have no answer whose loss could count; `unmarked` chats count whole.

    Raises:
        DataError: none has.
    """
    cut = sum(row.completion >= len(row.ids) for row in rows)
    if cut == len(rows):
        raise DataError(
            f"all {cut} rows of {show(dataset)} end before their answer begins: raise `max_seq_length`, or choose "
            "shorter rows"
        )
    if cut:
        LOG.warning(
            "%d of %d rows of %s end before their answer begins, and tell nothing: raise `max_seq_length`",
            cut, len(rows), show(dataset),
        )  # fmt: skip
    if unmarked:
        LOG.warning(
            "%d of %d chats of %s do not end with an assistant's answer that can be told from the prompt: the loss of "
            "the whole chat counts there", unmarked, len(rows), show(dataset),
        )  # fmt: skip


def sample_numbers(num_rows: int, num_samples: int, seed: int) -> list[int]:
    """Row numbers drawn without replacement; a prefix of what a larger `num_samples` draws.

    The generator is a local one: global random state is untouched.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_rows, generator=generator, device="cpu")[:num_samples].tolist()


def load_rows(name: str, config: str | None, split: str) -> Dataset:
    """A dataset from a file, a folder, a glob pattern or the Hub, as `datasets` reads it.

    Raises:
        DataError: nothing is there, the file type is unknown, the split does not exist, or there are no rows.
    """
    import datasets

    arguments = _load_arguments(name, config)
    try:
        with _quiet_progress():
            rows = datasets.load_dataset(**arguments, split=split)
            if arguments["path"] == "text":  # a row per line, and a blank line is none
                rows = rows.filter(lambda row: bool(row["text"].strip()))
    except Exception as error:  # `datasets` raises its own, fsspec's, pyarrow's and the Hub's errors
        cause = error.__cause__ or error
        raise DataError(
            f"cannot load dataset {show(name)} (config {show(config)}, split {show(split)}): {show(cause, 300)}; "
            "check `dataset`, `dataset_config` and `split`"
        ) from error
    if len(rows) == 0:
        raise DataError(f"dataset {show(name)}, split {show(split)}, has no rows: choose another `dataset` or `split`")
    return rows


def _load_arguments(name: str, config: str | None) -> dict[str, Any]:
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return {"path": path, "name": config}
    matches = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else [path] * os.path.isfile(path)
    if not matches:
        looks_local = glob.has_magic(path) or Path(path).suffix in LOADERS or path.startswith((".", "/", "~"))
        if looks_local or path.count("/") > 1:
            raise DataError(f"dataset {show(name)} not found: no such file or folder (paths start at the current one)")
        return {"path": name, "name": config}
    kinds = {Path(match).suffix.lower() for match in matches}
    if len(kinds) > 1 or not kinds <= LOADERS.keys():
        raise DataError(
            f"dataset {show(name)} has file type {listing(sorted(kinds))}; use one of {listing(LOADERS)}, "
            "a folder, or a Hub id"
        )
    return {"path": LOADERS[kinds.pop()], "data_files": [os.path.abspath(match) for match in matches]}


@contextmanager
def _quiet_progress() -> Iterator[None]:
    """`datasets` draws bars of its own while it converts a file; ours are the only ones wanted."""
    import datasets

    enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bar()


Render = Callable[[Mapping[str, Any], str], tuple[str, bool, int]]
"""(a row, where it is) -> (its text, whether a chat template wrote it and hence its special tokens too, the character
at which the answer begins; 0 where all of it counts)."""


def renderer(
    text: str | None,
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    dataset: str,
    completion: str | None = None,
) -> Render:
    """How rows become text: a column, a template over columns, or the chat template over `messages`.

    Args:
        text, columns, tokenizer, dataset: the recipe's key, and what it is about.
        completion: column or template of the answer, which follows the text at once. In a chat it is the last message.

    Raises:
        DataError: the column or a template's field does not exist, the template is malformed, or none applies.
    """
    if completion is not None:
        before = renderer(text, columns, tokenizer, dataset)
        after = renderer(completion, columns, tokenizer, dataset)
        is_chat = "messages" in (text, completion) or (text is None and "messages" in columns)
        if is_chat:
            raise DataError(
                f"dataset {show(dataset)} has `messages`, and the last is the answer: drop `completion`, or set `text`"
            )

        def both(row: Mapping[str, Any], where: str) -> tuple[str, bool, int]:
            prompt = before(row, where)[0]
            return prompt + after(row, where)[0], False, len(prompt)

        return both
    if text is None:
        if "messages" in columns:
            return _chat_renderer("messages", tokenizer)
        if "text" in columns:
            return _column_renderer("text")
        raise DataError(
            f"dataset {show(dataset)} has no `messages` and no `text` column: set `text` to a column or a template "
            f"over {listing(columns)}"
        )
    if text in columns:
        return _chat_renderer(text, tokenizer) if text == "messages" else _column_renderer(text)
    if "{" not in text:
        raise DataError(f"dataset {show(dataset)} has no column {show(text)!r}; it has {listing(columns)}")
    return _template_renderer(text, columns, dataset)


def _column_renderer(column: str) -> Render:
    return lambda row, where: (_as_text(row[column], column, where), False, 0)


def _template_renderer(template: str, columns: Sequence[str], dataset: str) -> Render:
    """Only plain column names: a recipe may come from a stranger, and `{a.b}` or `{a[0]}` would reach into objects."""
    parts: list[tuple[str, str | None]] = []
    try:
        for literal, field, spec, conversion in string.Formatter().parse(template):
            if spec or conversion:
                raise ValueError("formats (`:`) and conversions (`!`) are not supported")
            parts.append((literal, field))
    except ValueError as error:
        raise DataError(f"`text` is no template ({error}): {show(template)!r}; write {{{{ for a brace") from error
    for _, field in parts:
        if field is not None and field not in columns:
            raise DataError(f"`text` names {show(field)!r}, but {show(dataset)} has the columns {listing(columns)}")

    def render(row: Mapping[str, Any], where: str) -> tuple[str, bool, int]:
        pieces = [
            literal + (_as_text(row[field], field, where) if field is not None else "") for literal, field in parts
        ]
        return "".join(pieces), False, 0

    return render


def _chat_renderer(column: str, tokenizer: PreTrainedTokenizerBase) -> Render:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"the base model's tokenizer has no chat template for the column `{column}`: "
            "choose another column or a template with `text`"
        )

    def render(row: Mapping[str, Any], where: str) -> tuple[str, bool, int]:
        messages = row[column]
        if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
            raise DataError(f"the chat template refuses {where}: `{column}` is no list of messages; mend the row")
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # whatever Jinja, or the template's own raise_exception, says
            raise DataError(f"the chat template refuses {where}: {show(error)}; mend the row") from error
        return text, True, _answer_in_chat(messages, text, tokenizer)

    return render


def _answer_in_chat(messages: Sequence[Mapping[str, Any]], text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The character at which the assistant's last message begins; 0 where there is none, or the template hides it."""
    if len(messages) < 2 or messages[-1].get("role") != "assistant":
        return 0
    try:
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    except Exception:  # a template that refuses such a beginning: the whole row counts
        return 0
    return len(prompt) if text.startswith(prompt) else 0


def _as_text(value: object, column: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        kind = "missing" if value is None else type(value).__name__
        raise DataError(f"column {show(column)!r} in {where} is {kind}, not text: choose another `text`")
    return str(value)


def encode(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int, *, add_special_tokens: bool) -> list[int]:
    """Token ids, at most `max_length`; a begin-of-sequence token that the text brings itself is not doubled."""
    ids = tokenizer(text, add_special_tokens=add_special_tokens, truncation=True, max_length=max_length + 1)[
        "input_ids"
    ]
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids[:max_length]


def completion_start(
    text: str, start: int, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool
) -> int:
    """The first token that holds a character of the answer; at least 1, and len(ids) where the answer was cut off.

    By characters: a header's line break and what follows it are one token in some tokenizers.

    Args:
        text: the whole row.
        start: the character at which its answer begins.
        ids: from `encode`.
        tokenizer, add_special_tokens: as there.
    """
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        places = [number for number, (_, stop) in enumerate(encoded["offset_mapping"]) if stop > start]
        first = places[0] if places else len(encoded["input_ids"])
        dropped = encoded["input_ids"][:2] == [tokenizer.bos_token_id] * 2  # as in `encode`
    else:  # no offsets: as many tokens as the two have in common
        prompt = tokenizer(text[:start], add_special_tokens=add_special_tokens)["input_ids"]
        whole = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        first = next((place for place, pair in enumerate(zip(prompt, whole)) if pair[0] != pair[1]), len(prompt))  # noqa: B905
        dropped = whole[:2] == [tokenizer.bos_token_id] * 2
    return min(max(1, first - dropped), len(ids))
