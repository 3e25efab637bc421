"""Results of the finished parts of a long run, on disk, so that a killed run continues where it stopped.

Scope: a folder with one file per part, each written whole or not at all. The folder carries the fingerprint of what is
being computed; a run with another fingerprint removes it and starts over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_slta.errors import OutputError, show
from mergekit_slta.files.atomic import write_atomically, write_text_atomically

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None  # type: ignore[assignment]

LOG = logging.getLogger(__name__)
FORMAT = "mergekit-slta/resume"
_MARKER = "resume.json"
_ACTIVATIONS = "activations"
_OWN = re.compile(rf"\.?(resume\.json|[0-9a-f]{{24}}\.safetensors)(\..+)?|.*{_ACTIVATIONS}")
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
        self._is_open = False

    def __enter__(self) -> ResumeStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        self._lock.close()

    def open(self) -> None:
        """Lock the folder and list the parts that an earlier run with the same fingerprint has finished.

        Files of a run with another fingerprint are removed.

        Raises:
            OutputError: another process uses the folder, or it holds files that are not from here.
        """
        if self._is_open:
            return
        self._lock.enter_context(_locked(self.folder))
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

    def _marker(self) -> str | None:
        """The folder's fingerprint; None where its marker is missing or damaged."""
        try:
            content = json.loads((self.folder / _MARKER).read_text(encoding="utf-8"))
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
        return self.folder / f"{label}{_ACTIVATIONS}"

    def _begin(self) -> None:
        if not (self.folder / _MARKER).exists():
            write_text_atomically(
                self.folder / _MARKER, json.dumps({"format": FORMAT, "fingerprint": self.fingerprint}) + "\n"
            )

    def remove(self) -> None:
        """Remove everything. The marker goes first: files that a kill leaves behind then count as nobody's results."""
        if self._is_open and self.folder.is_dir():
            (self.folder / _MARKER).unlink(missing_ok=True)
            shutil.rmtree(self.folder)
        self._finished = {}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from a folder; the system lets go with the process, however that ends.

    Raises:
        OutputError: another process has it, or the lock's file is a link.
    """
    if fcntl is None:
        yield
        return
    path = folder.with_name(folder.name + ".lock")
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise OutputError(f"cannot write {show(path)}: {error.strerror}; choose another folder") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (path.exists() and os.path.samestat(os.fstat(handle), os.stat(path))):
                raise BlockingIOError  # its holder has just finished, and removed it
        except BlockingIOError as error:
            holder = show(os.read(handle, 20).decode(errors="replace").strip() or "unknown")
            raise OutputError(
                f"another process ({holder}) works on {show(folder.parent)} already: wait for it, or write elsewhere"
            ) from error
        except OSError as error:  # a file system without locks: better unguarded than never
            LOG.warning("%s cannot be locked (%s): let no other run write there meanwhile", show(path), error)
        os.truncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # folders that hold something by now
                for parent in made:
                    parent.rmdir()
    finally:
        os.close(handle)
