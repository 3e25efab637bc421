"""The output folder OUT: check what it holds, and replace an earlier merge without ever mixing two merges.

Scope: files of OUT, no tensors. mergekit neither refuses nor clears a folder that holds a model, and
`from_pretrained` prefers an old one-file model to a new sharded one beside it. So mergekit writes into a folder inside
OUT, and only a finished merge is moved to OUT. The record `slta_merge.json` lists the files that a merge of this
package put into OUT. A folder with any other weights is refused, and these files are never touched.

    OUT/.slta_merging/NAME/    the merge being written; after a failure only its alphas and statistics stay
    OUT/.slta_calibrating/     the calibration before OUT is locked; after a kill the next run resumes it
    OUT/.slta_merged/NAME/     a finished merge being moved to OUT; after a kill the next run completes the move
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from mergekit_slta.errors import OutputError, listing, show
from mergekit_slta.files.atomic import write_text_atomically
from mergekit_slta.files.lock import folder_lock
from mergekit_slta.files.names import (
    ALPHAS_NAME,
    CALIBRATING_FOLDER,
    CONFIG_NAME,
    MERGE_RECORD_NAME,
    MERGED_FOLDER,
    MERGING_FOLDER,
    PID_NAME,
    REPLACED_NAME,
    STATISTICS_NAME,
)
from mergekit_slta.files.targets import check_writable

FORMAT = "mergekit-slta/merge"
VERSION = 1
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf)(\.index\.json)?$")
_WAIT_SECONDS = 2.0
"""How long to wait for the lock. A check of the folder by another process takes less."""
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def weight_files(out: Path) -> list[str]:
    """Names of the weight and index files in a folder, except this package's statistics."""
    if not out.is_dir():
        return []
    names = (entry.name for entry in os.scandir(out) if entry.is_file())
    return sorted(name for name in names if _WEIGHTS.match(name) and name != STATISTICS_NAME)


def check_output(out: Path, inputs: Sequence[str]) -> None:
    """Check that a merge into a folder destroys nothing; changes nothing.

    Args:
        out: the output folder; need not exist.
        inputs: paths of the models to merge.

    Raises:
        OutputError: `out` is a file, cannot be written to, is one of the inputs, is being merged into, or holds weights
            that no merge of this package recorded.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"the output {show(out)} is a file: name a folder", code="not-a-folder")
    if any(os.path.exists(path) and out.exists() and os.path.samefile(path, out) for path in inputs):
        raise OutputError(
            f"the output {show(out)} is one of the models to merge: name another folder", code="output-is-an-input"
        )
    check_writable(out)
    with _locked(out, shared=True):
        foreign = _foreign(out)
    if foreign:
        raise OutputError(
            f"{show(out)} holds weights that no merge of this package wrote ({listing(foreign, 3)}): "
            "name another folder, or move them away",
            code="foreign-weights",
        )


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
def staged(out: Path) -> Iterator[Path]:
    """Yield a folder for mergekit to write into; when the block ends, its files replace the earlier merge in OUT.

    Yields:
        The folder, with the same name as OUT. If the block raises, OUT stays as it was.

    Raises:
        OutputError: another process is merging into OUT, or other weights were put there during the merge.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        finish(out)
        staging = out / MERGING_FOLDER
        folder = pending(out)
        if folder.is_dir():  # left by a run that failed; this merge uses its alphas and statistics
            _keep_alphas_only(staging, folder)
        folder.mkdir(parents=True, exist_ok=True)
        (staging / PID_NAME).write_text(str(os.getpid()))
        try:
            yield folder
            if _foreign(out):
                raise OutputError(
                    f"somebody put other weights into {show(out)} during the merge: move them away and merge again",
                    code="foreign-weights",
                )
            _write_record(folder)
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


def forget_calibration(out: Path) -> None:
    """Remove the alphas and statistics in `calibrating`, once OUT holds them. Unfinished work of other runs stays."""
    folder = calibrating(out)
    for name in (ALPHAS_NAME, STATISTICS_NAME):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def finish(out: Path) -> None:
    """Move a finished merge to OUT. If it is killed, calling it again completes the move. The caller holds the lock.

    `config.json` is removed first and written last. Without it transformers refuses to load the half-moved model.

    Raises:
        OutputError: OUT has a folder where the merge has a file.
    """
    merged = out / MERGED_FOLDER
    folder = next((entry for entry in merged.iterdir() if entry.is_dir()), None) if merged.is_dir() else None
    if folder is not None:
        marker = merged / REPLACED_NAME
        if not marker.exists():  # written before the first move, because the move overwrites OUT's record
            ours = [name for name, taken in _recorded(out).items() if _is_unchanged(out / name, taken)]
            write_text_atomically(marker, json.dumps(ours))
        replaced = json.loads(marker.read_text())
        if (folder / CONFIG_NAME).exists():  # else all files are already moved, because it is the last
            (out / CONFIG_NAME).unlink(missing_ok=True)
        new = _recorded(folder) if (folder / MERGE_RECORD_NAME).exists() else _recorded(out)
        for name in replaced:
            if name not in new:  # files in `new` are overwritten by the move
                (out / name).unlink(missing_ok=True)
        for entry in sorted(
            folder.iterdir(), key=lambda entry: (entry.name == CONFIG_NAME, entry.name == MERGE_RECORD_NAME)
        ):
            _replace(entry, out / entry.name)
    _drop(merged)


def _is_unchanged(path: Path, taken: str) -> bool:
    return path.is_file() and not path.is_symlink() and _sampled_hash(path) == taken


def _replace(source: Path, target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        raise OutputError(
            f"{show(target)} is a folder where the merge has a file: move it away and merge again",
            code="not-a-plain-file",
        )
    os.replace(source, target)


def _drop(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)


def _foreign(out: Path) -> list[str]:
    """Weight files in OUT that differ (in size or in sampled bytes) from what a merge has recorded."""
    records = [_recorded(out)]
    if (out / MERGED_FOLDER).is_dir():  # a merge was killed during the move; some of its files are already in OUT
        records += [_recorded(folder) for folder in (out / MERGED_FOLDER).iterdir() if folder.is_dir()]
    foreign = []
    for name in weight_files(out):
        found = _sampled_hash(out / name)
        if all(record.get(name) != found for record in records):
            foreign.append(name)
    return foreign


def _recorded(folder: Path) -> Mapping[str, str]:
    """Read the record in a folder: file name -> hash; empty if there is no valid record."""
    try:
        record: Any = json.loads((folder / MERGE_RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_record = isinstance(record, dict) and (record.get("format"), record.get("version")) == (FORMAT, VERSION)
    if not (is_record and isinstance(record.get("files"), dict)):
        return {}
    return {os.path.basename(name): taken for name, taken in record["files"].items()}


def _write_record(folder: Path) -> None:
    files = {entry.name: _sampled_hash(entry) for entry in sorted(folder.iterdir()) if entry.is_file()}
    content = {"format": FORMAT, "version": VERSION, "files": files}
    write_text_atomically(folder / MERGE_RECORD_NAME, json.dumps(content, indent=1) + "\n")


def _sampled_hash(path: Path) -> str:
    """Hash a file's size and samples spread evenly over it; takes a few milliseconds for 5 GB."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size};".encode())
    stride = max(_SAMPLE_BYTES, (size - _SAMPLE_BYTES) // max(1, _SAMPLES - 1))
    with open(path, "rb", buffering=0) as file:
        for offset in range(0, size, stride):
            file.seek(offset)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


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
