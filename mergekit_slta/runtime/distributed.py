"""Run a calibration in several processes (`torchrun`): share the rows, and sum over all processes.

Scope: process groups. The processes exchange Gram matrices, a few kilobytes per forward group. These are on the CPU, so
the backend is always gloo. Batches do not depend on the number of processes and are never split. Each row's matrix is
computed by one process and is zero in the others, so the sum equals a single process's result bit for bit.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mergekit_slta.errors import RunError, show


@dataclass(frozen=True)
class Ranks:
    """This process, and the number of processes that share a calibration.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which writes files and messages."""
        return self.rank == 0

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Greedy largest-first partition of work items by size; returns this rank's indices, sorted."""
        loads = [0] * self.size
        mine = []
        for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
            rank = loads.index(min(loads))
            loads[rank] += sizes[item]
            if rank == self.rank:
                mine.append(item)
        return sorted(mine)

    def all_reduce_(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place.

        Raises:
            RunError: another process has ended.
        """
        if self.size > 1:
            with self._expecting_all():
                dist.all_reduce(tensor)

    def broadcast(self, value: Any) -> Any:
        """Send the first process's value to all processes, and return it.

        Raises:
            RunError: another process has ended.
        """
        if self.size == 1:
            return value
        box = [value]
        with self._expecting_all():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def _expecting_all(self) -> Iterator[None]:
        """Turn a lost connection into a RunError."""
        try:
            yield
        except RuntimeError as error:  # gloo: "Connection closed by peer", or a timeout
            raise RunError(
                f"process {self.rank} of {self.size} has lost another one of this calibration ({show(error, 120)}): "
                "see that one's message, then run the same command again",
                code="lost-process",
            ) from error


ALONE = Ranks()
TIMEOUT = timedelta(days=7)
"""How long to wait for a process with more work. A process that has ended is noticed at once: its sockets close."""


def refuse_several(command: str) -> None:
    """Refuse to run a command in several processes.

    Raises:
        RunError: `torchrun` has started several.
    """
    if is_launched():
        raise RunError(
            f"`{command}` runs in one process: start it without torchrun; `calibrate` can share its work",
            code="one-process-only",
        )


def is_launched() -> bool:
    """Whether `torchrun` (or another launcher that sets its variables) has started this process with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that were launched together; yields `ALONE` if there is only one.

    Inside the context, only the first process logs messages below ERROR.

    Raises:
        RunError: the process group cannot be set up.
    """
    if not is_launched():
        yield ALONE
        return
    try:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"the processes cannot be joined ({show(error)}): start them with torchrun", code="cannot-join-processes"
        ) from error
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    root = logging.getLogger()
    level = root.level
    if not ranks.is_first:
        root.setLevel(logging.ERROR)
    try:
        yield ranks
    finally:
        root.setLevel(level)
        dist.destroy_process_group()


def own_device(device: str | None) -> str | None:
    """The device of this process: each process of a machine gets its own accelerator, unless `device` has an index."""
    if device and is_launched() and torch.device(device).type != "cpu" and torch.device(device).index is None:
        return f"{device}:{os.environ.get('LOCAL_RANK', '0')}"
    return device
