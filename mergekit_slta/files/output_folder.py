"""The output folder: whose weights are in it, and how a merge replaces them without ever leaving a mixture.

Scope: files of OUT, no tensors. mergekit neither refuses nor clears a folder that holds a model: a one-file model left
beside a new sharded one silently wins in `from_pretrained`. So mergekit writes into a folder of its own inside OUT,
and only a finished merge is moved out of it. A small record, `slta_merge.json`, says which files a merge of
this package has put there; any other weights are somebody's, refused, and never touched.

    OUT/.slta_merging/NAME/    being written; after a failure only what was calibrated stays, for the next run
    OUT/.slta_calibrating/     what a merge calibrates before it writes; taken up by the next run if it is killed
    OUT/.slta_merged/NAME/     finished, being moved to OUT; a run that dies here is completed by the next one
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mergekit_slta.errors import OutputError, listing, show
from mergekit_slta.files.atomic import sampled_hash, write_text_atomically

try:
    import fcntl
except ImportError:  # Windows has no flock: two merges into one folder are the user's own care there
    fcntl = None  # type: ignore[assignment]

LOG = logging.getLogger(__name__)
ALPHAS_NAME = "slta_alphas.json"
STATISTICS_NAME = "slta_stats.safetensors"
RECORD_NAME = "slta_merge.json"
FORMAT = "mergekit-slta/merge"
_MERGING, _MERGED, _CALIBRATING = ".slta_merging", ".slta_merged", ".slta_calibrating"
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf)(\.index\.json)?$")
_LAST = "config.json"
"""Removed first and written last: without it, transformers loads nothing from a folder that is being changed."""


def weight_files(out: Path) -> list[str]:
    """Names of weight and index files in a folder, this package's statistics apart."""
    if not out.is_dir():
        return []
    names = (entry.name for entry in os.scandir(out) if entry.is_file())
    return sorted(name for name in names if _WEIGHTS.match(name) and name != STATISTICS_NAME)


