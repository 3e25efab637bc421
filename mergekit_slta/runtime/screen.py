"""Print tables and text: in colour on a terminal, as plain text elsewhere.

Scope: `rich` for the layout. What comes from models and data is passed as plain strings, never as markup. Plain text
has no escape sequences and no lines of boxes, and its width is not limited, so that a log can be searched.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TextIO

import click
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from mergekit_slta.errors import show

if TYPE_CHECKING:
    Cell = str | Text

_UNLIMITED = 10_000
"""Width of plain text in characters."""
_LONGEST_CELL = 1000
_MIN_NAME, _MIN_NUMBER = 12, 8
"""Widths that columns of names and of numbers keep on a narrow terminal."""
_GAP = 2
"""Columns between two columns of a table."""
_SPACES_AT_END = re.compile(r" +$", re.MULTILINE)


class Columns:
    """A table with a header. The first columns are aligned left and may be folded, the others are numbers.

    Args:
        header: titles of the columns; may have several lines.
        rows: the cells.
        names: number of columns that are aligned left.
    """

    def __init__(self, header: Sequence[str], rows: Iterable[Sequence[Cell]], names: int = 1) -> None:
        self._header, self._rows, self._names = header, list(rows), names

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        is_terminal = console.is_terminal
        table = Table(
            box=box.SIMPLE_HEAD if is_terminal else None,
            show_edge=False,
            pad_edge=False,
            padding=(0, _GAP - is_terminal, 0, 0),
            header_style="bold",
        )
        for number, (title, width) in enumerate(zip(self._header, self._widths(options.max_width), strict=True)):
            justify = "left" if number < self._names else "right"
            table.add_column(Text(title), justify=justify, overflow="fold", width=width if is_terminal else None)
        for row in self._rows:
            table.add_row(*(text(cell) if isinstance(cell, str) else cell for cell in row))
        yield table

    def _widths(self, available: int) -> list[int | None]:
        """Width of each column on a terminal of `available` characters; None if all columns fit as they are.

        Numbers keep their words, and names get the rest.
        """
        columns = [[title, *map(str, cells)] for title, *cells in zip(self._header, *self._rows, strict=True)]
        whole = [max(cell_len(line) for cell in cells for line in cell.splitlines() or [""]) for cells in columns]
        left = available - _GAP * (len(columns) - 1) - sum(whole)
        if left >= 0:
            return [None] * len(columns)
        widths = list(whole)
        for number, cells in enumerate(columns):
            words = max(cell_len(word) for cell in cells for word in cell.split() or [""])
            widths[number] = min(whole[number], max(words, _MIN_NUMBER) if number >= self._names else _MIN_NAME)
        left = available - _GAP * (len(columns) - 1) - sum(widths)
        for number, width in enumerate(whole):
            more = max(0, min(left, width - widths[number]))
            widths[number] += more
            left -= more
        return list(widths)


def facts(rows: Iterable[tuple[str, Cell]]) -> RenderableType:
    """Lines of a key and a value. An empty key continues the line above."""
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(style="bold", min_width=11, no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(Text(key), text(value) if isinstance(value, str) else value)
    return table


def text(value: str, style: str = "") -> Text:
    """Text that may hold names from recipes, in one line."""
    return Text(show(value, _LONGEST_CELL), style)


def plain(*parts: RenderableType) -> str:
    """What `print_parts` prints where there is no terminal, without the last line break."""
    console = Console(
        file=io.StringIO(), width=_UNLIMITED, height=25, color_system=None, force_terminal=False, force_jupyter=False,
        highlight=False, markup=False, emoji=False, legacy_windows=False,
    )  # fmt: skip
    with console.capture() as captured:
        console.print(Group(*parts))
    return _SPACES_AT_END.sub("", captured.get()).removesuffix("\n")


def print_parts(*parts: RenderableType, err: bool = False) -> None:
    """Print to standard output, or to the error output: in colour on a terminal, plain text elsewhere."""
    stream = sys.stderr if err else sys.stdout
    if not is_terminal(stream):
        click.echo(encodable(plain(*parts), stream), err=err)
        return
    console = console_of(stream)
    with console.capture() as captured:
        console.print(Group(*parts))
    shown = _SPACES_AT_END.sub("", captured.get())
    click.echo(encodable(shown, stream), err=err, nl=False, color=True)


def console_of(stream: TextIO) -> Console:
    """A console on a terminal, which interprets no markup; without colours if `NO_COLOR` is set."""
    return Console(
        file=stream, force_terminal=True, force_jupyter=False, highlight=False, markup=False, emoji=False,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
    )  # fmt: skip


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal that understands escape sequences."""
    try:
        return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
    except (AttributeError, ValueError):  # a stream of another library, or a closed one
        return False


def encodable(value: str, stream: TextIO) -> str:
    """Text with escapes in the place of what the stream's encoding lacks (some pipes on Windows)."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return value.encode(encoding, "backslashreplace").decode(encoding)


def describe_bytes(number: float) -> str:
    """A size in bytes, to three digits."""
    return _scaled(number, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def describe_flops(number: float) -> str:
    """A number of floating point operations, to three digits."""
    return _scaled(number, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP"))


def _scaled(number: float, factor: int, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if number < 0.9995 * factor:
            return f"{number:.3g} {unit}"
        number /= factor
    return f"{number:.3g} {units[-1]}"
