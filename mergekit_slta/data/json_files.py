"""Read JSON files as lines, one JSON value a row.

Scope: what `datasets` does not keep. It reads dates, mixed types and missing keys as something else than the file says,
and fails on a whole file for one damaged line. Here a line is parsed when its row is drawn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec

from mergekit_slta.errors import DataError, show

BYTE_ORDER_MARK = "\ufeff"
"""Stands inside a file where several were joined."""
TRAIN = "train"
"""The split of a file's rows, as in `datasets`."""


def open_text(path: str) -> Any:
    """Open a text file, compressed or not, without its byte order mark; bytes that are not UTF-8 become U+FFFD."""
    return fsspec.open(path, "rt", encoding="utf-8-sig", errors="replace", compression="infer")


def is_json_lines(path: str) -> bool:
    """Whether a file has a JSON value in each line, and is not one JSON document.

    Decided by its first two lines that are not blank. A file of one line is a document if it is called `.json`.
    """
    with open_text(path) as file:
        lines = (line.strip() for line in file if line.strip())
        first, second = next(lines, ""), next(lines, "")
    if first in ("", "[", "{"):
        return not first
    if second:
        return _parse(first) is not None or isinstance(_parse(second), dict)
    return ".json" not in Path(path.lower()).suffixes and isinstance(_parse(first), dict)


def document_rows(paths: Sequence[str]) -> dict[str, list[str]]:
    """Rows of JSON documents: a list of rows, or an object that holds one.

    Args:
        paths: files of one document each, or of JSON lines.

    Returns:
        split -> rows, each as JSON. The split is `train` unless a document names several.

    Raises:
        DataError: a document is not JSON, or not UTF-8.
    """
    rows: dict[str, list[str]] = {}
    for path in paths:
        with fsspec.open(path, "rb", compression="infer") as file:
            content = file.read()
        try:
            text = content.decode("utf-8-sig")
            if is_json_lines(path):
                rows.setdefault(TRAIN, []).extend(line for line in text.split("\n") if line.strip())
                continue
            document = json.loads(text)
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise DataError(
                f"cannot read dataset {show(path)}: line {line} is not UTF-8; save the file as UTF-8",
                code="unreadable-dataset",
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"cannot read dataset {show(path)}: it is not valid JSON ({show(error)}); mend the file",
                code="unreadable-dataset",
            ) from error
        for split, values in _splits(document).items():
            rows.setdefault(split, []).extend(json.dumps(value) for value in values)
    return rows


def parse_row(line: str) -> Mapping[str, Any]:
    """Parse a line as a row. A text is a row with `text`; a list of messages is one with `messages`.

    Raises:
        ValueError: the line is not JSON, or not such a value.
    """
    try:
        value = json.loads(line.lstrip(BYTE_ORDER_MARK))
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    if _is_table(value):
        return {"messages": value}
    raise ValueError(f"a {type(value).__name__} in place of an object")


def find_line(paths: Iterable[str], text: str) -> str:
    """Where a line stands, as " (line 3 of FILE)"; empty if it is not found."""
    for path in paths:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                if line.rstrip("\n") == text:
                    return f" (line {number} of {show(path)})"
    return ""


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _splits(document: Any) -> dict[str, Sequence[Any]]:
    """split -> rows of a JSON document."""
    if isinstance(document, list) and not (_is_table(document) and _is_chat(document)):
        return {TRAIN: document}
    if not isinstance(document, dict):
        return {TRAIN: [document]}
    tables = {key: value for key, value in document.items() if _is_table(value) and not _is_chat(value)}
    if len(tables) == 1:  # {"data": [...], "version": 1}
        return {TRAIN: next(iter(tables.values()))}
    if tables and len(tables) == len(document):  # {"train": [...], "test": [...]}
        return tables
    values = list(document.values())
    if values and all(isinstance(value, dict) for value in values):
        if all(key.isdigit() for key in document):  # {"0": {...}, "1": {...}}
            return {TRAIN: values}
        if all(value and all(key.isdigit() for key in value) for value in values):  # {"question": {"0": ...}, ...}
            return {TRAIN: list(_by_row({name: list(value.values()) for name, value in document.items()}))}
    columns = values and all(isinstance(value, list) and not _is_table(value) for value in values)
    if columns and len({len(value) for value in values}) == 1:  # {"question": [...], "answer": [...]}
        return {TRAIN: list(_by_row(document))}
    return {TRAIN: [document]}


def _by_row(columns: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for row in zip(*columns.values(), strict=True):
        yield dict(zip(columns, row, strict=True))


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_chat(value: Sequence[Mapping[str, Any]]) -> bool:
    return "role" in value[0] or "from" in value[0]
