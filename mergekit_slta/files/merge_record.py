"""The record `slta_merge.json` of an output folder: the files that a merge of this package put there, with hashes; what
the merge took; and which of its models and datasets are on the Hub.

Scope: paths are relative to the folder, with `/` between their parts. Files that are changed or added later are not the
merge's any more.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mergekit_slta.files.atomic import write_text_atomically
from mergekit_slta.files.identity import hash_text
from mergekit_slta.files.names import MERGE_RECORD_NAME

FORMAT = "mergekit-slta/merge"
VERSION = 1
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_NONE = "none"


def files_in(folder: Path) -> list[str]:
    """Relative paths of all files in a folder and its subfolders, sorted."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def parents_in(name: str) -> list[str]:
    """The subfolders on the way to a file, innermost first."""
    return [str(parent) for parent in PurePosixPath(name).parents if parent.parts]


def has_record(folder: Path) -> bool:
    """Whether a merge of this package wrote into a folder."""
    return _read(folder) is not None


def recorded(folder: Path) -> Mapping[str, str]:
    """Read a folder's record: relative path -> hash; empty if there is no valid record.

    The record may come from a stranger, so paths that lead out of the folder are left out.
    """
    return {name: taken for name, taken in (_read(folder) or {}).items() if _is_inside(name)}


def _read(folder: Path) -> dict[str, str] | None:
    record = _content(folder)
    return record["files"] if isinstance(record.get("files"), dict) else None


def _content(folder: Path) -> dict[str, Any]:
    try:
        record: Any = json.loads((folder / MERGE_RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    is_record = isinstance(record, dict) and (record.get("format"), record.get("version")) == (FORMAT, VERSION)
    return record if is_record else {}


@dataclass(frozen=True)
class Took:
    """What a merge took. It differs from run to run, so it is kept beside the hashes, and not with the alphas.

    Attributes:
        seconds: phase -> seconds; of a run that went on where another stopped, or used alphas that were there, only its
            own.
        device, threads: the device of the calibration, and the number of threads of its computations on the CPU.
        device_bytes: memory of the device in use at the peak; None on a CPU.
    """

    seconds: dict[str, float]
    device: str
    threads: int
    device_bytes: int | None = None


def record_took(folder: Path, took: Took) -> None:
    """Add what a merge took to its folder's record."""
    _update(folder, took=asdict(took))


def recorded_took(folder: Path) -> Took | None:
    """What a folder's merge took; None if the record does not say it."""
    found = _content(folder).get("took")
    try:
        seconds = {str(name)[:40]: float(value) for name, value in found["seconds"].items()}
        is_valid = bool(seconds) and all(map(math.isfinite, seconds.values()))
        size = found.get("device_bytes")
        took = Took(seconds, str(found["device"]), int(found["threads"]), None if size is None else int(size))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return None
    return took if is_valid else None


class Source(BaseModel):
    """Where a model or a dataset of a merge comes from. It may not be known any more when a card is written.

    Attributes:
        hub: ids on the Hub, of a model and of its adapter; None in place of what is a local folder or file.
        license: what its own card says of its licence, by key: `license`, `license_name`, `license_link`. Empty if it
            says nothing, or there is no card.
    """

    model_config = ConfigDict(frozen=True)

    hub: tuple[str | None, ...]
    license: dict[str, str] = {}


class Sources(BaseModel):
    """The sources of a merge.

    Attributes:
        models: name in the alphas file -> source; of the base, too.
        datasets: name in the alphas file -> source.
    """

    model_config = ConfigDict(frozen=True)

    models: dict[str, Source] = {}
    datasets: dict[str, Source] = {}


def record_sources(folder: Path, sources: Sources) -> None:
    """Add the sources of a merge to its folder's record."""
    _update(folder, sources=sources.model_dump(mode="json"))


def recorded_sources(folder: Path) -> Sources:
    """The sources of a folder's merge; empty if the record does not say them."""
    try:
        return Sources.model_validate(_content(folder).get("sources", {}))
    except ValidationError:
        return Sources()


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def unchanged(folder: Path, files: Mapping[str, str]) -> dict[str, str]:
    """Those of some recorded files that are in the folder as they were recorded."""
    return {name: taken for name, taken in files.items() if taken != _NONE and hash_in(folder, name) == taken}


def hash_in(folder: Path, name: str) -> str:
    """Hash of a file, or of the path in a link; "none" if there is no file, or a subfolder on the way is a link."""
    path = folder / name
    if any((folder / part).is_symlink() for part in parents_in(name)):
        return _NONE
    if path.is_symlink():
        return hash_text(os.readlink(path))
    return _sampled_hash(path) if path.is_file() else _NONE


def record(folder: Path, names: Iterable[str]) -> None:
    """Add files, as they are now, to a folder's record. The record itself is left out."""
    hashes = {name: hash_in(folder, name) for name in names if name != MERGE_RECORD_NAME}
    _update(folder, files=dict(sorted({**recorded(folder), **hashes}.items())))


def _update(folder: Path, **changes: object) -> None:
    content = {"format": FORMAT, "version": VERSION, "files": {}, **_content(folder), **changes}
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


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove files, and the subfolders that this leaves empty."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
        for parent in parents_in(name):
            try:
                os.rmdir(folder / parent)
            except OSError:  # not empty, or gone
                break
