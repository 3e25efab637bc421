"""Guess the keys `text` and `completion` for a dataset whose columns are not of a known format, or say what is missing.

Scope: names and values of columns. `formats.FORMATS` lists what needs no keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from mergekit_slta.data.formats import FORMATS, find_format, holds_chat
from mergekit_slta.errors import DataError, listing, show

QUESTIONS = ("question", "prompt", "problem", "instruction", "query", "input", "source")
ANSWERS = ("answer", "completion", "response", "output", "solution", "target", "label")
"""Usual names of columns with a question and with its answer, the ones to take first."""
_TEXTS = ("content", "code")
"""Usual names of a column with a whole text, beside `text` itself."""
_PARTS = ("context", "passage", "choices", "options", "premise", "hypothesis")
"""Columns that belong into a prompt, nobody knows where."""


class Keys(NamedTuple):
    """The keys for a dataset.

    Attributes:
        held: the columns that are used, for people.
        text, completion: values of the keys; None if the key is not needed.
    """

    held: str
    text: str | None = None
    completion: str | None = None

    @property
    def is_guess(self) -> bool:
        """Whether the way in which prompt and answer are joined is a guess."""
        return self.completion is not None


def guess_keys(sample: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Keys | None:
    """Find out what the columns of a dataset hold.

    Args:
        sample: some of its rows.
        columns: its columns.

    Returns:
        No keys for a known format. For a question and its answer, `text` and `completion`. For one column of texts,
        `text`. None if the columns hold none of these.
    """
    known = find_format(sample)
    if known is not None:
        return Keys(known.columns)
    if _named(_PARTS, columns):
        return None
    texts = [column for column in columns if _holds(sample, column, str) and not set(column) & set("{}!:.[]")]
    question = next((name for name in _named(QUESTIONS, columns) if name in texts), None)
    answers = [name for name in _named(ANSWERS, columns) if _holds(sample, name, str | int | float | Decimal)]
    answer = next((name for name in answers if name != question), None)
    if question is not None and answer is not None:
        ends = "\n" if _are_sentences([str(row.get(question)) for row in sample]) else " "
        return Keys(f"{question} with {answer}", f"{{{question}}}{ends}", f"{{{answer}}}")
    lone = texts[0] if len(texts) == 1 and not _named((*QUESTIONS, *ANSWERS), columns) else None
    whole = next((name for name in _named(_TEXTS, columns) if name in texts), lone)
    return None if whole is None else Keys(whole, whole)


def nothing_found(columns: Sequence[str], dataset: str, sample: Sequence[Mapping[str, Any]]) -> DataError:
    """The error for columns that need `text`, with the keys that `init` would write, if it knows some."""
    keys = guess_keys(sample, columns)
    if keys is None:
        known = listing((known.columns for known in FORMATS), 20)
        hint = f"({known}): set `text` to a column or a template"
    elif keys.completion is None:
        hint = f": set `text` to a column, for example `text: {show(keys.text)}`, as `mergekit-slta init` writes"
    else:
        text, completion = (json.dumps(key, ensure_ascii=False) for key in (keys.text, keys.completion))
        hint = (
            f": set `text` and `completion`, for example `text: {show(text)}` and `completion: {show(completion)}`, as "
            "`mergekit-slta init` writes"
        )
    return DataError(
        f"the columns of {show(dataset)}, {listing(columns)}, hold none of what is found without `text`"
        f"{' ' * hint.startswith('(')}{hint}",
        code="missing-column",
    )


def refuse_messages(key: str, fields: Sequence[str], dataset: str, sample: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a template that would print the messages of a chat as a list.

    Args:
        key: `text` or `completion`.
        fields: the columns that the template names.
        dataset: the dataset's name.
        sample: some of its rows.

    Raises:
        DataError: a column of them holds messages, not as text.
    """
    for field in fields:
        if any(not isinstance(row.get(field), str) and holds_chat(row, field) for row in sample):
            raise DataError(
                f"`{key}` is a template over {show(field)!r} of {show(dataset)}, which holds messages: write "
                f"`text: {show(field)}`, without braces" + ", and drop `completion`" * (key == "completion"),
                code="invalid-template",
            )


def _named(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """The columns with one of some names, in the order of the names, whatever their capitals."""
    return [column for name in names for column in columns if column.lower() == name]


def _holds(sample: Sequence[Mapping[str, Any]], column: str, kind: Any) -> bool:
    """Whether a column holds values of a type in nine rows of ten."""
    values = [row.get(column) for row in sample]
    fitting = sum(isinstance(value, kind) and not isinstance(value, bool) for value in values)
    return bool(values) and 10 * fitting >= 9 * len(values)


def _are_sentences(texts: Sequence[str]) -> bool:
    """Whether most texts end a sentence or have several lines, so that an answer begins on a line of its own."""
    return 2 * sum("\n" in text.strip() or text.rstrip()[-1:] in (".", "?", "!") for text in texts) > len(texts)
