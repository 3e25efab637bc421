"""Show a calibration row as the model sees it: the prompt and the answer, with special tokens and line breaks visible.

Scope: rows may come from strangers, so that no character of a row reaches a terminal that could move its cursor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mergekit_slta.data.tokens import decode_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mergekit_slta.data.rows import Row

_CHARACTERS, _LINES = 600, 12
"""Longer texts are shortened in the middle."""
_BREAK, _SPACE = "↵", "␣"
_JOINERS = "\u200c\u200d"
"""Part of words in some scripts, and of emoji."""


def row_parts(row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The text of a row: its `prompt`, empty if the whole row is the answer, and its `answer`."""
    prompt, answer = decode_row(row.ids, row.completion, tokenizer)
    return {"prompt": "", "answer": prompt + answer} if row.completion == 1 else {"prompt": prompt, "answer": answer}


def view_of_row(row: Row, tokenizer: PreTrainedTokenizerBase) -> RenderableType:
    """The text of a row, with a label before each part, and the answer in colour.

    Args:
        row: the row.
        tokenizer: the output's, which has tokenized it.
    """
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(justify="right", min_width=8, no_wrap=True)
    table.add_column(overflow="fold")
    for part, content in row_parts(row, tokenizer).items():
        if part == "prompt" and not content:
            continue
        head, note, tail = visible_lines(content)
        label, style = part, "" if part == "prompt" else "green"
        for line in head or [""]:
            shown = Text(line, style)
            shown.highlight_words([_BREAK, _SPACE], "dim")
            table.add_row(Text(f"{label} |", "bold"), shown)
            label = ""
        if note or not content:
            table.add_row(Text("… |", "dim"), Text(f"({note or 'cut off by `max_seq_length`'})", "dim"))
        for line in tail:
            table.add_row(Text(" |"), Text(line, style))
    if row.num_cut:
        table.add_row(Text("… |", "dim"), Text(f"({row.num_cut} more tokens are cut off by `max_seq_length`)", "dim"))
    return table


def visible_lines(content: str) -> tuple[list[str], str, list[str]]:
    """The lines of a text. Line breaks, and spaces at the ends of the text and of its lines, are shown as marks; other
    characters that are not printable as escape sequences of Python.

    Returns:
        The lines; or, of a long text, those at its beginning, what is left out, and those at its end.
    """
    inner = content.strip(" ")
    before, after = (_SPACE * (len(content) - len(cut)) for cut in (content.lstrip(" "), content.rstrip(" ")))
    content = before + inner + after if inner else before
    lines, ends = _lines(content), _LINES // 2
    if len(content) > _CHARACTERS:
        head, tail = _lines(content[: _CHARACTERS // 2]), _lines(content[-_CHARACTERS // 2 :])
        return head[:ends], f"the middle of {len(content):,} characters is not shown", tail[-ends:]
    if len(lines) > _LINES:
        return lines[:ends], f"the middle of {len(lines):,} lines is not shown", lines[-ends:]
    return lines, "", []


def _lines(content: str) -> list[str]:
    lines = content.split("\n")
    bare = [line.rstrip(" ") for line in lines]
    lines = [cut + _SPACE * (len(line) - len(cut)) for cut, line in zip(bare, lines, strict=True)]
    marked = [*(line + _BREAK for line in lines[:-1]), *([lines[-1]] if lines[-1] else [])]
    return ["".join(map(_visible, line)) for line in marked]


def _visible(character: str) -> str:
    if character.isprintable() or character in _JOINERS:
        return character
    return character.encode("unicode_escape").decode("ascii")
