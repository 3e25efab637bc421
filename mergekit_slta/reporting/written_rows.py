"""Rows that experts have written themselves, for the model card: a few of each expert, as text.

Scope: reads the files in the folder of a merge. A file that is missing, damaged, edited or of another calibration is
left out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mergekit_slta.errors import show
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.names import ROWS_FOLDER
from mergekit_slta.generation.store import read_record, rows_of
from mergekit_slta.reporting.names import PublicNames

SHOWN = 3
"""Rows of each expert that a card shows."""
_LONGEST = 600
"""Longer messages lose their end."""


def describe_written_rows(out: Path, alphas: Alphas, names: PublicNames) -> str:
    """A few rows of each expert that wrote its own, in Markdown; empty if none did, or they are not in the folder."""
    parts = []
    for label, _, path in rows_of(alphas, [out / ROWS_FOLDER]):
        rows = _read(path) if path is not None else []
        if path is None or not rows:
            continue
        name = show(names.model(label), 120).replace("`", "'")
        number = read_record(path).get("written")
        chosen = f", chosen from {number}" if isinstance(number, int) else ""
        count = min(SHOWN, len(rows))
        parts.append(
            f"`{name}` wrote its {len(rows)} rows itself{chosen} (`{ROWS_FOLDER}/{show(path.name, 120)}`). "
            f"The first {count}:"
        )
        parts += [_fenced(_text(row)) for row in rows[:count]]
    return "\n\n".join(parts)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError, RecursionError):
        return []
    return [row for row in found if isinstance(row, dict)]


def _text(row: dict[str, Any]) -> str:
    messages = row.get("messages")
    if not isinstance(messages, list):
        return _cut(f"{row.get('prompt', '')}{row.get('completion', '')}")
    return "\n".join(
        f"{show(message.get('role'), 20)}: {_cut(str(message.get('content')))}"
        for message in messages
        if isinstance(message, dict)
    )


def _cut(text: str) -> str:
    kept = "".join(character for character in text if character.isprintable() or character in "\n\t")
    return kept if len(kept) <= _LONGEST else kept[:_LONGEST] + " …"


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
