"""Write a file atomically: completely, or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from mergekit_slta.errors import OutputError, show

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_NEW_FILE = os.O_CREAT | os.O_EXCL | os.O_WRONLY


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it to `path`.

    The file gets the permissions of a new file: `0o666` minus the process's umask.

    Raises:
        OutputError: it is no path, the folder cannot be written to, or the disk is full; `path` is then unchanged.
    """
    temporary: Path | None = None
    try:
        candidate = _candidate(path)
        candidate.parent.mkdir(parents=True, exist_ok=True)
        # The kernel applies the umask. Reading the umask would need os.umask(), which sets it for all threads.
        handle = os.open(candidate, _NEW_FILE, 0o666)
        temporary = candidate
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
        os.close(handle)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)  # `write` may have replaced the file
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(
            f"cannot write {show(path)}: {error.strerror or error}; choose a folder that is writable and has room",
            code=write_error_code(error),
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _candidate(path: str | os.PathLike[str]) -> Path:
    """A new name beside `path`."""
    try:
        target = Path(path)
        if "\0" in str(target):
            raise ValueError("it has a NUL character")
        return target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    except (TypeError, ValueError) as error:
        raise OutputError(
            f"cannot write {show(path)}: {show(error)}; choose a folder that is writable and has room",
            code="cannot-write",
        ) from error


def write_error_code(error: OSError) -> str:
    """The `code` of an OutputError for a write that failed."""
    return "disk-full" if error.errno in _FULL else "cannot-write"


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path` (see `write_atomically`)."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
