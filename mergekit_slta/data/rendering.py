"""Render rows of a dataset as text: from a column, a template over columns, or a chat template."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_slta.data.columns import nothing_found, refuse_messages
from mergekit_slta.data.formats import ROLES, BadRow, Chat, Pair, chat_of, find_format, holds_chat
from mergekit_slta.data.tokens import shared_end
from mergekit_slta.errors import DataError, SltaError, listing, show

if TYPE_CHECKING:
    from mergekit_slta.data.templates import ChatTemplate


class Rendered(NamedTuple):
    """A row as text.

    Attributes:
        text: the whole row.
        is_chat: whether a chat template wrote the text. It then has all special tokens; the tokenizer must add none.
        answer: index of the answer's first character; 0 if the whole row is the answer.
        is_known: whether it is known where the answer begins, or that there is no prompt.
        is_completion: whether the text ends with an answer that no chat template wrote, so that nothing ends it.
    """

    text: str
    is_chat: bool = False
    answer: int = 0
    is_known: bool = True
    is_completion: bool = False


def count_repeats(rendered: Sequence[Rendered]) -> int:
    """Number of texts whose prompt already ends with the answer, or whose answer begins with the prompt.

    Special tokens may follow either. An ending that all prompts share (`yes or no?`) is none of their answers, unless
    all have it.
    """
    pairs = [
        (_without_marks(row.text[: row.answer]).strip(), _without_marks(row.text[row.answer :]).strip())
        for row in rendered
        if row.answer and not row.is_chat
    ]
    shared = len(os.path.commonprefix([prompt[::-1] for prompt, _ in pairs]))  # noqa: RUF071
    answered = [bool(answer) and prompt.endswith(answer) for prompt, answer in pairs]
    if all(answered) and len(pairs) == len(rendered):
        return len(pairs)
    return sum(
        (ends and len(answer) > shared) or _begins_with(answer, prompt)
        for ends, (prompt, answer) in zip(answered, pairs, strict=True)
    )


def _begins_with(text: str, start: str) -> bool:
    """Whether a text begins with another one, and not in the middle of a word or number."""
    following = text[len(start) : len(start) + 1]
    return bool(start) and text.startswith(start) and not (start[-1].isalnum() and following.isalnum())


Render = Callable[[Mapping[str, Any], str], Rendered]
"""(row, its location for messages) -> the row as text. Raises DataError."""
Parts = list[tuple[str, str | None]]
"""A template as (text, the column that follows it)."""
_MARKS_AT_END = re.compile(r"(\s|<[^<>\s]{1,40}>|\[/?\w{1,20}\])+$")
"""White space and special tokens."""
_DOUBLED = re.compile(r"(?<!\{)\{\{\s*([^{}]+?)\s*\}\}(?!\})")
"""A name as Jinja would write it."""
_LONGEST_END = 200
"""Characters at the end of a text in which these are looked for."""


def renderer(
    text: str | None,
    columns: Sequence[str],
    template: ChatTemplate,
    dataset: str,
    completion: str | None = None,
    sample: Iterable[Mapping[str, Any]] = (),
) -> Render:
    """Make the function that renders a dataset's rows as text.

    Args:
        text: column or template. A column may hold messages, which the chat template renders. None: what
            `formats.FORMATS` finds in the rows.
        columns: the dataset's columns.
        template: renders chats.
        dataset: the dataset's name, for messages.
        completion: column or template of the answer, which is appended to the text. In a chat the last message is the
            answer.
        sample: rows to find the format in.

    Raises:
        DataError: the column or a template's field does not exist, a template is malformed, `text` already has what
            `completion` appends, or no `text` is given and nothing is found.
    """
    sample = list(sample)
    if completion is not None:
        return _with_completion(text, completion, columns, dataset, sample)
    if text is None:
        found = find_format(sample)
        if found is not None:
            return _found_renderer(found.parse, found.columns, template)
        if "text" not in columns:
            raise nothing_found(columns, dataset, sample)
        text = "text"  # its rows say what is wrong
    parts = _parts("text", text, columns, dataset)
    if text not in columns:
        refuse_messages("text", _fields(parts), dataset, sample)
    if text in columns:
        return _found_renderer(lambda row: chat_of(row, text) or Pair("", _fill(parts, row)), text, template)
    return _found_renderer(lambda row: Pair("", _fill(parts, row)), text, template)


def _with_completion(
    text: str | None, completion: str, columns: Sequence[str], dataset: str, sample: Sequence[Mapping[str, Any]]
) -> Render:
    found = find_format(sample) if text is None else None
    if found is None and text is None and "text" not in columns:
        raise DataError(
            f"dataset {show(dataset)} has no column `text` that `completion` could follow: set `text` to a column or "
            f"a template over {listing(columns)}",
            code="missing-column",
        )
    for column in (text or "text" if found is None else found.columns, completion):
        if column in columns and any(holds_chat(row, column) for row in sample):
            raise DataError(
                f"dataset {show(dataset)} has messages in `{column}`, and the last is the answer: drop `completion`, "
                "or set `text`",
                code="conflicting-keys",
            )
    prompt = _parts("text", text or "text", columns, dataset)
    answer = _parts("completion", completion, columns, dataset)
    refuse_messages("text", _fields(prompt), dataset, sample)
    refuse_messages("completion", _fields(answer), dataset, sample)
    fields = _fields(answer)
    after = prompt[-1][0] if prompt and prompt[-1][1] is None else ""
    ends = _fields(prompt)[-len(fields) :]
    if fields and ends == fields and not any(character.isalnum() for character in _without_marks(after)):
        raise repeated_answer(dataset)
    return _found_renderer(
        lambda row: Pair(_fill(prompt, row), _fill(answer, row)), completion, None, "`text` or `completion`"
    )


def _without_marks(text: str) -> str:
    return text[:-_LONGEST_END] + _MARKS_AT_END.sub("", text[-_LONGEST_END:])


def repeated_answer(dataset: str) -> DataError:
    """The error for prompts that already have the answer, and for answers that have the prompt."""
    return DataError(
        f"the prompts of {show(dataset)} end with their answer, or the answers begin with their prompt, so that it "
        "would be there twice: leave it out of `text`, of `completion` and of the columns that they name, or drop "
        "`completion`",
        code="conflicting-keys",
    )


def _parts(key: str, given: str, columns: Sequence[str], dataset: str) -> Parts:
    """A column, or a template whose fields are plain column names.

    `{a.b}` and `{a[0]}` are refused: they access attributes and items of objects, and recipes may come from strangers.
    """
    if given in columns:
        return [("", given)]
    parts: Parts = []
    try:
        for literal, field, spec, conversion in string.Formatter().parse(given):
            if spec or conversion:
                raise ValueError("formats (`:`) and conversions (`!`) are not supported")
            parts.append((literal, field))
    except ValueError as error:
        raise DataError(
            f"`{key}` is not a template ({error}): {show(given)!r}; write {{{{ for a brace", code="invalid-template"
        ) from error
    names = [field for _, field in parts if field is not None] or [given] * ("{" not in given)
    doubled = next((name for name in _DOUBLED.findall(given) if name in columns), None)
    if doubled is not None or not names:
        cause = "it names no column" if doubled is None else f"doubled braces are text, and {doubled} is a column"
        name = doubled or next(iter(_DOUBLED.findall(given)), None) or next(iter(columns), "column")
        raise DataError(
            f"`{key}` is not a template ({show(cause)}): {show(given)!r}; write {{{show(name)}}} for a column",
            code="invalid-template",
        )
    for name in names:
        if name not in columns:
            raise DataError(
                f"`{key}` names {show(name)!r}, but {show(dataset)} has the columns {listing(columns)}",
                code="missing-column",
            )
    return parts


def _fields(parts: Parts) -> list[str]:
    return [field for _, field in parts if field is not None]


def _fill(parts: Parts, row: Mapping[str, Any]) -> str:
    return "".join(literal + (_as_text(row, field) if field is not None else "") for literal, field in parts)


def _as_text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if isinstance(value, (str, int, float, Decimal, date)) and not isinstance(value, (bool, datetime)):
        if value == value:  # not NaN, which tables have where a number is missing
            return str(value)
        value = None
    kind = "missing" if value is None else type(value).__name__
    raise BadRow(f"has a column {show(column)!r} that is {kind}, not text")


def _found_renderer(
    parse: Callable[[Mapping[str, Any]], Chat | Pair | None],
    columns: str,
    template: ChatTemplate | None,
    keys: str = "`text`",
) -> Render:
    """Render what `parse` finds in a row. A row is unusable if it finds nothing there.

    Args:
        parse: reads a row.
        columns: the columns that it reads, for messages.
        template: renders chats; None if every row is a prompt with its completion.
        keys: the keys of the recipe that chose the columns, for messages.
    """
    as_blocks: list[bool] = []
    dropped: dict[object, list[int]] = {}

    def render(row: Mapping[str, Any], where: str) -> Rendered:
        try:
            found = parse(row)
            if found is None:
                raise BadRow(f"has no messages or text in `{columns}`")
            if isinstance(found, Chat) and template is not None and template.text:
                if not as_blocks:
                    as_blocks.append(_prints_blocks_only(template))
                return _render_chat(found, template, as_blocks[0], dropped)
            pair = found.plain if isinstance(found, Chat) else found
            if pair is None:
                raise DataError(
                    f"neither the expert's tokenizer nor the merged model's has a chat template for the column "
                    f"`{columns}`: set `chat_template`, or choose another column or a template with `text`",
                    code="missing-chat-template",
                )
            if pair.prompt and not pair.answer.strip():
                raise BadRow("has an empty answer")
            return Rendered(
                pair.prompt + pair.answer,
                answer=len(pair.prompt),
                is_known=pair.is_known,
                is_completion=bool(pair.prompt) or template is None,
            )
        except BadRow as error:
            raise DataError(f"{where} {error}: mend the row, or choose another {keys}", code="unusable-row") from error

    return render


def _as_blocks(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if content else message


def _render_chat(chat: Chat, template: ChatTemplate, as_blocks: bool, dropped: dict[object, list[int]]) -> Rendered:
    """Render a chat; `dropped` keeps what `_dropped` says of chats with the same roles."""
    written = template.text_for(chat.tools) or ""
    for number, message in enumerate(chat.messages):
        role = message["role"]
        if role not in ROLES.values() and not any(f"{quote}{role}{quote}" in written for quote in "'\""):
            raise BadRow(f"has a message {number} from {show(role, 40)!r}: known are {listing(ROLES, 30)}")
    messages = [_as_blocks(message) for message in chat.messages] if as_blocks else chat.messages
    tools = {} if chat.tools is None else {"tools": chat.tools}
    try:
        text = template.render(messages, **tools)
    except SltaError:  # the choice of the template, which is no matter of the row
        raise
    except Exception as error:  # Jinja and the template's own raise_exception raise different errors
        raise BadRow(f"is refused by the chat template ({show(error)})") from error
    for call in (call for message in messages for call in message.get("tool_calls") or ()):
        function = call.get("function", call)
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and name not in text:
            raise BadRow(f"calls the tool {show(name)!r}, which the chat template does not print")
    kind = bool(tools), *((message["role"], _has_text(message)) for message in messages)
    if kind not in dropped:
        dropped[kind] = _dropped(chat.messages, template, as_blocks, tools)
    for number in dropped[kind]:
        role = messages[number]["role"]
        raise BadRow(f"has a message {number} from {role!r}, whose content the chat template does not print")
    first = chat.answer
    if first is None and len(messages) > 1 and messages[-1]["role"] == "assistant":
        first = len(messages) - 1
    shared = ""
    for begun in (True, False) if first else ():  # some begin an answer otherwise than they write it
        try:
            prompt = template.render(messages[:first], add_generation_prompt=begun, **tools)
        except Exception:  # a template may refuse a chat that ends there
            continue
        if text.startswith(prompt):
            return Rendered(text, is_chat=True, answer=max(len(prompt), shared_end(shared, template.tokenizer)))
        shared = os.path.commonprefix([text, prompt])  # noqa: RUF071
    return Rendered(text, is_chat=True, is_known=False)


def _has_text(message: Mapping[str, Any]) -> bool:
    """Whether a message must be seen in the text: not a system prompt, nor the remark beside a call of a tool."""
    return bool(message.get("content")) and not message.get("tool_calls") and message["role"] != "system"


def _dropped(
    messages: Sequence[dict[str, Any]], template: ChatTemplate, as_blocks: bool, tools: Mapping[str, Any]
) -> list[int]:
    """Indices of the messages whose content a template does not print.

    Probes stand for the contents: a template may trim a content, escape it, or leave out the thoughts in it.
    """
    probes = {number: f"probe {number} of it" for number, message in enumerate(messages) if _has_text(message)}
    tried = [
        {**message, "content": probes[number]} if number in probes else message
        for number, message in enumerate(messages)
    ]
    try:
        text = template.render([_as_blocks(message) for message in tried] if as_blocks else tried, **tools)
    except Exception:  # it refuses such a content, and has printed the real one
        return []
    return [number for number, probe in probes.items() if probe.lower() not in text.lower()]


def _prints_blocks_only(template: ChatTemplate) -> bool:
    """Whether a template prints a list of text blocks, and nothing of a content that is a text."""
    probe = "a question to try the template"

    def prints(content: object) -> bool:
        try:
            return probe in template.render([{"role": "user", "content": content}])
        except Exception:  # what it refuses is said of the rows
            return False

    return not prints(probe) and prints([{"type": "text", "text": probe}])
