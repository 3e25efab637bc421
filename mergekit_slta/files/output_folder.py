"""The output folder OUT: check what it holds, and replace an earlier merge without ever mixing two merges.

Scope: files of OUT, no tensors. mergekit neither refuses nor clears a folder that holds a model, and
`from_pretrained` prefers an old one-file model to a new sharded one beside it. So mergekit writes into a folder inside
OUT, and only a finished merge is moved to OUT. The record (see `merge_record`) lists the files that a merge of this
package put into OUT; the next merge replaces them. A folder with other weights that could be loaded in place of the
merge is refused unless the user asks to overwrite them. Other files of the user's stay. Those that are in the way get
another name, and so do those that transformers would read as part of the merge, such as another model's tokenizer.

    OUT/.slta_merging/NAME/    the merge being written; after a failure only its alphas and statistics stay
    OUT/.slta_calibrating/     the calibration before OUT is locked; after a kill the next run resumes it
    OUT/.slta_merged/NAME/     a finished merge being moved to OUT; after a kill the next run completes the move
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from mergekit_slta.errors import OutputError, listing, show
from mergekit_slta.files.atomic import write_text_atomically
from mergekit_slta.files.lock import folder_lock
from mergekit_slta.files.merge_record import files_in, hash_in, parents_in, record, recorded, remove_files, unchanged
from mergekit_slta.files.names import (
    ALPHAS_NAME,
    CALIBRATING_FOLDER,
    CARD_NAME,
    CONFIG_NAME,
    FIGURE_PREFIX,
    KEPT_SUFFIX,
    LOADERS_FOLDERS,
    LOADERS_READ,
    MERGE_RECORD_NAME,
    MERGED_FOLDER,
    MERGED_RECIPE_NAME,
    MERGING_FOLDER,
    PID_NAME,
    REPLACED_NAME,
    ROWS_FOLDER,
    STATISTICS_NAME,
    rows_record_path,
)
from mergekit_slta.files.statistics_file import is_statistics_file
from mergekit_slta.files.targets import check_writable

LOG = logging.getLogger(__name__)
_WEIGHTS = re.compile(
    r"(model|pytorch_model|adapter_model).*\.(safetensors|bin)(\.index(\..+)?\.json)?$|adapter_config\.json$"
)
"""Weights that transformers or mergekit may load in place of a merge beside them."""
_USUAL_FILES = (CONFIG_NAME, CARD_NAME, MERGED_RECIPE_NAME, ALPHAS_NAME, STATISTICS_NAME, MERGE_RECORD_NAME)
"""Files of nearly every merge."""
_WAIT_SECONDS = 2.0
"""How long to wait for the lock. A check of the folder by another process takes less."""


def weight_files(out: Path) -> list[str]:
    """Names of the files in a folder that may be loaded as a model's weights, except this package's statistics.

    Those are weights and indexes with the names that transformers and mergekit look for. An adapter's config counts,
    too: with it, transformers loads an adapter and its base in place of the merge.
    """
    if not out.is_dir():
        return []
    names = (entry.name for entry in os.scandir(out) if entry.is_file())
    found = (name for name in names if _WEIGHTS.match(name))
    return sorted(name for name in found if name != STATISTICS_NAME and not is_statistics_file(out / name))


def check_output(out: Path, inputs: Sequence[str], *, overwrite: bool = False) -> list[str]:
    """Check that a merge into a folder destroys nothing; changes nothing.

    Args:
        out: the output folder; need not exist.
        inputs: paths of the models to merge, and of adapters.
        overwrite: accept weights of another origin; see `staged`.

    Returns:
        Names of the weights of another origin that the merge will replace.

    Raises:
        OutputError: `out` is a file, cannot be written to, is one of the inputs, is being merged into, holds a folder
            where the merge has a file, or holds weights that no merge of this package recorded and that could be
            loaded in place of the merge.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"the output {show(out)} is a file: name a folder", code="not-a-folder")
    if any(os.path.exists(path) and out.exists() and os.path.samefile(path, out) for path in inputs):
        raise OutputError(
            f"the output {show(out)} is one of the models to merge: name another folder", code="output-is-an-input"
        )
    check_writable(out)
    _check_replaceable(out, _USUAL_FILES)
    with _locked(out, shared=True):
        foreign = _foreign(out)
    if foreign and not overwrite:
        raise OutputError(
            f"{show(out)} holds weights that no merge of this package wrote ({listing(foreign, 3)}): name another "
            "folder, or replace them with `mergekit-slta merge --overwrite`",
            code="foreign-weights",
        )
    return list(foreign)


