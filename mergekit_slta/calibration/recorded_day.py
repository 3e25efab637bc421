"""Find the date that chat templates saw as today when a file's rows were drawn.

Scope: reading the date. A template may write it into every row (Llama 3.2's does), so that a file which was computed
yesterday would not fit today's rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mergekit_slta.files.inside import statistics_of
from mergekit_slta.files.layout import KEY
from mergekit_slta.files.names import RESUME_MARKER_NAME, resume_folder

_LARGEST_BYTES = 64 * 2**20


def recorded_day(places: Sequence[Path]) -> date | None:
    """The date in the first file that has one; None if there is none.

    Args:
        places: alphas files or linearity files, which need not exist. The statistics and the unfinished work beside
            each are looked at, too. A damaged file counts as one without a date; who reads it later says so.
    """
    for path in places:
        settings = _json(path).get("calibration") or _json(path).get("settings")
        for found in (settings, _layout_beside(path).get("settings"), _json(resume_folder(path) / RESUME_MARKER_NAME)):
            day = found.get("date") if isinstance(found, dict) else None
            try:
                return date.fromisoformat(day)  # type: ignore[arg-type]
            except (TypeError, ValueError):
                continue
    return None


def _json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if it cannot be read."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_BYTES:
            return {}
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}


def _layout_beside(path: Path) -> dict[str, Any]:
    """The layout of the statistics beside an alphas file; empty if there are none."""
    try:
        with safe_open(statistics_of(path), framework="pt") as file:
            metadata = _mapping(json.loads((file.metadata() or {}).get("metadata", "{}")))
        return _mapping(json.loads(metadata.get(KEY, "{}")))
    except (OSError, SafetensorError, ValueError, TypeError, RecursionError):
        return {}


def _mapping(content: object) -> dict[str, Any]:
    return content if isinstance(content, dict) else {}
