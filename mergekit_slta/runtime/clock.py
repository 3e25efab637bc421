"""How long the phases of a run take."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Clock:
    """Adds up the seconds of each phase of a job.

    Attributes:
        seconds: phase -> seconds so far, in the order in which the phases began.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside the context to a phase, also if it ends by an error."""
        self.seconds.setdefault(name, 0.0)
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - begin


def describe_phases(seconds: Mapping[str, float]) -> str:
    """The time of all phases, and of each: "4 min: direction 1 min, steps 3 min"."""
    parts = ", ".join(f"{name} {describe_seconds(taken)}" for name, taken in seconds.items())
    return f"{describe_seconds(sum(seconds.values()))}: {parts}"


def describe_seconds(seconds: float) -> str:
    """A time in seconds, minutes or hours, to two digits."""
    unit, size = ("s", 1) if seconds < 99.5 else ("min", 60) if seconds < 99.5 * 60 else ("h", 3600)
    return f"{seconds / size:.{1 if seconds < 9.95 * size else 0}f} {unit}"
