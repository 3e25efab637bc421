"""Draw calibration rows from a task's dataset, render and tokenize them.

Scope: datasets; no models. The paper says only "30 samples per task" and "FastChat template". The rules here: rows are
drawn without replacement, with a local generator; a row that cannot be used is replaced by the next one; the first n
rows are the same for every `num_samples` >= n; a row is cut to its first `max_seq_length` tokens; the tokenizer adds
its usual special tokens to texts, and none to chats, whose template writes them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

import torch

from mergekit_slta.data.loading import Rows, load_rows
from mergekit_slta.data.rendering import Rendered, count_repeats, renderer, repeated_answer
from mergekit_slta.data.tokens import encode
from mergekit_slta.errors import DataError, show
from mergekit_slta.recipe.settings import Settings, TaskSettings

if TYPE_CHECKING:
    from mergekit_slta.data.templates import ChatTemplate

LOG = logging.getLogger(__name__)
MIN_TOKENS = 2
"""Rows with fewer tokens are skipped: a single token may be the begin-of-sequence token, the same in every row."""
MAX_UNUSABLE = 500
"""After so many rows in a row that cannot be used, no more are tried."""
_SAMPLE = 20
"""Rows that are looked at for what the columns hold."""


@dataclass(frozen=True)
class Row:
    """One calibration row.

    Attributes:
        number: the row's number in the dataset.
        text: the rendered text.
        ids: token ids, cut to `max_seq_length`.
        completion: position of the answer's first token; losses are taken over the answer. 1 if the whole row is the
            answer, because the first token of a row has no loss.
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
        task: index of the task's expert in canonical order.
    """

    row: Row
    task: int


@dataclass(frozen=True)
class TaskRows:
    """The rows of one task, in the order in which they were drawn.

    Attributes:
        name: the expert's name.
        dataset: the dataset's name in the recipe.
        rows: the rows.
        chat_template: origin of the template that rendered them (see `Template`); None if none of them is a chat.
        day: the date that the template may have written into them; None if it does not read it.
    """

    name: str
    dataset: str
    rows: tuple[Row, ...]
    chat_template: str | None = None
    day: date | None = None

    @property
    def num_tokens(self) -> int:
        """Total number of tokens."""
        return sum(len(row.ids) for row in self.rows)

    def part(self, number: int, parts: int) -> tuple[Row, ...]:
        """Divide the rows into `parts` consecutive parts of equal size; return part `number`, from 0."""
        count = len(self.rows)
        return self.rows[count * number // parts : count * (number + 1) // parts]

    @property
    def sha256(self) -> str:
        """Hash of the texts, the tokens and where the answers begin. It changes with the data, the template and the
        tokenizer."""
        digest = hashlib.sha256()
        for row in self.rows:
            content = [row.text, row.ids, *([row.completion] if row.completion > 1 else [])]
            digest.update(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def draw_rows(task: TaskSettings, name: str, settings: Settings, template: ChatTemplate) -> TaskRows:
    """Load a task's dataset, draw its rows, and tokenize them.

    Args:
        task: the dataset, and how to render a row as text.
        name: the expert's name, for messages.
        settings: number of rows, tokens per row, and seed.
        template: renders chats; its tokenizer is the merged model's.

    Raises:
        DataError: no dataset, file, split, column or template field; or too few rows that can be used.
    """
    if task.dataset is None:
        raise missing_dataset(name)
    dataset = load_rows(task.dataset, task.dataset_config, task.split)
    numbers = list(itertools.islice(sample_numbers(len(dataset), settings.seed), _SAMPLE))
    sample = [row for number in numbers if (row := _readable(dataset, number)) is not None]
    render = renderer(task.text, dataset.columns, template, task.dataset, task.completion, sample)
    groups = settings.own.row_groups
    wanted = settings.num_samples * groups
    rows, rendered, skipped = [], [], []
    in_a_row = 0
    for number in sample_numbers(len(dataset), settings.seed):
        if len(rows) == wanted:
            break
        where = f"row {number} of {show(task.dataset)}"
        try:
            written = render(dataset[number], where)
            row = _tokenize(number, written, where, settings.max_seq_length, task.completion_eos, template)
        except DataError as error:
            if error.code != "unusable-row":
                raise
            skipped.append(error)
            in_a_row += 1
            if in_a_row == MAX_UNUSABLE:
                break
            continue
        in_a_row = 0
        rows.append(row)
        rendered.append(written)
    _check_number(task.dataset, len(rows), settings.num_samples, groups, skipped, in_a_row)
    repeats = count_repeats(rendered) if len(rows) > 1 else 0
    if 2 * repeats > len(rows):
        raise repeated_answer(task.dataset)
    if repeats:
        LOG.warning(
            "%d of %d prompts of %s end with their answer, or the answer begins with its prompt, so that it is there "
            "twice: look at these rows", repeats, len(rows), show(task.dataset),
        )  # fmt: skip
    _check_ends(task, name, sum(written.is_completion for written in rendered), template)
    unmarked = sum(not written.is_known for written in rendered)
    if len(rows) > 1 and len({row.ids for row in rows}) == 1:
        LOG.warning(
            "all %d rows of %s are the same %d tokens: raise `max_seq_length` if they are cut, or choose another "
            "`text`", len(rows), show(task.dataset), len(rows[0].ids),
        )  # fmt: skip
    if settings.own.needs_answers:
        _check_answers(task.dataset, rows, unmarked)
    used = template.used if any(written.is_chat for written in rendered) else None
    return TaskRows(
        name, task.dataset, tuple(rows), used.origin if used else None, template.written_day if used else None
    )


def _readable(dataset: Rows, number: int) -> Mapping[str, Any] | None:
    """A row, or None if it cannot be read."""
    try:
        return dataset[number]
    except DataError:
        return None


def _tokenize(
    number: int, written: Rendered, where: str, max_length: int, completion_eos: bool, template: ChatTemplate
) -> Row:
    """Tokenize a row.

    Raises:
        DataError: it is empty or too short, or holds what no text has.
    """
    text = written.text
    if "\0" in text:
        raise DataError(f"{where} has NUL characters: is its file UTF-16? save it as UTF-8", code="unusable-row")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where} has half a surrogate pair, which is no character: mend the row", code="unusable-row")
    ids, first = encode(
        text, template.tokenizer, max_length, add_special_tokens=not written.is_chat, answer=written.answer,
        completion_eos=completion_eos if written.is_completion else None,
    )  # fmt: skip
    if not text.strip() or len(ids) < MIN_TOKENS:
        raise DataError(
            f"{where} is {'empty' if not text.strip() else 'too short'} ({len(ids)} tokens, {MIN_TOKENS} needed): "
            "remove such rows or choose another `text`",
            code="unusable-row",
        )
    return Row(number, text, ids, first)


def missing_dataset(name: str) -> DataError:
    """The error for an expert that needs rows and names no `dataset`."""
    return DataError(
        f"{show(name)} has no `dataset`: name its calibration rows, or an existing file with `alphas`",
        code="missing-dataset",
    )


def _check_number(
    dataset: str, available: int, num_samples: int, groups: int, skipped: Sequence[DataError], in_a_row: int
) -> None:
    """Warn of rows that were skipped, and of fewer than `num_samples` rows for each of `groups` steps.

    Args:
        dataset: the dataset's name.
        available: number of rows that were found, at most those that were asked for.
        num_samples, groups: rows for each of so many groups were asked for.
        skipped: the reasons of the rows that cannot be used, in the order in which they were drawn.
        in_a_row: number of such rows since the last good one.

    Raises:
        DataError: no row can be used, there are fewer rows than steps, or `MAX_UNUSABLE` bad ones in a row.
    """
    if skipped and (not available or in_a_row == MAX_UNUSABLE):
        which = f"{in_a_row} rows in a row" if in_a_row == MAX_UNUSABLE else f"all {in_a_row} rows"
        before = f"{which} of {show(dataset)} cannot be used; the first: " if in_a_row > 1 else ""
        raise DataError(before + skipped[0].message, code="unusable-row")
    if available < groups:
        reason = f" ({len(skipped)} more cannot be used; {skipped[0].message})" if skipped else ""
        raise DataError(
            f"{show(dataset)} has {available} rows for {groups} steps with rows of their own{reason}: "
            "add rows, lower `steps`, or set `fresh_rows: false`",
            code="too-few-rows",
        )
    if skipped:
        LOG.warning(
            "%d of the %d rows that were drawn from %s cannot be used, others take their place; the first: %s",
            len(skipped), len(skipped) + available, show(dataset), skipped[0].message,
        )  # fmt: skip
    if available < num_samples * groups:
        LOG.warning(
            "%s has %d rows, fewer than num_samples = %d%s", show(dataset), available, num_samples,
            ": using all" if groups == 1 else f" for each of {groups} steps, {num_samples * groups} in all: using all, "
            f"about {available // groups} at a step; add rows, lower `steps`, or set `fresh_rows: false`",
        )  # fmt: skip


def _check_ends(task: TaskSettings, name: str, completions: int, template: ChatTemplate) -> None:
    """Warn where `completion_eos` has no effect.

    Args:
        task: the task's keys.
        name: the expert's name.
        completions: number of rows that end with an answer that no chat template wrote.
        template: its tokenizer is the merged model's.
    """
    if completions and task.completion_eos and template.tokenizer.eos_token_id is None:
        LOG.warning(
            "the merged model's tokenizer has no end token (`eos_token`): none follows the answers of %s, and the "
            "merged model may not stop after them", show(name),
        )  # fmt: skip
    elif not completions and "completion_eos" in task.model_fields_set:
        LOG.warning(
            "`completion_eos` of %s has no effect: its rows are %s", show(name),
            "chats, whose template ends the answers" if template.used else "whole texts, without `completion`",
        )  # fmt: skip


def _check_answers(dataset: str, rows: Sequence[Row], unmarked: int) -> None:
    """Warn of rows without an answer, which have no loss.

    Args:
        dataset: the dataset's name.
        rows: the rows.
        unmarked: number of rows in which no answer was found. Their loss is taken over the whole row.

    Raises:
        DataError: no row has an answer.
    """
    cut = sum(row.completion >= len(row.ids) for row in rows)
    if cut == len(rows):
        raise DataError(
            f"all {cut} rows of {show(dataset)} end before their answer begins: raise `max_seq_length`, or choose "
            "shorter rows",
            code="no-answers",
        )
    if cut:
        LOG.warning(
            "%d of %d rows of %s end before their answer begins, and are of no use: raise `max_seq_length`",
            cut, len(rows), show(dataset),
        )  # fmt: skip
    if unmarked:
        LOG.warning(
            "%d of %d rows of %s do not end with an assistant's answer that can be told from the prompt: the loss is "
            "taken over the whole row there", unmarked, len(rows), show(dataset),
        )  # fmt: skip


def sample_numbers(num_rows: int, seed: int) -> Iterator[int]:
    """Draw row numbers without replacement.

    Uses a local generator, not the global random state.
    """
    generator = torch.Generator().manual_seed(seed)
    yield from map(int, torch.randperm(num_rows, generator=generator, device="cpu").numpy())