def _read_by_loaders(out: Path) -> list[str]:
    """Relative paths of the files in a folder that transformers reads beside a model's weights and config."""
    names = [entry.name for entry in os.scandir(out) if entry.is_file()] if out.is_dir() else []
    for part in LOADERS_FOLDERS:
        if (out / part).is_symlink():
            names.append(part)
        elif (out / part).is_dir():
            names += [f"{part}/{entry.name}" for entry in os.scandir(out / part) if entry.is_file()]
    return sorted({name for name in names if any(fnmatchcase(name, pattern) for pattern in LOADERS_READ)})


def _locked(out: Path, *, shared: bool = False) -> AbstractContextManager[None]:
    """Lock OUT if it exists; `shared` is for reading only.

    Raises (on entering):
        OutputError: another process is merging into it.
    """

    def busy() -> OutputError:
        holder = _read_text(out / MERGING_FOLDER / PID_NAME) or "unknown"
        return OutputError(
            f"another merge (process {show(holder)}) is writing to {show(out)}: wait for it, or name another folder",
            code="in-use",
        )

    return folder_lock(out, busy, shared=shared, wait_seconds=_WAIT_SECONDS)


@contextmanager
def staged(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder for mergekit to write into; when the block ends, its files replace the earlier merge in OUT.

    Args:
        out: the output folder.
        overwrite: weights of another origin, which could be loaded in place of the merge, are removed, too, after it.

    Yields:
        The folder, with the same name as OUT. If the block raises, OUT stays as it was.

    Raises:
        OutputError: another process is merging into OUT, other weights were put there during the merge, or a file of
            the merge cannot be moved to its place. OUT stays as it was.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        finish(out)
        accepted = _foreign(out) if overwrite else {}
        staging = out / MERGING_FOLDER
        folder = pending(out)
        if folder.is_dir():  # left by a run that failed; this merge uses its alphas and statistics
            _keep_alphas_only(staging, folder)
        folder.mkdir(parents=True, exist_ok=True)
        (staging / PID_NAME).write_text(str(os.getpid()))
        try:
            yield folder
            if not _foreign(out).items() <= accepted.items():
                raise OutputError(
                    f"somebody put other weights into {show(out)} during the merge: move them away and merge again",
                    code="foreign-weights",
                )
            record(folder, files_in(folder))
            replaced = unchanged(out, recorded(out)) | accepted
            _check_replaceable(out, files_in(folder), replaced)
            write_text_atomically(staging / REPLACED_NAME, json.dumps(replaced))
        except BaseException:
            _keep_alphas_only(staging, folder)
            raise
        os.rename(staging, out / MERGED_FOLDER)  # from here on a kill does not undo the merge
        finish(out)


def _keep_alphas_only(staging: Path, folder: Path) -> None:
    """Remove all files of a failed merge except the alphas and statistics, which the next run uses."""
    for entry in folder.iterdir():
        if entry.name not in (ALPHAS_NAME, STATISTICS_NAME):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    if not any(folder.iterdir()):
        _drop(staging)


def pending(out: Path) -> Path:
    """Folder in which a failed or killed merge leaves its alphas and statistics."""
    return out / MERGING_FOLDER / (Path(os.path.realpath(out)).name or "model")


def calibrating(out: Path) -> Path:
    """Folder for a merge's calibration before OUT is locked, separate from the files of another running merge."""
    return out / CALIBRATING_FOLDER


def keep_rows(out: Path, folder: Path, own: Mapping[str, Path | None]) -> None:
    """Copy the rows that experts have written for a merge into its folder, with those of earlier merges in OUT under
    other names: a recipe may name one of them as its dataset.

    Args:
        out: the output folder.
        folder: the merge's.
        own: name of a file of rows of the merge's calibration -> the file; None if it is not at hand.
    """
    records = {rows_record_path(Path(name)).name for name in own}
    earlier = sorted((out / ROWS_FOLDER).glob("[!.]*")) if (out / ROWS_FOLDER).is_dir() else []
    found = [path for path in earlier if path.suffix in (".jsonl", ".json") and path.name not in records.union(own)]
    found += [part for path in own.values() if path is not None for part in (path, rows_record_path(path))]
    for path in filter(Path.is_file, found):
        (folder / ROWS_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(path, folder / ROWS_FOLDER / path.name)


def forget_calibration(out: Path) -> None:
    """Remove the alphas, statistics and rows in `calibrating`, once OUT holds its merge. Unfinished work of other runs
    stays."""
    folder = calibrating(out)
    for name in (ALPHAS_NAME, STATISTICS_NAME):
        (folder / name).unlink(missing_ok=True)
    for path in (folder / ROWS_FOLDER).glob("[!.]*"):
        path.unlink()
    with suppress(OSError):
        (folder / ROWS_FOLDER).rmdir()
    with suppress(OSError):
        folder.rmdir()


def finish(out: Path) -> None:
    """Move a finished merge to OUT. If it is killed, calling it again completes the move. The caller holds the lock.

    `config.json` is removed first and written last. Without it transformers refuses to load the half-moved model.

    Raises:
        OutputError: a file cannot be moved to its place; nothing has been moved.
    """
    merged = out / MERGED_FOLDER
    folder = next((entry for entry in merged.iterdir() if entry.is_dir()), None) if merged.is_dir() else None
    if folder is not None:
        names, replaced = files_in(folder), _replaced(merged)
        _check_replaceable(out, names, replaced)
        new = recorded(folder if MERGE_RECORD_NAME in names else out)  # these are overwritten by the move
        _set_aside(out, folder, replaced, new)
        if CONFIG_NAME in names:  # else all files are already moved, because it is the last
            (out / CONFIG_NAME).unlink(missing_ok=True)
        remove_files(out, [name for name in unchanged(out, replaced) if name not in new])
        for name in sorted(names, key=lambda name: (name == CONFIG_NAME, name == MERGE_RECORD_NAME)):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / name, out / name)
    _drop(merged)


def _replaced(merged: Path) -> dict[str, str]:
    """The files in OUT, with their hashes, that a finished merge replaces."""
    try:
        found = json.loads((merged / REPLACED_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_replaceable(out: Path, names: Iterable[str], removed: Iterable[str] = ()) -> None:
    """Check that files can be moved to OUT, and others be removed from it or renamed; changes nothing.

    Raises:
        OutputError: a folder is where a file belongs, something else where a folder belongs, or a folder is not
            writable.
    """
    for name in names:
        target = out / name
        if target.is_dir() and not target.is_symlink():
            raise OutputError(
                f"{show(target)} is a folder where the merge has a file: move it away and merge again",
                code="not-a-plain-file",
            )
    for part in {part for name in (*names, *removed, *_read_by_loaders(out)) for part in parents_in(name)}:
        folder = out / part
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise OutputError(
                f"{show(folder)} is no folder, and the merge has one there: move it away and merge again",
                code="not-a-folder",
            )
        if folder.is_dir():
            check_writable(folder)


def _set_aside(out: Path, folder: Path, replaced: Mapping[str, str], new: Mapping[str, str]) -> None:
    """Rename files in OUT that no merge wrote, or that were edited since, if the merge has files of the same names, or
    transformers would read them as the merge's; `new` is the record of the merge."""
    for name in (*files_in(folder), *_read_by_loaders(out)):
        target = out / name
        known = (recorded(out).get(name), new.get(name), hash_in(folder, name))
        own = name in replaced or target.name.startswith(f"{FIGURE_PREFIX}_") or hash_in(out, name) in known
        if own or not os.path.lexists(target):
            continue
        kept = target.with_name(target.name + KEPT_SUFFIX)
        number = 1
        while os.path.lexists(kept):
            number += 1
            kept = target.with_name(f"{target.name}{KEPT_SUFFIX}{number}")
        os.rename(target, kept)
        LOG.warning("%s is not from a merge of this package: kept as %s", show(target), show(kept.name))


def _drop(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)


def _foreign(out: Path) -> dict[str, str]:
    """Weight files in OUT, with their hashes, that differ (in size or in sampled bytes) from what a merge recorded."""
    known = [recorded(out)]
    merged = out / MERGED_FOLDER
    if merged.is_dir():  # a merge was killed during the move; some of its files are already in OUT
        known += [_replaced(merged), *(recorded(folder) for folder in merged.iterdir() if folder.is_dir())]
    found = {name: hash_in(out, name) for name in weight_files(out)}
    return {name: taken for name, taken in found.items() if all(each.get(name) != taken for each in known)}


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def free_bytes(out: Path) -> int:
    """Free bytes on the disk of `out`, which need not exist. Files that a killed merge left in it count as free."""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    left = sum(path.stat().st_size for path in (out / MERGING_FOLDER).rglob("*") if path.is_file())
    return shutil.disk_usage(existing).free + left
