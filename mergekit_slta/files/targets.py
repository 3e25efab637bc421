"""May this file be written? One check for all that the package overwrites; and writing a calibration's results."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from mergekit_slta.errors import AlphasError, OutputError, show
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.json_file import OTHER_VERSION
from mergekit_slta.files.linearity_file import Linearity
from mergekit_slta.files.names import ALPHAS_NAME, HIDDEN_PREFIX, STATISTICS_NAME
from mergekit_slta.files.statistics_file import Statistics, is_statistics_file


def check_writable(folder: Path) -> None:
    """Refuse a folder that can neither be written to nor made.

    Raises:
        OutputError: the nearest folder that exists is a file, or may not be written to.
    """
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise OutputError(
            f"cannot make {show(folder)}: {show(existing)} is a file; name another folder", code="not-a-folder"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(
            f"cannot write to {show(existing)}: choose a folder that you may write to", code="cannot-write"
        )


def check_overwrite(
    path: Path,
    noun: str,
    is_own: Callable[[Path], bool],
    *,
    remedy: str = "name another file with -o",
    sources: Sequence[Path | None] = (),
) -> None:
    """Refuse to write a file where that would destroy something else. Changes nothing.

    Args:
        path: the file to write; need not exist.
        noun: what is written there, as messages call it.
        is_own: whether an existing file is of that kind and may be replaced.
        remedy: what to do instead.
        sources: files that the new one is made from.

    Raises:
        OutputError: `path` is a link, a device, a folder, one of `sources` or a file of another kind, or its folder
            cannot be written to.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OutputError(f"{show(path)} is no plain file: {remedy}", code="not-a-plain-file")
    check_writable(path.parent)
    if not path.exists():
        return
    if any(source is not None and source.exists() and path.samefile(source) for source in sources):
        raise OutputError(f"{show(path)} is an input of this command: {remedy}", code="output-is-an-input")
    if not is_own(path):
        raise OutputError(f"{show(path)} is no {noun} and is not overwritten: {remedy}", code="foreign-file")


def check_alphas_target(path: Path, out: Path | None = None) -> None:
    """Refuse to write alphas over anything but an alphas file: a recipe may come from a stranger.

    Args:
        path: the alphas file; the statistics are written beside it.
        out: the output folder, in which mergekit's files have names of their own.

    Raises:
        OutputError: see `check_overwrite`; or the alphas file has the name of another file.
        AlphasError: the file is of another kind, or a damaged alphas file under a name of the user's.
    """
    folder = os.path.realpath(path.parent)
    in_out = out is not None and folder == os.path.realpath(out) and path.name != ALPHAS_NAME
    is_hidden = any(part.startswith(HIDDEN_PREFIX) for part in Path(folder).parts)
    if in_out or is_hidden or path.name == STATISTICS_NAME:
        raise OutputError(
            f"the alphas cannot be called {show(path)}: name it {ALPHAS_NAME}, or choose another folder",
            code="reserved-name",
        )
    check_overwrite(path, "alphas file", _is_alphas_file, remedy="name another file with -o or `alphas`")
    check_overwrite(
        path.with_name(STATISTICS_NAME), "statistics file", is_statistics_file, remedy="choose another folder"
    )


def check_linearity_target(path: Path) -> None:
    """Refuse to write over anything but a linearity file.

    Raises:
        OutputError: see `check_overwrite`.
    """
    check_overwrite(path, "linearity file", _is_linearity_file)


def _is_alphas_file(path: Path) -> bool:
    """True for an alphas file of any version, and for a file of the default name that is no JSON at all: a broken disk
    or an interrupted copy, not somebody's document.

    Raises:
        AlphasError: any other file; the message says what is wrong with it.
    """
    if path.name == ALPHAS_NAME:
        try:
            json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return True
    try:
        Alphas.load(path)
    except AlphasError as error:
        if error.code != OTHER_VERSION:
            raise
    return True


def _is_linearity_file(path: Path) -> bool:
    """True for a linearity file of any version."""
    try:
        Linearity.load(path)
    except AlphasError as error:
        return error.code == OTHER_VERSION
    return True


def write_results(alphas: Alphas, statistics: Statistics, path: Path) -> None:
    """Write the alphas file `path` and the statistics beside it; other files are not overwritten.

    Raises:
        OutputError, AlphasError: see `check_alphas_target`; or the disk is full.
    """
    check_alphas_target(path)
    save_results(alphas, statistics, path)


def save_results(alphas: Alphas, statistics: Statistics, path: Path) -> None:
    """Write both files in a folder that only this package writes to.

    Raises:
        OutputError: the disk is full.
    """
    statistics.save(path.with_name(STATISTICS_NAME))
    alphas.save(path)
