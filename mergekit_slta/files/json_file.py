"""Reading this package's JSON files: of the right kind and version, whole, and sound, or one line that says what not.

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
class Kind:
    """A kind of file.

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


def read_document(path: str | os.PathLike[str], model: type[Model], kind: Kind) -> Model:
    """Read and validate a file.

    Raises:
        AlphasError: it is missing, unreadable, too large, not JSON, of another format or version, or inconsistent.
    """
    try:
        if not os.path.isfile(path):
            raise AlphasError(f"there is no {kind.noun} {show(path)}: {kind.remedy}")
        if os.path.getsize(path) > kind.largest_bytes:
            raise AlphasError(
                f"{show(path)} is larger than {kind.largest_bytes >> 20} MiB, hence no {kind.noun}: {kind.remedy}"
            )
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AlphasError(f"cannot read the {kind.noun} {show(path)} ({show(error)}): {kind.remedy}") from error
    if not isinstance(content, dict) or content.get("format") != kind.format:
        raise AlphasError(f"{show(path)} is not {kind.article} {kind.noun}: {kind.remedy}")
    if content.get("version") != kind.version:
        raise AlphasError(
            f"{show(path)} is {kind.article} {kind.noun} of version {show(content.get('version'))}, this release reads "
            f"version {kind.version}: run `{kind.command}` again"
        )
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise AlphasError(
            f"{show(path)} is damaged at {show(place)} ({show(problem['msg'])}): {kind.remedy}"
        ) from error
