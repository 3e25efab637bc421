"""Reading this package's JSON files: of the right type and version, whole and valid, or an error of one line.

Scope: files that may come from strangers. What is in them is their own modules' business.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from mergekit_slta.errors import AlphasError, show

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class DocumentType:
    """A type of file.

    Attributes:
        noun, article: what it is called.
        format, version: what its first two fields say.
        largest_bytes: a larger file is none of ours.
        command: what writes such files.
        remedy: what to do about one that cannot be used.
    """

    noun: str
    article: str
    format: str
    version: int
    largest_bytes: int
    command: str
    remedy: str


def read_document(path: str | os.PathLike[str], model: type[Model], document: DocumentType) -> Model:
    """Read and validate a file.

    Raises:
        AlphasError: it is missing, unreadable, too large, not JSON, of another format or version, or inconsistent.
    """
    try:
        if not os.path.isfile(path):
            raise AlphasError(f"there is no {document.noun} {show(path)}: {document.remedy}")
        if os.path.getsize(path) > document.largest_bytes:
            raise AlphasError(
                f"{show(path)} is larger than {document.largest_bytes >> 20} MiB, hence no {document.noun}: "
                f"{document.remedy}"
            )
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AlphasError(f"cannot read the {document.noun} {show(path)} ({show(error)}): {document.remedy}") from error
    if not isinstance(content, dict) or content.get("format") != document.format:
        raise AlphasError(f"{show(path)} is not {document.article} {document.noun}: {document.remedy}")
    if content.get("version") != document.version:
        raise AlphasError(
            f"{show(path)} is {document.article} {document.noun} of version {show(content.get('version'))}, this "
            f"release reads version {document.version}: run `{document.command}` again"
        )
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise AlphasError(
            f"{show(path)} is damaged at {show(place)} ({show(problem['msg'])}): {document.remedy}"
        ) from error
