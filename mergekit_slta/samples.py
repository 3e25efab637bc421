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
from mergekit_slta.recipe import Settings, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

LOG = logging.getLogger(__name__)
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
MIN_TOKENS = 2
"""A row with fewer tokens shows a submodule at most its begin-of-sequence token, and is refused."""


@dataclass(frozen=True)
class Row:
    """One calibration row: its number in the dataset, the rendered text and the token ids (after the cut)."""

    number: int
    text: str
    ids: tuple[int, ...]


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

    @property
    def sha256(self) -> str:
        """Hash over the rendered texts and the token ids, hence over the data, the template and the tokenizer."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps([row.text, row.ids], ensure_ascii=False).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def draw_rows(task: Task, name: str, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> TaskRows:
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
    render = renderer(task.text, dataset.column_names, tokenizer, task.dataset)
    if len(dataset) < settings.num_samples:
        LOG.warning(
            "%s has %d rows, fewer than num_samples = %d: using all", show(task.dataset), len(dataset),
            settings.num_samples,
        )  # fmt: skip
    rows = []
    for number in sample_numbers(len(dataset), settings.num_samples, settings.seed):
        where = f"row {number} of {show(task.dataset)}"
        text, is_chat = render(dataset[number], where)
        ids = encode(text, tokenizer, settings.max_seq_length, add_special_tokens=not is_chat)
        if not text.strip() or len(ids) < MIN_TOKENS:
            raise DataError(
                f"{where} is {'empty' if not text.strip() else 'too short'} ({len(ids)} tokens, {MIN_TOKENS} needed): "
                "remove such rows or choose another `text`"
            )
        rows.append(Row(number, text, tuple(ids)))
    return TaskRows(name, task.dataset, tuple(rows))


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


Render = Callable[[Mapping[str, Any], str], tuple[str, bool]]
"""(a row, where it is) -> (its text, whether a chat template wrote it and hence its special tokens too)."""


def renderer(text: str | None, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, dataset: str) -> Render:
    """How rows become text: a column, a template over columns, or the chat template over `messages`.

    Raises:
        DataError: the column or a template's field does not exist, the template is malformed, or none applies.
    """
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
    return lambda row, where: (_as_text(row[column], column, where), False)


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

    def render(row: Mapping[str, Any], where: str) -> tuple[str, bool]:
        pieces = [
            literal + (_as_text(row[field], field, where) if field is not None else "") for literal, field in parts
        ]
        return "".join(pieces), False

    return render


def _chat_renderer(column: str, tokenizer: PreTrainedTokenizerBase) -> Render:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"the base model's tokenizer has no chat template for the column `{column}`: "
            "choose another column or a template with `text`"
        )

    def render(row: Mapping[str, Any], where: str) -> tuple[str, bool]:
        try:
            return tokenizer.apply_chat_template(row[column], tokenize=False), True
        except Exception as error:  # whatever Jinja, or the template's own raise_exception, says
            raise DataError(f"the chat template refuses {where}: {show(error)}; mend the row") from error

    return render


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