def check_output(out: Path, inputs: Sequence[str]) -> None:
    """Refuse a folder in which a merge would do harm; changes nothing.

    Args:
        out: the output folder; need not exist.
        inputs: paths of the models that are merged.

    Raises:
        OutputError: it is a file, cannot be written to, is one of the inputs, is being merged into, or holds weights
            that no merge of this package recorded.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"the output {show(out)} is a file: name a folder")
    if any(os.path.exists(path) and out.exists() and os.path.samefile(path, out) for path in inputs):
        raise OutputError(f"the output {show(out)} is one of the models to merge: name another folder")
    check_writable(out)
    with locked(out, shared=True):
        foreign = _foreign(out)
    if foreign:
        raise OutputError(
            f"{show(out)} holds weights of another origin ({listing(foreign, 3)}): "
            "name another folder, or move them away"
        )


def check_writable(folder: Path) -> None:
    """Refuse a folder that can neither be written to nor made.

    Raises:
        OutputError: the nearest folder that exists is a file, or may not be written to.
    """
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise OutputError(f"cannot make {show(folder)}: {show(existing)} is a file; name another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write to {show(existing)}: choose a folder that you may write to")


@contextmanager
def locked(out: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold OUT for this process, where it exists. The system drops the lock with the process, however that ends.

    Args:
        out: the folder.
        shared: only look: others may look, too.

    Raises:
        OutputError: another process merges into it.
    """
    if fcntl is None or not out.is_dir():
        yield
        return
    handle = os.open(out, os.O_RDONLY)
    try:
        if not _acquired(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            holder = _read_text(out / _MERGING / "pid") or "unknown"
            raise OutputError(
                f"another merge (process {show(holder)}) is writing to {show(out)}: wait for it, or name another folder"
            )
        yield
    finally:
        os.close(handle)


def _acquired(handle: int, kind: int) -> bool:
    """Try for as long as others may take to look at the folder."""
    for _ in range(20):
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
        except OSError as error:  # a file system without locks: better unguarded than never
            LOG.warning("the output folder cannot be locked (%s): let no other merge write to it meanwhile", error)
            return True
        else:
            return True
    return False


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder for mergekit to write into; what it holds at the end replaces the earlier merge in OUT.

    Yields:
        The folder, named as OUT is. An error inside leaves OUT as it was.

    Raises:
        OutputError: another process merges into OUT, or weights of another origin have come there meanwhile.
    """
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        finish(out)
        staging = out / _MERGING
        folder = pending(out)
        if folder.is_dir():  # what a run that failed has left; what was calibrated for this one stays
            _keep_alphas_only(staging, folder)
        folder.mkdir(parents=True, exist_ok=True)
        (staging / "pid").write_text(str(os.getpid()))
        try:
            yield folder
            if _foreign(out):
                raise OutputError(
                    f"weights of another origin have come to {show(out)} during the merge: move them away"
                )
            _write_record(folder)
        except BaseException:
            _keep_alphas_only(staging, folder)
            raise
        os.rename(staging, out / _MERGED)  # from here on the merge is done, whatever happens
        finish(out)


def _keep_alphas_only(staging: Path, folder: Path) -> None:
    """What was calibrated for a merge that failed serves the next try."""
    for entry in folder.iterdir():
        if entry.name not in (ALPHAS_NAME, STATISTICS_NAME):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    if not any(folder.iterdir()):
        _drop(staging)


def pending(out: Path) -> Path:
    """Where a merge that failed or was killed has left its alphas and statistics."""
    return out / _MERGING / (Path(os.path.realpath(out)).name or "model")


def calibrating(out: Path) -> Path:
    """Where a merge calibrates before it takes the folder: apart from what another merge may be writing."""
    return out / _CALIBRATING


def forget_calibration(out: Path) -> None:
    """The merge is done, and OUT holds what was calibrated. Another run's unfinished work is left alone."""
    folder = calibrating(out)
    for name in (ALPHAS_NAME, STATISTICS_NAME):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def finish(out: Path) -> None:
    """Move a finished merge from its folder to OUT. May die anywhere and be called again; needs the lock."""
    merged = out / _MERGED
    folder = next((entry for entry in merged.iterdir() if entry.is_dir()), None) if merged.is_dir() else None
    if folder is not None:
        marker = merged / "replaces.json"
        if not marker.exists():  # fixed once: OUT's own record is overwritten on the way
            ours = [name for name, taken in _recorded(out).items() if _is_unchanged(out / name, taken)]
            write_text_atomically(marker, json.dumps(ours))
        replaced = json.loads(marker.read_text())
        if (folder / _LAST).exists():  # else it has been moved, and everything before it
            (out / _LAST).unlink(missing_ok=True)
        new = _recorded(folder) if (folder / RECORD_NAME).exists() else _recorded(out)
        for name in replaced:
            if name not in new:  # those that are get overwritten, or have been already
                (out / name).unlink(missing_ok=True)
        for entry in sorted(folder.iterdir(), key=lambda entry: (entry.name == _LAST, entry.name == RECORD_NAME)):
            _replace(entry, out / entry.name)
    _drop(merged)


def _is_unchanged(path: Path, taken: str) -> bool:
    return path.is_file() and not path.is_symlink() and sampled_hash(path) == taken


def _replace(source: Path, target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        raise OutputError(f"{show(target)} is a folder where the merge has a file: move it away and merge again")
    os.replace(source, target)


def _drop(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)


def _foreign(out: Path) -> list[str]:
    """Weight files in OUT that are not, byte for byte as far as samples tell, what a merge has recorded."""
    records = [_recorded(out)]
    if (out / _MERGED).is_dir():  # a merge died while it was moved: some files are its own already
        records += [_recorded(folder) for folder in (out / _MERGED).iterdir() if folder.is_dir()]
    foreign = []
    for name in weight_files(out):
        found = sampled_hash(out / name)
        if all(record.get(name) != found for record in records):
            foreign.append(name)
    return foreign


def _recorded(folder: Path) -> Mapping[str, str]:
    """Files that the record in a folder lists, with their hashes; none where there is no sound record."""
    try:
        record: Any = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    sound = isinstance(record, dict) and record.get("format") == FORMAT and isinstance(record.get("files"), dict)
    return {os.path.basename(name): taken for name, taken in record["files"].items()} if sound else {}


def _write_record(folder: Path) -> None:
    files = {entry.name: sampled_hash(entry) for entry in sorted(folder.iterdir()) if entry.is_file()}
    content = {"format": FORMAT, "version": 1, "files": files}
    write_text_atomically(folder / RECORD_NAME, json.dumps(content, indent=1) + "\n")


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def free_bytes(out: Path) -> int:
    """Bytes left on the disk that `out` is or will be on, what a killed merge has left in it counted as free."""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    left = sum(path.stat().st_size for path in (out / _MERGING).rglob("*") if path.is_file())
    return shutil.disk_usage(existing).free + left
