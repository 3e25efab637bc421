"""Several processes at one calibration (`torchrun`): who takes which batches, and sums over all.

Scope: process groups. What is exchanged are Gram matrices, a few kilobytes a step, on the CPU: over gloo, whatever the
devices compute on. Batches are planned without regard to the number of processes and handed out whole, and a row's
matrix comes from one process alone: sums add zeros, and the result is that of a single process to the bit.
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

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a calibration.

    Attributes:
        rank, size: its number, and how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes, and speaks."""
        return self.rank == 0

    def share(self, weights: Sequence[int]) -> list[int]:
        """Which of some pieces of work are this process's: the largest first, each to who has least; in order."""
        loads = [0] * self.size
        mine = []
        for place in sorted(range(len(weights)), key=lambda place: (-weights[place], place)):
            taker = loads.index(min(loads))
            loads[taker] += weights[place]
            if taker == self.rank:
                mine.append(place)
        return sorted(mine)

    def all_reduce_(self, tensor: Tensor) -> None:
        """Add the other processes' tensors to this one, in place.

        Raises:
            RunError: another process is gone.
        """
        if self.size > 1:
            with self._together():
                dist.all_reduce(tensor)

    def broadcast(self, value: Any) -> Any:
        """The first process's value, for all.

        Raises:
            RunError: another process is gone.
        """
        if self.size == 1:
            return value
        box = [value]
        with self._together():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo: "Connection closed by peer", or a timeout
            raise RunError(
                f"process {self.rank} of {self.size} has lost another one of this calibration ({show(error, 120)}): "
                "see that one's message, then run the same command again"
            ) from error


ALONE = Ranks()
LONGEST_WAIT = timedelta(days=7)
"""For processes with more work: one that is gone closes its sockets and is noticed at once."""


def refuse_several(command: str) -> None:
    """For commands that only one process can run.

    Raises:
        RunError: there are several.
    """
    if is_launched():
        raise RunError(f"`{command}` runs in one process: start it without torchrun; `calibrate` can share its work")


def is_launched() -> bool:
    """Whether `torchrun` (or another launcher that sets its variables) has started this process with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that were launched together; `ALONE` where there is one.

    Raises:
        RunError: they cannot find each other.
    """
    if not is_launched():
        yield ALONE
        return
    try:
        dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the processes cannot be joined ({show(error)}): start them with torchrun") from error
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    if not ranks.is_first:
        logging.getLogger().setLevel(logging.ERROR)  # the first process says it all
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def own_device(device: str | None) -> str | None:
    """One accelerator for each process of a machine; a device that was named by number stays."""
    if device and is_launched() and torch.device(device).type != "cpu" and torch.device(device).index is None:
        return f"{device}:{os.environ.get('LOCAL_RANK', '0')}"
    return device
