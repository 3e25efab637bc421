"""Render rows of a dataset as text: from a column, a template over columns, or a chat template."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_slta.errors import DataError, listing, show

if TYPE_CHECKING:
    from mergekit_slta.data.templates import ChatTemplate


class Rendered(NamedTuple):
    """A row as text.

    Attributes:
        text: the whole row.
        is_chat: whether a chat template wrote the text. It then has all special tokens; the tokenizer must add none.
        answer: index of the answer's first character; 0 if the whole row is the answer.
    """

    text: str
    is_chat: bool = False
    answer: int = 0


Render = Callable[[Mapping[str, Any], str], Rendered]
"""(row, its location for messages) -> the row as text."""


def renderer(
    text: str | None,
    columns: Sequence[str],
    template: ChatTemplate,
    dataset: str,
    completion: str | None = None,
) -> Render:
    """Make the function that renders a dataset's rows as text.

    Args:
        text: column or template. None uses the chat template with the column `messages`, else the column `text`.
        columns: the dataset's columns.
        template: renders chats.
        dataset: the dataset's name, for messages.
        completion: column or template of the answer, which is appended to the text. In a chat the last message is the
            answer.

    Raises:
        DataError: the column or a template's field does not exist, the template is malformed, or no `text` is given and
            neither default column exists.
    """
    if completion is not None:
        return _with_completion(text, completion, columns, template, dataset)
    if text is None:
        if "messages" in columns:
            return _chat_renderer("messages", template)
        if "text" in columns:
            return _column_renderer("text")
        raise DataError(
            f"dataset {show(dataset)} has no `messages` and no `text` column: set `text` to a column or a template "
            f"over {listing(columns)}",
            code="missing-column",
        )
    if text in columns:
        return _chat_renderer(text, template) if text == "messages" else _column_renderer(text)
    if "{" not in text:
        raise DataError(
            f"dataset {show(dataset)} has no column {show(text)!r}; it has {listing(columns)}", code="missing-column"
        )
    return _template_renderer(text, columns, dataset)


def _with_completion(
    text: str | None, completion: str, columns: Sequence[str], template: ChatTemplate, dataset: str
) -> Render:
    prompt = renderer(text, columns, template, dataset)
    answer = renderer(completion, columns, template, dataset)
    if "messages" in (text, completion) or (text is None and "messages" in columns):
        raise DataError(
            f"dataset {show(dataset)} has `messages`, and the last is the answer: drop `completion`, or set `text`",
            code="conflicting-keys",
        )

    def render(row: Mapping[str, Any], where: str) -> Rendered:
        before = prompt(row, where).text
        return Rendered(before + answer(row, where).text, answer=len(before))

    return render


def _column_renderer(column: str) -> Render:
    return lambda row, where: Rendered(_as_text(row[column], column, where))


def _template_renderer(template: str, columns: Sequence[str], dataset: str) -> Render:
    """Render a template whose fields are plain column names.

    `{a.b}` and `{a[0]}` are refused: they access attributes and items of objects, and recipes may come from strangers.
    """
    parts: list[tuple[str, str | None]] = []
    try:
        for literal, field, spec, conversion in string.Formatter().parse(template):
            if spec or conversion:
                raise ValueError("formats (`:`) and conversions (`!`) are not supported")
            parts.append((literal, field))
    except ValueError as error:
        raise DataError(
            f"`text` is not a template ({error}): {show(template)!r}; write {{{{ for a brace", code="invalid-template"
        ) from error
    for _, field in parts:
        if field is not None and field not in columns:
            raise DataError(
                f"`text` names {show(field)!r}, but {show(dataset)} has the columns {listing(columns)}",
                code="missing-column",
            )

    def render(row: Mapping[str, Any], where: str) -> Rendered:
        return Rendered(
            "".join(
                literal + (_as_text(row[field], field, where) if field is not None else "") for literal, field in parts
            )
        )

    return render


def _chat_renderer(column: str, template: ChatTemplate) -> Render:
    if not template.text:
        raise DataError(
            f"the base model's tokenizer has no chat template for the column `{column}`: "
            "choose another column or a template with `text`",
            code="missing-chat-template",
        )

    def render(row: Mapping[str, Any], where: str) -> Rendered:
        messages = row[column]
        if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
            raise DataError(
                f"the chat template refuses {where}: `{column}` is not a list of messages; mend the row",
                code="unusable-row",
            )
        try:
            text = template.render(messages)
        except Exception as error:  # Jinja and the template's own raise_exception raise different errors
            raise DataError(
                f"the chat template refuses {where}: {show(error)}; mend the row", code="unusable-row"
            ) from error
        return Rendered(text, is_chat=True, answer=_answer_in_chat(messages, text, template))

    return render


def _answer_in_chat(messages: Sequence[Mapping[str, Any]], text: str, template: ChatTemplate) -> int:
    """Index of the first character of the assistant's last message.

    0 if the last message is not the assistant's, or if the text without that message is not a prefix of the whole text.
    """
    if len(messages) < 2 or messages[-1].get("role") != "assistant":
        return 0
    try:
        prompt = template.render(messages[:-1], add_generation_prompt=True)
    except Exception:  # a template may refuse a chat that ends there
        return 0
    return len(prompt) if text.startswith(prompt) else 0


def _as_text(value: object, column: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        kind = "missing" if value is None else type(value).__name__
        raise DataError(
            f"column {show(column)!r} in {where} is {kind}, not text: choose another `text`", code="unusable-row"
        )
    return str(value)
