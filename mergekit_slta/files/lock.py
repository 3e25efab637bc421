"""Lock a file or folder against other processes. The operating system releases the lock when the process ends.

Scope: the lock; the caller supplies the error for a lock that is held. A second lock in the same process fails, too.
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
except ImportError:  # Windows has no flock; users must not start two runs on one path there
    fcntl = None  # type: ignore[assignment]

LOG = logging.getLogger(__name__)
_POLL_SECONDS = 0.1


@contextmanager
def folder_lock(
    folder: Path, busy: Callable[[], OutputError], *, shared: bool = False, wait_seconds: float = 0.0
) -> Iterator[None]:
    """Lock a folder; does nothing if it does not exist.

    Args:
        folder: the folder; no lock file is created.
        busy: makes the error if another process holds the lock.
        shared: several processes may hold a shared lock at once.
        wait_seconds: how long to wait for the lock.

    Raises:
        OutputError: another process holds the lock; the error is from `busy`.
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
    """Create and lock the file `path`; it and the folders created for it are removed afterwards.

    Args:
        path: the lock file; it holds the id of the process that has the lock.
        busy: makes the error if another process holds the lock; gets that process's id, or "unknown".

    Raises:
        OutputError: another process holds the lock (the error is from `busy`); or the file is a link or cannot be
            created.
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
            with suppress(OSError):  # folders that are no longer empty
                for parent in made:
                    parent.rmdir()
    finally:
        os.close(handle)


def _acquired(handle: int, path: Path, *, shared: bool = False, wait_seconds: float = 0.0) -> bool:
    """Try to lock an open file; returns whether it worked. True, too, if the file system does not support locks."""
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    for attempt in range(1 + round(wait_seconds / _POLL_SECONDS)):
        if attempt:
            time.sleep(_POLL_SECONDS)
        try:
            fcntl.flock(handle, operation)
        except BlockingIOError:
            continue
        except OSError as error:  # running without a lock is better than not running
            LOG.warning("%s cannot be locked (%s): start no other run that writes there meanwhile", show(path), error)
        return True
    return False


def _is_open_file(handle: int, path: Path) -> bool:
    """Whether `path` still is the open file: the previous holder may have removed it meanwhile."""
    return path.exists() and os.path.samestat(os.fstat(handle), os.stat(path))
