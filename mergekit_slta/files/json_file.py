"""Read a JSON file of this package: check its type and version, and validate its fields. Write long lists readably.

Scope: files that may come from strangers. Each type's fields are defined in its own module.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mergekit_slta.errors import AlphasError, path_hint, show
from mergekit_slta.files.atomic import write_text_atomically

OTHER_VERSION = "other-file-version"
"""Error code for a file written by another version of this package."""
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class DocumentType:
    """A type of file.

    Attributes:
        noun, article: the type's name in messages.
        format, version: the values of its first two fields.
        largest_bytes: a larger file is refused without reading it.
        command: the command that writes such files.
        remedy: what to do if a file cannot be used, for messages.
    """

    noun: str
    article: str
    format: str
    version: int
    largest_bytes: int
    command: str
    remedy: str


def why_missing(path: object) -> str | None:
    """Why there is no file with this path ("it is a folder"); None if there is one."""
    if not isinstance(path, (str, os.PathLike)):
        return f"it is of type {type(path).__name__}, not a path"
    if os.path.isfile(path):
        return None
    return "it is a folder" if os.path.isdir(path) else f"it does not exist; {path_hint(path)[1:-1]}"


def read_document(path: str | os.PathLike[str], model: type[Model], document: DocumentType) -> Model:
    """Read and validate a file.

    Raises:
        AlphasError: it is missing, unreadable, too large, not JSON, of another format or version, or inconsistent.
    """
    try:
        if what := why_missing(path):
            raise AlphasError(
                f"there is no {document.noun} {show(path)} ({what}): {document.remedy}", code="missing-file"
            )
        if os.path.getsize(path) > document.largest_bytes:
            raise AlphasError(
                f"{show(path)} is larger than {document.largest_bytes >> 20} MiB, hence no {document.noun}: "
                f"{document.remedy}",
                code="file-too-large",
            )
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AlphasError(
            f"cannot read the {document.noun} {show(path)} ({show(error)}): {document.remedy}", code="unreadable-file"
        ) from error
    if not isinstance(content, dict) or content.get("format") != document.format:
        raise AlphasError(
            f"{show(path)} is not {document.article} {document.noun}: {document.remedy}", code="wrong-file-type"
        )
    if content.get("version") != document.version:
        raise AlphasError(
            f"{show(path)} is {document.article} {document.noun} of version {show(content.get('version'))}, this "
            f"release reads version {document.version}: run `{document.command}` again",
            code=OTHER_VERSION,
        )
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise AlphasError(
            f"{show(path)} is damaged at {show(place)} ({show(problem['msg'])}): {document.remedy}",
            code="damaged-file",
        ) from error


def write_with_rows(path: str | os.PathLike[str], content: dict[str, Any], key: str) -> None:
    """Write a file atomically. The list under `key` comes last, with one entry a line: it may be long.

    Raises:
        OutputError: it cannot be written.
    """
    rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False, allow_nan=False) for row in content.pop(key))
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_text_atomically(path, text[:-2] + f',\n "{key}": [\n{rows}\n ]\n}}\n')
