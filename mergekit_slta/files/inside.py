"""Find the file that a command means: in a folder that was named instead, or under the default name of a new file."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mergekit_slta.errors import AlphasError, listing, show
from mergekit_slta.files.alphas_file import Alphas, is_alphas_file
from mergekit_slta.files.names import ALPHAS_NAME, MERGE_RECORD_NAME, STATISTICS_NAME, statistics_path
from mergekit_slta.files.statistics_file import is_statistics_file


def alphas_in(path: Path) -> Path:
    """The alphas file in a folder; `path` itself if it is no folder.

    In the folder of a merge it is that merge's own file, whatever lies beside it.

    Raises:
        AlphasError: the folder has none, or has several.
    """
    return _only_one(path, "alphas file", ALPHAS_NAME, "*.json", is_alphas_file)


def statistics_in(path: Path) -> Path:
    """The statistics file in a folder; `path` itself if it is no folder.

    In the folder of a merge it is that merge's own file, whatever lies beside it.

    Raises:
        AlphasError: the folder has none, or has several; or `path` is an alphas file.
    """
    if is_alphas_file(path):
        beside = statistics_of(path)
        which = f"statistics beside it, {show(beside)}" if beside.is_file() else "one that it was calibrated with"
        raise AlphasError(
            f"{show(path)} is an alphas file, and is not a statistics file: name the {which}", code="wrong-file-type"
        )
    return _only_one(path, "statistics file", STATISTICS_NAME, "*.safetensors", is_statistics_file)


def statistics_of(alphas: Path) -> Path:
    """Path of the statistics that an alphas file was solved from; need not exist."""
    beside = statistics_path(alphas)
    if not beside.is_file():
        with suppress(AlphasError):
            source = Alphas.load(alphas).solved_from
            if source is not None:
                return alphas.with_name(source)
    return beside


def _only_one(path: Path, noun: str, default: str, pattern: str, is_one: Callable[[Path], bool]) -> Path:
    if not path.is_dir():
        return path
    if (path / MERGE_RECORD_NAME).is_file() and (path / default).is_file():
        return path / default
    found = sorted(each for each in path.glob(pattern) if each.is_file() and is_one(each))
    if not found:
        raise AlphasError(
            f"there is no {noun} in the folder {show(path)}: name the file that `mergekit-slta calibrate` wrote",
            code="missing-file",
        )
    if len(found) > 1:
        raise AlphasError(
            f"the folder {show(path)} holds several {noun}s: name one of {listing(each.name for each in found)}",
            code="several-files",
        )
    return found[0]


def output_path(given: str, default: str) -> Path:
    """Path of a file to write: `given`, or the file `default` in it if `given` ends with a slash or is a folder."""
    separators = tuple(filter(None, (os.sep, os.altsep)))
    is_folder = given.endswith(separators) or os.path.isdir(given)
    return (Path(given) / default if is_folder else Path(given)).absolute()
