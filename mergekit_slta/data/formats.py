"""Find out what the columns of a dataset hold, and read chats and pairs of prompt and answer from them.

Scope: rows as mappings; no templates, no tokens. `FORMATS` is the table of what is found without `text`.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class BadRow(Exception):  # noqa: N818 (not an error of the user's: another row is drawn)
    """A row has the columns of a format, and something else in them. The message completes "row 3 ..."."""


class Pair(NamedTuple):
    """A prompt and its answer, which are joined as they are. Without a prompt the whole text counts.

    Attributes:
        prompt, answer: the texts.
        is_known: whether it is known where the answer begins, or that there is no prompt.
    """

    prompt: str
    answer: str
    is_known: bool = True


class Chat(NamedTuple):
    """A conversation.

    Attributes:
        messages: each has a `role` and a `content`, as chat templates expect.
        answer: index of the first message of the answer; None if the last one is the answer if it is the assistant's.
        plain: what the row is for a model without a chat template; None if it needs one.
        tools: descriptions of functions, for the chat template.
    """

    messages: list[dict[str, Any]]
    answer: int | None = None
    plain: Pair | None = None
    tools: list[dict[str, Any]] | None = None


Row = Mapping[str, Any]
Parse = Callable[[Row], "Chat | Pair | None"]
"""row -> what it holds; None if its columns are not of the format. Raises BadRow."""

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "ai": "assistant",
    "model": "assistant", "tool": "tool", "observation": "tool", "function_response": "tool", "function": "function",
    "ipython": "ipython", "environment": "environment",
}  # fmt: skip
"""Names of roles -> the names that chat templates know. A template may name others."""
CHAT_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""The prompt of Stanford Alpaca, for models without a chat template."""
_ALPACA_PAIRED = ", paired with an input that provides further context"
_TEXT_BLOCKS = ("text", "input_text", "output_text", None)
_LOOKS_LIKE_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")
_ANSWER_BEGINS = re.compile(
    r"^[#*\s]*(?:assistant|chatgpt|gpt|bot|ai|model|response|answer|a)[*\s]*:\**|\[/INST\]|<start_of_turn>model"
    r"|<\|?[\w|>]*assistant[\w|>]*(?:<\|end_header_id\|>)?",
    re.IGNORECASE | re.MULTILINE,
)
"""How an answer begins in dialogues that are texts."""
_QUESTIONS = ("question", "query", "instruction", "input")
"""Columns that make `chosen` alone less than the whole text."""


def raw_messages(value: Any) -> list[Any] | None:
    """The messages that a value holds, as they are; None if it holds none.

    A list of objects with a role, such a list as text (JSON, or as Python writes it to CSV), or columns of messages
    (`{"role": [...], "content": [...]}`, as `datasets` reads some).

    Raises:
        BadRow: it looks like messages, and cannot be read.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        parsed = _parse_text(value)
        if parsed is None and _LOOKS_LIKE_MESSAGES.match(value):
            raise BadRow("holds messages as text that is not valid JSON")
        value = parsed
    if isinstance(value, Mapping):
        if not any(isinstance(value.get(key), list) for key in ("role", "from")):
            return None
        lists = {key: column for key, column in value.items() if isinstance(column, list)}
        if len({len(column) for column in lists.values()}) > 1:
            raise BadRow("has lists of unequal length in place of messages")
        value = [dict(zip(lists, message, strict=True)) for message in zip(*lists.values(), strict=True)]
    if not isinstance(value, list) or not value or not all(isinstance(message, Mapping) for message in value):
        return None
    return value if any("role" in message or "from" in message for message in value) else None


def read_messages(raw: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Bring messages into the form that chat templates expect: `role`, `content` as text, and what else they have.

    ShareGPT's `from` and `value` are `role` and `content`. Text blocks are joined. Keys without a value, which tables
    add to every message, are left out.

    Raises:
        BadRow: a message has no role, no text, or a block that is not text.
    """
    return [_read_message(message, number) for number, message in enumerate(raw)]


