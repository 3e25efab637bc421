"""How long some work takes on a device: amounts of work, and the rates at which the device does it.

Scope: rates are measured in about a second, by doing a little of each kind of work. Amounts are from
`objectives.phases`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

EIGH, EIGH_FLOPS = "eigh", 10.0
"""Kind of the floating point operations of symmetric eigenproblems in float64, and their number at size n over n^3."""
_SECONDS = 0.12
"""Each kind of work is repeated for about this long."""
_OUTPUTS, _LARGE = 1024, 2**23
"""Width of the output of a product in float64; elements of a tensor that fits no cache."""
_WRITING = 4.0
"""Speed of writing over that of reading: written files wait in memory for the disk."""
_LARGEST_EIGH = 640
"""Largest eigenproblem that is solved to measure its rate; from here on the time grows with the cube of the size."""


@dataclass(frozen=True)
class Phase:
    """The work of a part of a run.

    Attributes:
        name: the phase's name in `Clock.seconds`.
        flops: kind -> floating point operations: of matrix products by their dtype, and `EIGH`.
        touched_bytes: bytes that other computations read and write, on tensors of the size of a batch's features.
        streamed_bytes: the same on tensors that fit no cache.
        operations: number of tensor operations; each takes some time, even on a tiny tensor.
        read_bytes, written_bytes: bytes of checkpoints.
    """

    name: str
    flops: Mapping[str, float] = field(default_factory=dict)
    touched_bytes: float = 0.0
    streamed_bytes: float = 0.0
    operations: float = 0.0
    read_bytes: int = 0
    written_bytes: int = 0

    @property
    def product_flops(self) -> float:
        """Operations of all products in the precision of the forward passes."""
        return sum(flops for kind, flops in self.flops.items() if kind not in (EIGH, "float64"))


@dataclass(frozen=True)
class Rates:
    """How much of each kind of work a device does.

    Attributes:
        flops: kind -> floating point operations per second; see `Phase`.
        touched, streamed: bytes per second that an elementwise computation reads and writes; see `Phase`.
        operation: seconds of one operation on a tiny tensor.
        read: bytes of checkpoints per second that are read, cast, moved to the device and checked.
        is_queued: whether the device computes while the next operations are prepared.
    """

    flops: Mapping[str, float]
    touched: float
    streamed: float
    operation: float
    read: float
    is_queued: bool = False

    def seconds(self, phase: Phase) -> float:
        """Estimate how long a phase takes.

        Raises:
            KeyError: the phase has products of a kind that was not measured.
        """
        computing = sum(flops / self.flops[kind] for kind, flops in phase.flops.items() if flops)
        computing += phase.touched_bytes / self.touched + phase.streamed_bytes / self.streamed
        preparing = phase.operations * self.operation
        moving = (phase.read_bytes + phase.written_bytes / _WRITING) / self.read
        return (max(computing, preparing) if self.is_queued else computing + preparing) + moving


def measure_rates(
    device: torch.device, dtype: torch.dtype, kinds: Iterable[str], sizes: tuple[int, int, int],
    read: Iterable[Callable[[], tuple[int, Tensor]]],
) -> Rates:  # fmt: skip
    """Do a little of each kind of work on a device, in about a second. Call it in the job's precision.

    Args:
        device: the device.
        dtype: dtype of the forward passes.
        kinds: kinds of the products; see `Phase`.
        sizes: tokens of a batch, width of the model, and inner width of its MLP.
        read: functions that each read, cast and place a piece of a checkpoint, and return its number of bytes on disk;
            each is called once. If there are none, reading counts as streaming each byte twice.
    """
    tokens, width, inner = sizes
    flops = {}
    for kind in kinds:
        # MPS has no float64: `maths.directions` computes on the CPU there.
        where = torch.device("cpu") if device.type == "mps" and kind in (EIGH, "float64") else device
        if kind == EIGH:
            size = min(width, _LARGEST_EIGH)
            matrix = torch.randn((size, size), dtype=torch.float64, device=where)
            flops[kind] = (
                EIGH_FLOPS * size**3 / _median(where, lambda matrix=matrix: torch.linalg.eigh(matrix @ matrix.T))
            )
        else:
            product = getattr(torch, kind)
            outputs = min(inner, _OUTPUTS) if kind == "float64" else inner  # slow
            left, right = (torch.full((size, width), 0.5, dtype=product, device=where) for size in (tokens, outputs))
            seconds = _median(where, lambda left=left, right=right: torch.nn.functional.linear(left, right))
            flops[kind] = 2.0 * tokens * width * outputs / seconds
    features, large = (torch.full(size, 0.5, dtype=dtype, device=device) for size in ((tokens, inner), (_LARGE,)))
    touched = 5.0 * _bytes(features) / _median(device, lambda: torch.nn.functional.silu(features) * features)
    streamed = 2.0 * _bytes(large) / _median(device, lambda: large * 2.0)
    tiny = torch.zeros(8, device=device)
    operation = _median(device, lambda: [tiny + tiny for _ in range(100)]) / 100
    pieces = [_timed(device, each) for each in read]
    seconds = sum(taken for taken, _ in pieces)
    rate = sum(count for _, (count, _) in pieces) / seconds if seconds else streamed / 2
    return Rates(flops, touched, streamed, operation, rate, is_queued=device.type not in ("cpu", "mps"))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _median(device: torch.device, work: Callable[[], object]) -> float:
    """The median of the seconds that some work takes, after a first time."""
    work()
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < _SECONDS and len(taken) < 100):
        taken.append(_timed(device, work)[0])
    return sorted(taken)[len(taken) // 2]


def _timed(device: torch.device, work: Callable[[], object]) -> tuple[float, object]:
    """Seconds of some work, until the device has done it; and its result."""
    begin = time.perf_counter()
    result = work()
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
    return time.perf_counter() - begin, result
