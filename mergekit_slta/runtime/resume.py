"""Results of the finished parts of a long run, on disk, so that a killed run continues where it stopped.

Scope: a folder with one file per part, each written whole or not at all. The folder carries the fingerprint of what is
being computed; a run with another fingerprint removes it and starts over.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
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
"""Names of the files written here, temporary ones included. Anything else in the folder belongs to somebody else."""


class ResumeStore:
    """Tensors by the key of the part that computed them, kept until `remove`. A context manager that holds the lock.

    Nothing on disk is read before `open`.

    Args:
        folder: holds the files; made when the first part is stored.
        fingerprint: hash of what is computed, and of the versions and the device that compute it.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self._finished: dict[str, Path] = {}
        self._lock = ExitStack()
        self._is_locked = self._is_open = False

    def __enter__(self) -> ResumeStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_locked = self._is_open = False
        self._lock.close()

    def lock(self) -> None:
        """Keep other processes from this folder, and from the file whose unfinished work it holds.

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
            OutputError: another process uses the folder, or it holds files that are not from here.
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
        for path in self.folder.glob("*.safetensors"):
            try:
                with safe_open(path, framework="pt") as file:
                    self._finished[(file.metadata() or {})["key"]] = path
            except (OSError, SafetensorError, KeyError):  # damaged: this part is computed again
                path.unlink(missing_ok=True)

    def _in_the_way(self) -> OutputError:
        return OutputError(f"{show(self.folder)} is in the way of unfinished work: move it", code="path-in-the-way")

    def _busy(self, holder: str) -> OutputError:
        return OutputError(
            f"another process ({show(holder)}) works on {show(self.folder.parent)} already: wait for it, or write "
            "elsewhere",
            code="in-use",
        )

    def _marker(self) -> str | None:
        """The folder's fingerprint; None where its marker is missing or damaged."""
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
        """The tensors of a finished part."""
        with safe_open(self._finished[key], framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors of a part, which is finished then."""
        self._begin()
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
        kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomically(path, lambda temporary: save_file(kept, temporary, metadata={"key": key}))
        self._finished[key] = path

    def activations_folder(self, label: str = "") -> Path:
        """The folder for the activations of the pass with this label; the caller makes and removes it."""
        self._begin()
        return self.folder / f"{label}{ACTIVATIONS_FOLDER}"

    def _begin(self) -> None:
        if not (self.folder / RESUME_MARKER_NAME).exists():
            write_text_atomically(
                self.folder / RESUME_MARKER_NAME, json.dumps({"format": FORMAT, "fingerprint": self.fingerprint}) + "\n"
            )

    def remove(self) -> None:
        """Remove everything. The marker goes first: files that a kill leaves behind then count as nobody's results."""
        if self._is_open and self.folder.is_dir():
            (self.folder / RESUME_MARKER_NAME).unlink(missing_ok=True)
            shutil.rmtree(self.folder)
        self._finished = {}
