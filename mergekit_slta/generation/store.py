"""Files of the rows that experts have written: finished ones with a record, and the batches of unfinished ones.

Scope: a file of rows is reused if its record names the same run and the file is as it was written. A file that somebody
has edited is neither used nor replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_slta.errors import OutputError, show
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.atomic import write_text_atomically
from mergekit_slta.files.identity import rows_run
from mergekit_slta.files.names import resume_folder, rows_names, rows_record_path
from mergekit_slta.generation.selection import Candidate
from mergekit_slta.recipe.settings import SELF

FORMAT = "mergekit-slta/rows"


def find_rows(folders: Sequence[Path], name: str, key: str | None, *, are_needed: bool = True) -> Path | None:
    """The first file of this name in the folders that the run `key` has written; None if there is none.

    Args:
        folders: the folders.
        name: the file's name.
        key: hash of the run; None if it is not known.
        are_needed: refuse a file that somebody has edited; else it is passed over.

    Raises:
        OutputError: somebody has edited it.
    """
    for folder in folders:
        path = folder / name
        record = read_record(path)
        if path.is_file() and key is not None and record.get("run") == key:
            if record.get("sha256") != _hash(path):
                if not are_needed:
                    continue
                raise OutputError(
                    f"{show(path)} was edited since its expert wrote it: name it as `dataset` to use it, or remove it "
                    "to have it written again",
                    code="foreign-file",
                )
            return path
    return None


class WrittenFile(NamedTuple):
    """The rows of an expert in a calibration.

    Attributes:
        model: the expert.
        name: the file's name.
        path: the file, as the expert wrote it; None if it was edited, or is not at hand.
    """

    model: str
    name: str
    path: Path | None


def rows_of(alphas: Alphas, folders: Sequence[Path]) -> list[WrittenFile]:
    """The rows that experts have written for a calibration, looked for in some folders."""
    tasks = alphas.calibration.get("tasks", ())
    names = rows_names(str(task["model"]) for task in tasks)
    models = [str(task["model"]) for task in tasks if task.get("dataset") == SELF]
    keys = {model: rows_run(alphas.identity, model, alphas.base_model) for model in models}
    return [
        WrittenFile(model, names[model], find_rows(folders, names[model], key, are_needed=False))
        for model, key in keys.items()
    ]


def check_rows_target(path: Path) -> None:
    """Check that a file of rows may be written: it replaces only one that is as it was written.

    Raises:
        OutputError: it would replace another file.
    """
    record = rows_record_path(path)
    if not os.path.lexists(path) and not os.path.lexists(record):
        return
    is_own = path.is_file() and not path.is_symlink() and read_record(path).get("sha256") == _hash(path)
    is_left = not os.path.lexists(path) and read_record(path).get("format") == FORMAT
    if not is_own and not is_left:
        raise OutputError(
            f"{show(path)} is no file that an expert wrote, or was edited since, and is not overwritten: name it as "
            "`dataset`, or choose another folder",
            code="foreign-file",
        )


def read_record(rows: Path) -> dict[str, Any]:
    """The record beside a file of rows; empty if there is none."""
    try:
        found = json.loads(rows_record_path(rows).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and found.get("format") == FORMAT else {}


def write_rows(path: Path, rows: Sequence[Mapping[str, object]], key: str, facts: Mapping[str, object]) -> None:
    """Write a file of rows and its record; the unfinished work beside it is removed.

    Args:
        path: the file.
        rows: its rows.
        key: hash of the run.
        facts: what else the record says.

    Raises:
        OutputError: it cannot be written.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    # The record comes first: rows without a record would be somebody's own.
    record = {"format": FORMAT, "run": key, "sha256": digest, **facts}
    write_text_atomically(rows_record_path(path), json.dumps(record, indent=2) + "\n")
    write_text_atomically(path, text)
    shutil.rmtree(resume_folder(path), ignore_errors=True)


def read_batch(path: Path, number: int, key: str) -> list[Candidate] | None:
    """A finished batch of an unfinished run; None if there is none, or it is damaged."""
    try:
        found = json.loads(_batch(path, number).read_text(encoding="utf-8"))
        if found["run"] != key:
            return None
        names = {part.name for part in fields(Candidate)}
        rows = [{name: row[name] for name in names} for row in found["rows"]]
        return [Candidate(**{**row, "ids": tuple(row["ids"])}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_batch_file(path: Path, number: int, key: str, rows: Sequence[Candidate]) -> None:
    """Keep a finished batch beside the file that it is for.

    Raises:
        OutputError: it cannot be written.
    """
    content = {"run": key, "rows": [asdict(row) for row in rows]}
    write_text_atomically(_batch(path, number), json.dumps(content) + "\n")


def _batch(path: Path, number: int) -> Path:
    return resume_folder(path) / f"batch{number:05}.json"


def _hash(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
