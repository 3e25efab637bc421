"""A progress bar with the current part, the time left and the memory in use; and advice when memory runs out."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType

import click
import psutil
import torch
from rich.progress import BarColumn, ProgressColumn, Task
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from mergekit_slta.errors import RunError, show
from mergekit_slta.libraries.torch import is_out_of_memory
from mergekit_slta.runtime.clock import describe_seconds
from mergekit_slta.runtime.screen import console_of, describe_bytes, encodable, is_terminal

SECONDS_BETWEEN_LINES, SHARE_BETWEEN_LINES, LONGEST_SILENCE = 30.0, 0.1, 300.0
"""Where there is no terminal, a line is printed after so many seconds, if so much of the phase is done since the last
one; after the longest silence, it is printed anyway."""
_LAYER = re.compile(r"\.(\d+)(?:\.|$)")


class Progress:
    """A progress bar for each phase of a run; a context manager.

    On a terminal a single line shows the phase, the part that is worked on, the time left and the memory in use, and
    disappears at the end. Elsewhere a plain line is printed now and then, see `SECONDS_BETWEEN_LINES`.

    Args:
        phase: the first phase ("features").
        total: number of its parts.
        quiet: show nothing.
        num_layers: number of decoder layers, for parts whose names hold the number of a layer.
    """

    def __init__(self, phase: str, total: int, *, quiet: bool, num_layers: int = 0) -> None:
        self._quiet, self._num_layers = quiet, num_layers
        self._stack = ExitStack()
        self._bars: Bars | None = None
        self._said, self._said_done = time.monotonic(), 0.0
        self._part: str | None = None
        self.begin(phase, total)

    def __enter__(self) -> Progress:
        if not self._quiet and is_terminal(sys.stderr):
            self._bars = self._stack.enter_context(_live_bar(self))
            self._bars.add_task("", total=self.total)
            self._show()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.advance(self._part is not None)
        self._stack.close()
        self._bars = None

    def begin(self, phase: str, total: int) -> None:
        """Begin a phase of `total` parts; the one before it is done."""
        self.phase, self.total, self.done = phase, total, 0
        self._part, self._name, self._skipped, self._begun = None, "", 0, time.monotonic()
        self._said_done = 0.0
        self._show()

    def work_on(self, part: str) -> None:
        """Show the current part; when it changes, the part before it counts as done."""
        if part != self._part:
            self.advance(self._part is not None)
            self._part = part
            self.announce(part)

    def announce(self, name: str) -> None:
        """Show the name of a part, without counting it."""
        layer = _LAYER.search(name)
        self._name = f"layer {int(layer[1]) + 1}/{self._num_layers}" if layer and self._num_layers else show(name, 40)
        self._show()

    def advance(self, parts: int) -> None:
        """Count `parts` more parts as done. Several at once are those of an earlier run, and took no time."""
        self.done += parts
        self._skipped += parts if parts > 1 else 0
        self._show()

    def say(self, line: str) -> None:
        """Print a line, unless quiet."""
        self._said = time.monotonic()
        if self._bars is not None:
            self._bars.console.print(Text(show(line, 1000)))
        elif not self._quiet:
            click.echo(encodable(show(line, 1000), sys.stderr), err=True)

    @property
    def title(self) -> str:
        """The phase and its current part: "step 3 of 6, backward, layer 12/30"."""
        return f"{self.phase}, {self._name}" if self._name else self.phase

    @property
    def rest(self) -> str:
        """The time left in this phase, and the memory of the process: "4 min left, 5.1 GiB"."""
        memory = describe_bytes(psutil.Process().memory_info().rss)
        counted = self.done - self._skipped
        if not 0 < counted < self.total - self._skipped:
            return memory
        left = (time.monotonic() - self._begun) * (self.total - self.done) / counted
        return f"{describe_seconds(left)} left, {memory}"

    def _show(self) -> None:
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], completed=self.done, total=self.total)
            return
        now, share = time.monotonic(), self.done / max(1, self.total)
        silent = now - self._said
        if self._quiet or silent < SECONDS_BETWEEN_LINES or share >= 1:
            return
        if share - self._said_done >= SHARE_BETWEEN_LINES or silent >= LONGEST_SILENCE:
            self._said_done = share
            self.say(f"{self.title}: {share:.0%}, {self.rest}")


class _Words(ProgressColumn):
    """A text that is asked for whenever the bar is drawn."""

    max_refresh = 0.5

    def __init__(self, progress: Progress, name: str, column: Column) -> None:
        super().__init__(column)
        self._progress, self._attribute = progress, name

    def render(self, task: Task) -> Text:
        return Text(getattr(self._progress, self._attribute), no_wrap=True, overflow="ellipsis")


@contextmanager
def _live_bar(progress: Progress) -> Iterator[Bars]:
    """Draw a bar on the error output. Log messages are printed above it."""
    before = sys.stderr
    bars = Bars(
        _Words(progress, "title", Column(no_wrap=True, overflow="ellipsis")),
        BarColumn(None),
        _Words(progress, "rest", Column(no_wrap=True)),
        console=console_of(before), transient=True, expand=True, refresh_per_second=4,
    )  # fmt: skip
    with bars:
        handlers = [
            handler
            for handler in logging.getLogger().handlers
            if isinstance(handler, logging.StreamHandler) and handler.stream is before
        ]
        for handler in handlers:
            handler.setStream(sys.stderr)  # the bar's
        try:
            yield bars
        finally:
            for handler in handlers:
                handler.setStream(before)


@contextmanager
def advice_on_memory(device: torch.device, **knobs: int) -> Iterator[None]:
    """Turn a failed allocation into an error that names the recipe keys to lower.

    Args:
        device: device of the computation.
        knobs: recipe keys that increase memory, and their current values.

    Raises:
        RunError: the device or the machine is out of memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(error, device, knobs) from error
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise _out_of_memory(error, device, knobs) from error
        raise


def _out_of_memory(error: BaseException, device: torch.device, knobs: Mapping[str, int]) -> RunError:
    named = " or ".join(f"`{key}` ({value})" for key, value in knobs.items())
    return RunError(
        f"out of memory on {device} ({show(error, 120)}): lower {named}, or choose another --device",
        code="out-of-memory",
    )
