"""Writing a file whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from mergekit_slta.errors import OutputError, show


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it to `path`.

    Raises:
        OutputError: the folder cannot be written to or the disk is full; `path` is then as it was.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(
            f"cannot write {show(path)}: {error.strerror or error}; choose a folder that is writable and has room"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all (see `write_atomically`)."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sampled_hash(path: Path, samples: int = 64, sample_bytes: int = 4096) -> str:
    """Hash of a file's size and of up to `samples` pieces mean_std over it: a few milliseconds for 5 GB."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size};".encode())
    step = max(sample_bytes, (size - sample_bytes) // max(1, samples - 1))
    with open(path, "rb", buffering=0) as file:
        for offset in range(0, size, step):
            file.seek(offset)
            digest.update(file.read(sample_bytes))
    return digest.hexdigest()
