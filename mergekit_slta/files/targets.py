"""Check that a file may be overwritten, for every file that the package writes; write a calibration's results."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from mergekit_slta.errors import AlphasError, OutputError, listing, show
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.comparison_file import is_comparison_file
from mergekit_slta.files.json_file import OTHER_VERSION
from mergekit_slta.files.linearity_file import Linearity
from mergekit_slta.files.names import ALPHAS_NAME, HIDDEN_PREFIX, statistics_path
from mergekit_slta.files.statistics_file import Statistics, is_statistics_file


def check_writable(folder: Path) -> None:
    """Check that a folder can be written to, or created.

    Raises:
        OutputError: the nearest existing parent is a file or a link to nothing, or is not writable.
    """
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(parent))
    if not existing.exists():
        raise OutputError(
            f"cannot make {show(folder)}: {show(existing)} is a link to nothing; name another folder, or remove it",
            code="not-a-folder",
        )
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
    """Check that writing a file destroys nothing else. Changes nothing.

    Args:
        path: the file to write; need not exist.
        noun: the type of the file, for messages.
        is_own: whether an existing file is of that type and may be replaced.
        remedy: what to do instead, for messages.
        sources: files from which the new one is made; they are not replaced.

    Raises:
        OutputError: `path` is a link, a device, a folder, one of `sources` or a file of another type, or its folder
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


def check_new_recipe(path: Path, overwrite: bool, sources: Sequence[Path | None] = ()) -> None:
    """Check that a drafted recipe may be written: it replaces no file, unless the user says so.

    Args:
        path: the recipe.
        overwrite: whether any file that is none of `sources` may be replaced.
        sources: the rows and models that the recipe is about.

    Raises:
        OutputError: see `check_overwrite`; or there is such a file.
    """
    check_overwrite(path, "recipe", lambda _: True, sources=sources)
    if path.exists() and not overwrite:
        raise OutputError(
            f"{show(path)} is there already and is not overwritten: name another file with -o, or give --overwrite",
            code="foreign-file",
        )


def check_alphas_target(path: Path, out: Path | None = None) -> None:
    """Check that alphas may be written: they replace only an alphas file, because recipes may come from strangers.

    Args:
        path: the alphas file; the statistics are written beside it.
        out: the output folder; a new file in it has the default name, because mergekit writes other files there.

    Raises:
        OutputError: see `check_overwrite`; or the name is reserved for another file.
        AlphasError: the file is of another type, or is damaged and does not have the default name.
    """
    folder = os.path.realpath(path.parent)
    is_new = not path.exists() and path.name != ALPHAS_NAME
    in_out = out is not None and folder == os.path.realpath(out)
    is_hidden = any(part.startswith(HIDDEN_PREFIX) for part in Path(folder).parts)
    if (in_out and is_new) or is_hidden or path.name.endswith(".safetensors"):
        raise OutputError(
            f"the alphas cannot be called {show(path)}: name it {ALPHAS_NAME}, or choose another folder",
            code="reserved-name",
        )
    check_overwrite(path, "alphas file", _is_alphas_file, remedy="name another file with -o or `alphas`")
    check_overwrite(statistics_path(path), "statistics file", is_statistics_file, remedy="choose another folder")


def check_same_models(path: Path, base: str, models: Sequence[str]) -> None:
    """Check that a file which the user named holds no alphas of other models. Those are another recipe's.

    Args:
        path: the alphas file; need not exist, or be one.
        base, models: the names of the checkpoints whose alphas are to be written.

    Raises:
        OutputError: it holds alphas of another base or of other checkpoints.
    """
    try:
        held = Alphas.load(path)
    except AlphasError:  # missing, damaged, or of another version
        return
    place, form = os.path.realpath, held.closed_form
    stored = [model for model in held.models if form is None or model != form.model]
    if place(held.base_model) != place(base) or set(map(place, stored)) != set(map(place, models)):
        raise OutputError(
            f"{show(path)} holds the alphas of other models ({listing([held.base_model, *held.models])}) and is not "
            "overwritten: name another file with -o, or remove it",
            code="foreign-file",
        )


def check_solved_target(path: Path) -> None:
    """Check that `solve` may write its alphas: without `--overwrite` they replace only those of an earlier `solve`.

    Raises:
        OutputError: the file holds the weights of a calibration.
    """
    try:
        is_solved = not path.exists() or Alphas.load(path).solved_from is not None
    except AlphasError:  # damaged, or of another version
        is_solved = False
    if not is_solved:
        raise OutputError(
            f"{show(path)} holds the weights of a calibration and is not overwritten: name another file with -o, or "
            "give --overwrite",
            code="foreign-file",
        )


def check_linearity_target(path: Path) -> None:
    """Check that a linearity file may be written: it replaces only a linearity file.

    Raises:
        OutputError: see `check_overwrite`.
    """
    check_overwrite(path, "linearity file", _is_linearity_file)


def check_comparison_target(path: Path) -> None:
    """Check that a comparison file may be written: it replaces only a comparison file.

    Raises:
        OutputError: see `check_overwrite`.
    """
    check_overwrite(path, "comparison file", is_comparison_file, remedy="name another folder with -o")


def _is_alphas_file(path: Path) -> bool:
    """Whether a file is an alphas file of any version, or has the default name and is not JSON.

    The latter is the result of a broken disk or an interrupted copy, not a user's document.

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
    """Whether a file is a linearity file of any version."""
    try:
        Linearity.load(path)
    except AlphasError as error:
        return error.code == OTHER_VERSION
    return True


def write_results(alphas: Alphas, statistics: Statistics, path: Path) -> None:
    """Write the alphas file `path` and the statistics beside it, after `check_alphas_target`.

    Raises:
        OutputError, AlphasError: see `check_alphas_target`; or the disk is full.
    """
    check_alphas_target(path)
    save_results(alphas, statistics, path)


def save_results(alphas: Alphas, statistics: Statistics, path: Path) -> None:
    """Write both files without a check, into a folder that only this package uses.

    Raises:
        OutputError: the disk is full.
    """
    statistics.save(statistics_path(path))
    alphas.save(path)
