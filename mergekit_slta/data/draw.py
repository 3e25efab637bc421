"""Draw calibration rows from a task's dataset, render and tokenize them.

Scope: datasets; no models. The paper says only "30 samples per task" and "FastChat template". The rules here: rows are
drawn without replacement, with a local generator; a row that cannot be used is replaced by the next one; the first n
rows are the same for every `num_samples` >= n; a row is cut to its first `max_seq_length` tokens; the tokenizer adds
its usual special tokens to texts, and none to chats, whose template writes them; rows that are held out are never
drawn, nor are rows with the same tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mergekit_slta.data.loading import Rows, load_rows
from mergekit_slta.data.rendering import Rendered, count_repeats, renderer, repeated_answer
from mergekit_slta.data.rows import Row, TaskRows, permutation
from mergekit_slta.data.tokens import encode
from mergekit_slta.errors import DataError, show
from mergekit_slta.recipe.settings import SELF, Settings, TaskSettings

if TYPE_CHECKING:
    from mergekit_slta.data.templates import ChatTemplate

LOG = logging.getLogger(__name__)
MIN_TOKENS = 2
"""Rows with fewer tokens are skipped: a single token may be the begin-of-sequence token, the same in every row."""
MAX_UNUSABLE = 500
"""After so many rows in a row that cannot be used, no more are tried."""
HELD_OUT_SHARE, MIN_HELD_OUT, MAX_HELD_OUT = 5, 3, 30
"""One row in five is held out, at most 30; none if these are fewer than 3, because so few say little."""
_SAMPLE = 20
"""Rows that are looked at for what the columns hold."""


class RowSource:
    """A task's dataset, opened: draws its rows, and tokenizes them.

    Args:
        task: the dataset, and how to render a row as text.
        name: the expert's name, for messages.
        settings: number of rows, tokens per row, and seed.
        template: renders chats; its tokenizer is the merged model's.

    Raises:
        DataError: no dataset, file, split, column or template field.
    """

    def __init__(self, task: TaskSettings, name: str, settings: Settings, template: ChatTemplate) -> None:
        if task.dataset is None:
            raise missing_dataset(name, can_write=settings.own.needs_rows)
        self._task, self._name, self._settings, self._template = task, name, settings, template
        self._dataset = task.dataset
        self._rows = load_rows(task.dataset, task.dataset_config, task.split)
        self._numbers = permutation(len(self._rows), settings.seed)
        first = map(int, self._numbers[:_SAMPLE])
        sample = [row for number in first if (row := _readable(self._rows, number)) is not None]
        self._render = renderer(task.text, self._rows.columns, template, task.dataset, task.completion, sample)

    def held_out(self) -> tuple[Row, ...]:
        """The rows that are never fitted: of the seeded permutation the last fifth, at most `MAX_HELD_OUT` rows.

        Rows before them take the place of rows that cannot be used or have no answer, from the second half of the
        permutation. Empty if the recipe evaluates nothing, or there are fewer than `MIN_HELD_OUT`.
        """
        found: list[Row] = []
        if not self._settings.evaluate:
            return ()
        wanted = min(MAX_HELD_OUT, len(self._numbers) // HELD_OUT_SHARE)
        last = self._numbers[: -(len(self._numbers) // 2) - 1 : -1]
        for number in map(int, last[: MAX_UNUSABLE + MAX_HELD_OUT]):
            if len(found) == wanted:
                break
            with suppress(DataError):
                row, _ = self._tokenized(number)
                if row.completion < len(row.ids):
                    found.append(row)
        return tuple(reversed(found)) if len(found) >= MIN_HELD_OUT else ()

    def draw(self, held_out: tuple[Row, ...], excluded: Collection[tuple[int, ...]]) -> TaskRows | None:
        """Draw the rows to fit; None if all rows that can be used are excluded.

        Args:
            held_out: the task's own held-out rows.
            excluded: token ids of the held-out rows of all tasks; a row with the same tokens is not drawn.

        Raises:
            DataError: no row can be used.
        """
        settings, dataset = self._settings, self._dataset
        wanted = settings.num_samples * settings.own.row_groups
        rows, rendered, skipped = [], [], []
        in_a_row = num_excluded = 0
        taken = {row.number for row in held_out}
        for number in map(int, self._numbers):
            if len(rows) == wanted:
                break
            if number in taken:
                continue
            try:
                row, written = self._tokenized(number)
            except DataError as error:
                if error.code != "unusable-row":
                    raise
                skipped.append(error)
                in_a_row += 1
                if in_a_row == MAX_UNUSABLE:
                    break
                continue
            in_a_row = 0
            if row.ids in excluded:
                num_excluded += 1
                continue
            rows.append(row)
            rendered.append(written)
        if not rows and excluded:
            return None
        _check_number(dataset, len(rows), settings.num_samples, len(held_out), num_excluded, skipped, in_a_row)
        repeats = count_repeats(rendered) if len(rows) > 1 else 0
        if 2 * repeats > len(rows):
            raise repeated_answer(dataset)
        if repeats:
            LOG.warning(
                "%d of %d prompts of %s end with their answer, or the answer begins with its prompt, so that it is "
                "there twice: look at these rows", repeats, len(rows), show(dataset),
            )  # fmt: skip
        _check_ends(self._task, self._name, sum(written.is_completion for written in rendered), self._template)
        if len(rows) > 1 and len({row.ids for row in rows}) == 1:
            LOG.warning(
                "all %d rows of %s are the same %d tokens: raise `max_seq_length` if they are cut, or choose another "
                "`text`", len(rows), show(dataset), len(rows[0].ids),
            )  # fmt: skip
        if settings.own.needs_answers:
            _check_answers(dataset, rows, sum(not written.is_known for written in rendered))
        used = self._template.used if any(written.is_chat for written in rendered) else None
        day = self._template.written_day if used else None
        return TaskRows(self._name, dataset, tuple(rows), held_out, used.origin if used else None, day)

    def _tokenized(self, number: int) -> tuple[Row, Rendered]:
        """A row and its text.

        Raises:
            DataError: the row cannot be used.
        """
        where = f"row {number} of {show(self._dataset)}"
        written = self._render(self._rows[number], where)
        return _tokenize(
            number, written, where, self._settings.max_seq_length, self._task.completion_eos, self._template
        ), written


def draw_rows(sources: Sequence[RowSource]) -> list[TaskRows]:
    """Draw the rows of all tasks. No task's rows to fit are among the held-out rows of any task.

    A task with no other row that can be used (all its rows hold the same tokens) holds none out. If they are among the
    held-out rows of other tasks, these do not hold them out, either.

    Raises:
        DataError: see `RowSource.draw`.
    """
    held_out = [source.held_out() for source in sources]

    def draw(places: Iterable[int]) -> dict[int, TaskRows | None]:
        excluded = frozenset(row.ids for rows in held_out for row in rows)
        return {place: sources[place].draw(held_out[place], excluded) for place in places}

    drawn = draw(range(len(sources)))
    few = [place for place, rows in drawn.items() if rows is None]
    for place in few:
        held_out[place] = ()
    drawn |= draw(few)
    for place in (place for place in few if drawn[place] is None):
        drawn[place] = own = sources[place].draw((), frozenset())
        needed = {row.ids for row in own.rows} if own is not None else set()
        for other, rows in enumerate(held_out):
            left = tuple(row for row in rows if row.ids not in needed)
            held_out[other] = left if len(left) >= MIN_HELD_OUT else ()
    drawn |= draw([place for place, rows in drawn.items() if rows is not None and rows.held_out != held_out[place]])
    return [rows for _, rows in sorted(drawn.items()) if rows is not None]


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
    encoded = encode(
        text, template.tokenizer, max_length, add_special_tokens=not written.is_chat, answer=written.answer,
        completion_eos=completion_eos if written.is_completion else None,
    )  # fmt: skip
    num_tokens = len(encoded.ids)
    if not text.strip() or num_tokens < MIN_TOKENS:
        raise DataError(
            f"{where} is {'empty' if not text.strip() else 'too short'} ({num_tokens} tokens, {MIN_TOKENS} needed): "
            "remove such rows or choose another `text`",
            code="unusable-row",
        )
    return Row(number, text, *encoded)


def missing_dataset(name: str, *, is_self_written: bool = False, can_write: bool = True) -> DataError:
    """The error for an expert that needs rows and names no `dataset`, or whose own rows are not written. `can_write`
    tells whether `dataset: self` is allowed."""
    if is_self_written:
        return DataError(
            f"{show(name)} has no `dataset` that is written yet: write its rows with `mergekit-slta rows`, and name "
            "the file as `dataset`",
            code="missing-dataset",
        )
    return DataError(
        f"{show(name)} has no `dataset`: name its calibration rows, or an existing file with `alphas`"
        + f"; with `dataset: {SELF}` it writes them itself" * can_write,
        code="missing-dataset",
    )


def _check_number(
    dataset: str, available: int, num_samples: int, held_out: int, excluded: int, skipped: Sequence[DataError],
    in_a_row: int,
) -> None:  # fmt: skip
    """Warn of rows that were skipped, and of fewer than `num_samples` rows.

    Args:
        dataset: the dataset's name.
        available: number of rows that were found, at most those that were asked for.
        num_samples: number of rows for a step.
        held_out: number of rows that are held out.
        excluded: number of rows that were left out because they have the tokens of a held-out row of any task.
        skipped: the reasons of the rows that cannot be used, in the order in which they were drawn.
        in_a_row: number of such rows since the last good one.

    Raises:
        DataError: no row can be used, or `MAX_UNUSABLE` bad ones in a row.
    """
    if skipped and (not available or in_a_row == MAX_UNUSABLE):
        which = f"{in_a_row} rows in a row" if in_a_row == MAX_UNUSABLE else f"all {in_a_row} rows"
        before = f"{which} of {show(dataset)} cannot be used; the first: " if in_a_row > 1 else ""
        raise DataError(before + skipped[0].message, code="unusable-row")
    if skipped:
        LOG.warning(
            "%d of the %d rows that were drawn from %s cannot be used, others take their place; the first: %s",
            len(skipped), len(skipped) + available, show(dataset), skipped[0].message,
        )  # fmt: skip
    if available < num_samples:
        LOG.warning(
            "%s has %d rows to fit, fewer than num_samples = %d: all are used%s%s", show(dataset), available,
            num_samples, f"; {held_out} others are held out to measure the merge" if held_out else "",
            f"; {excluded} have the tokens of held-out rows and are left out" if excluded else "",
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