def chat_of(row: Row, column: str) -> Chat | None:
    """The chat that a column holds, with the row's `system` prompt and `tools`; None if it holds no messages."""
    raw = raw_messages(row.get(column))
    return None if raw is None else _chat(row, read_messages(raw))


def holds_chat(row: Row, column: str) -> bool:
    """Whether a column holds messages, or what looks like messages and cannot be read."""
    try:
        return chat_of(row, column) is not None
    except BadRow:
        return True


class Format(NamedTuple):
    """A row of the table of formats.

    Attributes:
        columns: the columns, for messages.
        parse: reads a row.
    """

    columns: str
    parse: Parse


def find_format(rows: Iterable[Row]) -> Format | None:
    """The first format of the table that one of some rows has; None if there is none.

    If most of the rows repeat their `prompt` at the start of the answer, it is left out there.
    """
    sample = list(rows)
    for known in FORMATS:
        for row in sample:
            try:
                if known.parse(row) is not None:
                    return _with_prompts_once(known, sample)
            except BadRow:
                return known
    return None


def _with_prompts_once(found: Format, sample: Sequence[Row]) -> Format:
    answer = found.columns.split()[-1]
    pairs = [row for row in sample if _is_text(row.get("prompt")) and isinstance(row.get(answer), str)]
    if answer not in ("chosen", "completion", "response") or 2 * sum(
        row[answer].startswith(row["prompt"]) for row in pairs
    ) <= len(pairs):
        return found

    def parse(row: Row) -> Chat | Pair | None:
        prompt, text = row.get("prompt"), row.get(answer)
        if _is_text(prompt) and isinstance(text, str) and text.startswith(prompt):
            rest = text[len(prompt) :]
            row = {**row, answer: rest.lstrip() if answer == "response" else rest}
        return found.parse(row)

    return Format(found.columns, parse)


