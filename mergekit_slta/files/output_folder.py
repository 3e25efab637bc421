"""The output folder OUT: whose weights it holds, and how a merge replaces them without ever leaving a mixture.

Scope: files of OUT, no tensors. mergekit neither refuses nor clears a folder that holds a model, and
`from_pretrained` prefers an old one-file model to a new sharded one beside it. So mergekit writes into a folder inside
OUT, and only a finished merge is moved out of it. The record `slta_merge.json` lists the files that a merge of this
package put into OUT. Any other weights belong to somebody else: they are refused and never touched.

    OUT/.slta_merging/NAME/    being written; after a failure only its alphas and statistics stay, for the next run
    OUT/.slta_calibrating/     what a merge calibrates before it locks OUT; the next run resumes it after a kill
    OUT/.slta_merged/NAME/     finished, being moved to OUT; if the run dies here, the next one completes the move
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
"""How long a lock is waited for: another process may be checking the folder, which takes less."""
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def weight_files(out: Path) -> list[str]:
    """Names of the weight and index files in a folder, without this package's statistics."""
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
    """Hold OUT for this process, where it exists; `shared` to read only.

    Raises (on entering):
        OutputError: another process merges into it.
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
    """A folder for mergekit to write into. When the block ends, its files replace the earlier merge in OUT.

    Yields:
        The folder; its name is OUT's. An error inside the block leaves OUT as it was.

    Raises:
        OutputError: another process merges into OUT, or somebody put other weights there during the merge.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        finish(out)
        staging = out / MERGING_FOLDER
        folder = pending(out)
        if folder.is_dir():  # left by a run that failed; its alphas and statistics are this merge's
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
        os.rename(staging, out / MERGED_FOLDER)  # from here on the merge is done, whatever happens
        finish(out)


def _keep_alphas_only(staging: Path, folder: Path) -> None:
    """Remove all files of a failed merge but the alphas and statistics, which serve the next try."""
    for entry in folder.iterdir():
        if entry.name not in (ALPHAS_NAME, STATISTICS_NAME):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    if not any(folder.iterdir()):
        _drop(staging)


def pending(out: Path) -> Path:
    """Where a merge that failed or was killed leaves its alphas and statistics."""
    return out / MERGING_FOLDER / (Path(os.path.realpath(out)).name or "model")


def calibrating(out: Path) -> Path:
    """Where a merge calibrates before it locks OUT: apart from what another merge may be writing."""
    return out / CALIBRATING_FOLDER


def forget_calibration(out: Path) -> None:
    """Remove the calibrated files once OUT holds them. Unfinished work of another run stays."""
    folder = calibrating(out)
    for name in (ALPHAS_NAME, STATISTICS_NAME):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def finish(out: Path) -> None:
    """Move a finished merge to OUT. It may be killed at any moment and called again; the caller holds the lock.

    `config.json` is removed first and written last: without it, transformers loads nothing from a folder that is being
    changed.

    Raises:
        OutputError: OUT has a folder where the merge has a file.
    """
    merged = out / MERGED_FOLDER
    folder = next((entry for entry in merged.iterdir() if entry.is_dir()), None) if merged.is_dir() else None
    if folder is not None:
        marker = merged / REPLACED_NAME
        if not marker.exists():  # written once: the move overwrites OUT's own record
            ours = [name for name, taken in _recorded(out).items() if _is_unchanged(out / name, taken)]
            write_text_atomically(marker, json.dumps(ours))
        replaced = json.loads(marker.read_text())
        if (folder / CONFIG_NAME).exists():  # else it has been moved, and everything before it
            (out / CONFIG_NAME).unlink(missing_ok=True)
        new = _recorded(folder) if (folder / MERGE_RECORD_NAME).exists() else _recorded(out)
        for name in replaced:
            if name not in new:  # the others are overwritten below, or have been already
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
    if (out / MERGED_FOLDER).is_dir():  # a merge was killed during the move: some of its files are in OUT already
        records += [_recorded(folder) for folder in (out / MERGED_FOLDER).iterdir() if folder.is_dir()]
    foreign = []
    for name in weight_files(out):
        found = _sampled_hash(out / name)
        if all(record.get(name) != found for record in records):
            foreign.append(name)
    return foreign


def _recorded(folder: Path) -> Mapping[str, str]:
    """File name -> hash, as the record in a folder lists them; empty where there is no sound record."""
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
    """Hash of a file's size and of pieces spread evenly over it: a few milliseconds for 5 GB."""
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
    """Free bytes on the disk that `out` is or will be on. Files that a killed merge left in it count as free."""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    left = sum(path.stat().st_size for path in (out / MERGING_FOLDER).rglob("*") if path.is_file())
    return shutil.disk_usage(existing).free + left
