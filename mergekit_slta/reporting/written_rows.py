"""Rows that experts have written themselves, for the model card: a few of each expert, as text.

Scope: reads the files in the folder of a merge. A file that is missing or damaged is left out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mergekit_slta.errors import show
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.names import ROWS_FOLDER, rows_names, rows_record_path
from mergekit_slta.recipe.settings import SELF
from mergekit_slta.reporting.names import PublicNames

SHOWN = 3
"""Rows of each expert that a card shows."""
_LONGEST = 600
"""Longer messages lose their end."""


def describe_written_rows(out: Path, alphas: Alphas, names: PublicNames) -> str:
    """A few rows of each expert that wrote its own, in Markdown; empty if none did, or they are not in the folder."""
    tasks = [task for task in alphas.calibration.get("tasks", ()) if isinstance(task, dict)]
    files = rows_names(str(task.get("model")) for task in tasks)
    parts = []
    for task in tasks:
        path = out / ROWS_FOLDER / files[str(task.get("model"))]
        rows = _read(path) if task.get("dataset") == SELF else []
        if not rows:
            continue
        name, record = show(names.model(task["model"]), 120).replace("`", "'"), _record(path)
        number = record.get("written")
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


def _record(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(rows_record_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


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
