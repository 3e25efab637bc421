"""Pieces of the tables' text: Markdown tables, numbers, sections.

Scope: text alone; knows no result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from claims import MISSING

TABLES = "python examples/reproduce/tables.py WORK/results.json -o WORK/RESULTS.md"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: bool = False) -> str:
    """A Markdown table; the first column to the left, the others to the right unless they are words."""
    marks = ["---", *["---" if words else "---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(header), marks, *rows])


def number(value: float | None, form: str = ".3f") -> str:
    """A number, or a dash."""
    return MISSING if value is None else format(value, form)


def section(title: str, *parts: str, command: str) -> str:
    """A heading, its parts, and where the numbers come from."""
    return "\n\n".join([f"## {title}", *parts, f"Measured by `{command}`, printed by `{TABLES}`."])