def _read_message(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    where = f"has a message {number} that"
    known = {key: _without_nulls(value) for key, value in message.items() if value is not None}
    name = known.pop("role", None)
    origin = known.pop("from", None)
    role = name if name is not None else origin
    if not isinstance(role, str):
        raise BadRow(f"{where} has no role")
    role = ROLES.get(role.strip().lower(), role)
    content = known.pop("content", None)
    value = known.pop("value", None)
    content = _as_text(content if content is not None else value, where)
    calls = _parsed(known.pop("tool_calls", None) or [])
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise BadRow(f"{where} has `tool_calls` that are not a list of objects")
    if content is None and not calls:
        raise BadRow(f"{where} has no content")
    if content is not None and not content.strip() and role in ("user", "assistant") and not calls:
        raise BadRow(f"{where} is empty")
    spelled = {"content": content} if content is not None or "content" in message or "value" in message else {}
    return {"role": role, **spelled, **({"tool_calls": calls} if calls else {}), **known}


def _as_text(content: Any, where: str) -> str | None:
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        if content is None or isinstance(content, str):
            return content
        raise BadRow(f"{where} is {type(content).__name__}, not text")
    texts = []
    for block in content:
        text = block.get("text") if isinstance(block, Mapping) else block
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind not in _TEXT_BLOCKS or not isinstance(text, str):
            raise BadRow(f"{where} holds a block of type {str(kind or type(block).__name__)[:40]!r}, not text")
        texts.append(text)
    return "".join(texts)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _parsed(value: Any) -> Any:
    """A value, parsed if it is JSON or Python in a text; None if it is another text."""
    return _parse_text(value) if isinstance(value, str) else value


def _parse_text(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _chat(row: Row, messages: list[dict[str, Any]], answer: int | None = None, plain: Pair | None = None) -> Chat:
    system = next((row[key] for key in ("system", "system_prompt") if _is_text(row.get(key))), None)
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
        answer = None if answer is None else answer + 1
        plain = None if plain is None else Pair(f"{system}\n\n{plain.prompt}", plain.answer)
    tools = _parsed(row.get("tools"))
    described = isinstance(tools, list) and bool(tools) and all(isinstance(tool, Mapping) for tool in tools)
    return Chat(messages, answer, plain, _without_nulls(tools) if described else None)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _chosen(row: Row) -> Chat | Pair | None:
    """TRL's preferences: the answer that was chosen, as a chat or as text, with or without a prompt."""
    prompt, chosen = row.get("prompt"), row.get("chosen")
    raw = raw_messages([chosen] if isinstance(chosen, Mapping) else chosen)
    if raw is None:
        if not isinstance(chosen, str) or (prompt is None and any(row.get(key) for key in _QUESTIONS)):
            return None
        return Pair(prompt, chosen) if isinstance(prompt, str) and prompt else _dialogue(chosen, row.get("rejected"))
    messages = read_messages(raw)
    if messages[0]["role"] == "assistant" and prompt is not None:
        return _pair(row, "prompt", "chosen", exact=True)
    return _chat(row, messages)


def _dialogue(chosen: str, rejected: Any) -> Pair:
    """A dialogue as a text. What `rejected` shares with it is the prompt, up to where the answer begins."""
    shared = os.path.commonprefix([chosen, rejected]) if isinstance(rejected, str) else ""  # noqa: RUF071
    turns = [turn.end() for turn in _ANSWER_BEGINS.finditer(shared)]
    word = re.search(r"\s\S*$", shared) if shared != chosen else None
    start = turns[-1] if turns else word.start() if word else 0
    return Pair(chosen[:start], chosen[start:], is_known=bool(start))


def _pair(row: Row, question: str, answer: str, *, exact: bool) -> Chat | Pair | None:
    """A prompt and its answer, each as text or as messages."""
    values = row.get(question), row.get(answer)
    raw = [raw_messages([value] if isinstance(value, Mapping) else value) for value in values]
    if any(found is None and not isinstance(value, str) for value, found in zip(values, raw, strict=True)):
        return None
    if exact and row.get("label") is False:
        raise BadRow("has a completion that its `label` marks as unwanted")
    if raw == [None, None]:
        pair = Pair(*values)
        if exact:
            return pair
        turns = [_turn("user", pair.prompt), _turn("assistant", pair.answer)]
        return _chat(row, read_messages(turns), 1, Pair(f"{pair.prompt}\n", pair.answer))
    prompt, completion = (
        read_messages(found if found is not None else [_turn(role, value)])
        for role, value, found in zip(("user", "assistant"), values, raw, strict=True)
    )
    return _chat(row, [*prompt, *completion], len(prompt))


def _alpaca(row: Row) -> Chat | None:
    """An instruction, its input if there is one, and the output. `history` holds earlier turns."""
    instruction = row.get("instruction")
    output = row.get("output", row.get("response"))
    if not isinstance(instruction, str) or not isinstance(output, str):
        return None
    given = next((row[key] for key in ("input", "context") if _is_text(row.get(key))), "")
    earlier = row.get("history") or []
    try:
        turns = [_turn(role, text) for pair in earlier for role, text in zip(("user", "assistant"), pair, strict=True)]
    except (TypeError, ValueError) as error:
        raise BadRow("has a `history` that is not a list of pairs") from error
    question = "\n".join(part for part in (instruction, given) if part)
    turns += [_turn("user", question), _turn("assistant", output)]
    prompt = ALPACA.format(
        paired=_ALPACA_PAIRED if given else "", instruction=instruction,
        input=f"### Input:\n{given}\n\n" if given else "",
    )  # fmt: skip
    return _chat(row, read_messages(turns), len(turns) - 1, None if earlier else Pair(prompt, output))


def _text(row: Row) -> Chat | Pair | None:
    value = row.get("text")
    return chat_of(row, "text") or (Pair("", value) if isinstance(value, str) else None)


FORMATS: tuple[Format, ...] = (
    *(Format(name, lambda row, name=name: chat_of(row, name)) for name in CHAT_COLUMNS),
    Format("chosen", _chosen),
    Format("prompt with completion", lambda row: _pair(row, "prompt", "completion", exact=True)),
    Format("prompt with response", lambda row: _pair(row, "prompt", "response", exact=False)),
    Format("instruction with output", _alpaca),
    Format("text", _text),
)
"""What is found without `text`, in this order."""
