"""Store the results of finished parts of a long run on disk, so that a killed run can resume.

Scope: a folder with one file per part, written atomically, and a marker file with the fingerprint of the job. A run
with another fingerprint removes the folder's content and starts from the beginning.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import date
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_slta.errors import OutputError, show
from mergekit_slta.files.atomic import write_atomically, write_text_atomically
from mergekit_slta.files.lock import file_lock
from mergekit_slta.files.names import ACTIVATIONS_FOLDER, RESUME_MARKER_NAME, lock_path

FORMAT = "mergekit-slta/resume"
_OWN = re.compile(
    rf"\.?({re.escape(RESUME_MARKER_NAME)}|[0-9a-f]{{24}}\.safetensors)(\..+)?|.*{re.escape(ACTIVATIONS_FOLDER)}"
)
"""Names of the files that this package writes here, including temporary ones. Other files are not touched."""


class ResumeStore:
    """Stores the tensors of each finished part under a key, until `remove`. Leaving the context releases the lock.

    The disk is not read before `open`.

    Args:
        folder: folder of the files; created when the first part is stored.
        fingerprint: hash of the job, the library versions and the device.
        day: the date that chat templates wrote into the job's rows, or None. It is stored, so that a run after midnight
            can draw the same rows.
    """

    def __init__(self, folder: Path, fingerprint: str, day: date | None = None) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self._note = {} if day is None else {"date": day.isoformat()}
        self._finished: dict[str, Path] = {}
        self._lock = ExitStack()
        self._is_locked = self._is_open = False

    def __enter__(self) -> ResumeStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_locked = self._is_open = False
        self._lock.close()

    def lock(self) -> None:
        """Lock the folder, and thereby the file whose unfinished work it holds, against other processes.

        Raises:
            OutputError: another process uses the folder.
        """
        if not self._is_locked:
            self._lock.enter_context(file_lock(lock_path(self.folder), self._busy))
            self._is_locked = True

    def open(self) -> None:
        """Lock the folder and list the parts that an earlier run with the same fingerprint has finished.

        Files of a run with another fingerprint are removed.

        Raises:
            OutputError: another process uses the folder, or it holds other files.
        """
        if self._is_open:
            return
        self.lock()
        self._is_open = True
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise self._in_the_way()
        if not self.folder.is_dir():
            return
        if not all(_OWN.fullmatch(entry.name) for entry in self.folder.iterdir()):
            raise self._in_the_way()
        if self._marker() != self.fingerprint:
            self.remove()
            return
        for path in self.refresh():
            path.unlink(missing_ok=True)

    def refresh(self) -> list[Path]:
        """List the parts that are finished, also by other processes of the same job; returns the damaged files."""
        damaged = []
        for path in self.folder.glob("*.safetensors") if self._marker() == self.fingerprint else ():
            try:
                with safe_open(path, framework="pt") as file:
                    self._finished[(file.metadata() or {})["key"]] = path
            except (OSError, SafetensorError, KeyError):
                damaged.append(path)
        return damaged

    def _in_the_way(self) -> OutputError:
        return OutputError(f"{show(self.folder)} is in the way of unfinished work: move it", code="path-in-the-way")

    def _busy(self, holder: str) -> OutputError:
        return OutputError(
            f"another process ({show(holder)}) works on {show(self.folder.parent)} already: wait for it, or write "
            "elsewhere",
            code="in-use",
        )

    def _marker(self) -> str | None:
        """The fingerprint in the folder's marker; None if the marker is missing or damaged."""
        try:
            content = json.loads((self.folder / RESUME_MARKER_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return str(content.get("fingerprint")) if isinstance(content, dict) else None

    @property
    def finished(self) -> frozenset[str]:
        """Keys of the finished parts."""
        return frozenset(self._finished)

    def get(self, key: str) -> dict[str, Tensor]:
        """Read the tensors of a finished part, as `put` stored them."""
        with safe_open(self._finished[key], framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping

    def mapped(self, key: str) -> dict[str, Tensor]:
        """As `get`, but the tensors are memory-mapped."""
        with safe_open(self._finished[key], framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors of a part; it then counts as finished."""
        self._begin()
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
        kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomically(path, lambda temporary: save_file(kept, temporary, metadata={"key": key}))
        self._finished[key] = path

    def activations_folder(self, label: str = "") -> Path:
        """Path for the activations of the pass `label`; the caller creates and removes the folder."""
        self._begin()
        return self.folder / f"{label}{ACTIVATIONS_FOLDER}"

    def _begin(self) -> None:
        if not (self.folder / RESUME_MARKER_NAME).exists():
            content = {"format": FORMAT, "fingerprint": self.fingerprint, **self._note}
            write_text_atomically(self.folder / RESUME_MARKER_NAME, json.dumps(content) + "\n")

    def remove(self) -> None:
        """Remove the folder. The marker is removed first, so that files left by a kill are not used as results."""
        if self._is_open and self.folder.is_dir():
            (self.folder / RESUME_MARKER_NAME).unlink(missing_ok=True)
            shutil.rmtree(self.folder)
        self._finished = {}
