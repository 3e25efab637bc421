"""Keep other processes from a file or folder. The system releases a lock with the process, however that ends.

Scope: the lock itself; what to say when another process holds it is the caller's. A second lock of the same process
counts as another process's.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mergekit_slta.errors import OutputError, show

try:
    import fcntl
except ImportError:  # Windows has no flock: there, users must not start two runs on one path
    fcntl = None  # type: ignore[assignment]

LOG = logging.getLogger(__name__)
_POLL_SECONDS = 0.1


@contextmanager
def folder_lock(
    folder: Path, busy: Callable[[], OutputError], *, shared: bool = False, wait_seconds: float = 0.0
) -> Iterator[None]:
    """Lock an existing folder; does nothing where it does not exist.

    Args:
        folder: locked itself; no file is made.
        busy: makes the error for a folder that another process holds.
        shared: several processes may hold a shared lock at once.
        wait_seconds: how long to wait for another process.

    Raises:
        OutputError: what `busy` made.
    """
    if fcntl is None or not folder.is_dir():
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        if not _acquired(handle, folder, shared=shared, wait_seconds=wait_seconds):
            raise busy()
        yield
    finally:
        os.close(handle)


@contextmanager
def file_lock(path: Path, busy: Callable[[str], OutputError]) -> Iterator[None]:
    """Lock the file `path`, which is made for this and removed afterwards, with folders that were missing.

    Args:
        path: holds the number of the process that has the lock.
        busy: makes the error for a lock that another process holds; gets that process's number, or "unknown".

    Raises:
        OutputError: what `busy` made; or the file is a link or cannot be made.
    """
    if fcntl is None:
        yield
        return
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise OutputError(
            f"cannot write {show(path)}: {error.strerror}; choose another folder", code="cannot-write"
        ) from error
    try:
        if not _acquired(handle, path) or not _is_open_file(handle, path):
            raise busy(os.read(handle, 20).decode(errors="replace").strip() or "unknown")
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


def _acquired(handle: int, path: Path, *, shared: bool = False, wait_seconds: float = 0.0) -> bool:
    """Whether the lock of an open file was taken; True as well where the file system has no locks."""
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    for attempt in range(1 + round(wait_seconds / _POLL_SECONDS)):
        if attempt:
            time.sleep(_POLL_SECONDS)
        try:
            fcntl.flock(handle, operation)
        except BlockingIOError:
            continue
        except OSError as error:  # a run without a lock is better than none
            LOG.warning("%s cannot be locked (%s): start no other run that writes there meanwhile", show(path), error)
        return True
    return False


def _is_open_file(handle: int, path: Path) -> bool:
    """Whether `path` is still the open file: a holder that has just finished has removed it."""
    return path.exists() and os.path.samestat(os.fstat(handle), os.stat(path))
