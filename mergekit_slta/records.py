"""Steps of a long run that are finished, on disk, so that a killed run goes on where it was.

Scope: a folder of records, each written whole or not at all and bound to the fingerprint of what is being computed. A
run of anything else finds none of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_slta.errors import OutputError, show
from mergekit_slta.files import write_atomically, write_text_atomically

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None  # type: ignore[assignment]

FORMAT = "mergekit-slta/records"
_MARKER = "records.json"


class Records:
    """Tensors by step, kept until `remove`.

    Args:
        folder: where they lie; made on first use. What is there for another fingerprint is removed.
        fingerprint: of what is being computed.

    Raises:
        OutputError: something else lies there.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self._steps: dict[str, Path] = {}
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise OutputError(f"{show(folder)} is in the way of unfinished work: move it")
        if not folder.is_dir():
            return
        found = self._marker()
        if found is None and any(folder.iterdir()):
            raise OutputError(f"{show(folder)} is in the way of unfinished work: move it")
        if found != fingerprint:
            shutil.rmtree(folder)
            return
        for path in folder.glob("*.safetensors"):
            try:
                with safe_open(path, framework="pt") as file:
                    self._steps[(file.metadata() or {})["step"]] = path
            except (OSError, SafetensorError, KeyError):  # a broken disk: computed again
                path.unlink(missing_ok=True)

    def _marker(self) -> str | None:
        """The fingerprint of the folder; "" where its marker is damaged, None where there is none."""
        try:
            content = json.loads((self.folder / _MARKER).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return ""
        return str(content.get("fingerprint")) if isinstance(content, dict) else ""

    @property
    def steps(self) -> frozenset[str]:
        """Names of the steps that are finished."""
        return frozenset(self._steps)

    def get(self, step: str) -> dict[str, Tensor]:
        """The tensors of a finished step."""
        with safe_open(self._steps[step], framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping

    def put(self, step: str, tensors: Mapping[str, Tensor]) -> None:
        """Finish a step."""
        self._open()
        path = self.folder / f"{hashlib.sha256(step.encode()).hexdigest()[:24]}.safetensors"
        kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomically(path, lambda temporary: save_file(kept, temporary, metadata={"step": step}))
        self._steps[step] = path

    def subfolder(self, name: str) -> Path:
        """A folder for large intermediate files of one step."""
        self._open()
        return self.folder / name

    def _open(self) -> None:
        if not (self.folder / _MARKER).exists():
            write_text_atomically(
                self.folder / _MARKER, json.dumps({"format": FORMAT, "fingerprint": self.fingerprint}) + "\n"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from working on the same; the system lets go with the process, however that ends.

        Raises:
            OutputError: another process does.
        """
        if fcntl is None:
            yield
            return
        path = self.folder.with_name(self.folder.name + ".lock")
        made = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                holder = show(file.read(20).strip() or "unknown")
                raise OutputError(
                    f"another process ({holder}) is calibrating for {show(self.folder.parent)}: wait for it, or write "
                    "somewhere else"
                ) from error
            except OSError:  # a file system without locks: better unguarded than never
                pass
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                with suppress(OSError):  # folders that hold something by now
                    for folder in made:
                        folder.rmdir()

    def remove(self) -> None:
        """All is done, and written elsewhere."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)
        self._steps = {}
