"""Alphas and statistics on disk: where they may be written, and writing them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mergekit_slta.errors import OutputError, show
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.output_folder import ALPHAS_NAME, STATISTICS_NAME, check_writable
from mergekit_slta.files.statistics_file import Statistics, is_statistics_file


def write_results(alphas: Alphas, statistics: Statistics, path: Path) -> None:
    """Write the alphas file and the statistics beside it; nothing but such files is ever overwritten.

    Raises:
        OutputError, AlphasError: something else is in the way, or the disk is full.
    """
    check_target(path)
    save_results(alphas, statistics, path)


def save_results(alphas: Alphas, statistics: Statistics, path: Path) -> None:
    """Write both to where nobody else writes.

    Raises:
        OutputError: the disk is full.
    """
    statistics.save(path.with_name(STATISTICS_NAME))
    alphas.save(path)


def check_target(path: Path, out: Path | None = None) -> None:
    """Refuse to write alphas over what is no alphas file: a recipe may come from a stranger.

    Args:
        path: the alphas file; the statistics lie beside it.
        out: the output folder, in which mergekit's files have names of their own.

    Raises:
        OutputError: one of the two is a link, a device or a folder, cannot be written, or has another file's name.
        AlphasError: it is a file of another kind.
    """
    beside = path.with_name(STATISTICS_NAME)
    for file in (path, beside):
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise OutputError(f"{show(file)} is no plain file: name another file with `alphas`")
    folder = os.path.realpath(path.parent)
    inside = out is not None and folder == os.path.realpath(out) and path.name != ALPHAS_NAME
    inside = inside or any(part.startswith(".slta_") for part in Path(folder).parts)  # where merges are staged
    if inside or path.name == STATISTICS_NAME:
        raise OutputError(f"the alphas cannot be called {show(path)}: name it {ALPHAS_NAME}, or choose another folder")
    check_writable(path.parent)
    if path.exists() and not _is_damaged_own_file(path):
        Alphas.load(path)
    if beside.exists() and not is_statistics_file(beside):
        raise OutputError(f"{show(beside)} is no statistics file and is not overwritten: choose another folder")


def _is_damaged_own_file(path: Path) -> bool:
    """A file of our name that is no JSON at all: a broken disk or an interrupted copy, not somebody's document."""
    if path.name != ALPHAS_NAME:
        return False
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return True
    return False
