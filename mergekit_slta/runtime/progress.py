"""What a long run says while it goes: a bar that names the step and the memory in use, and advice where memory ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

import psutil
import torch
from tqdm import tqdm

from mergekit_slta.errors import RunError, show


class Progress:
    """A bar over steps, as a context.

    Args:
        verb: what is being done ("Calibrating").
        total: steps.
        quiet: show nothing.
    """

    def __init__(self, verb: str, total: int, *, quiet: bool) -> None:
        self._verb = verb
        self._bar = tqdm(total=total, desc=verb, disable=quiet)
        self._step: str | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.advance(self._step is not None)
        self._bar.close()

    def at(self, step: str) -> None:
        """The step that is being worked on; where it is another than before, that is done."""
        if step != self._step:
            self.advance(self._step is not None)
            self._step = step
            self.announce(step)

    def announce(self, name: str) -> None:
        """Say which part is being worked on."""
        self._bar.set_description(f"{self._verb} {show(name, 60)}", refresh=False)
        self._bar.set_postfix_str(f"memory {psutil.Process().memory_info().rss / 2**30:.1f} GiB")

    def advance(self, steps: int) -> None:
        """So many steps are done."""
        self._bar.update(steps)


@contextmanager
def advice_on_memory(device: torch.device, **knobs: int) -> Iterator[None]:
    """Turn an allocation that failed into a line that names the recipe keys to lower.

    Args:
        device: where the arithmetic runs.
        knobs: recipe keys that memory grows with, and their values.

    Raises:
        RunError: memory ran out, of the device or of the machine.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(error, device, knobs) from error
    except RuntimeError as error:
        if "not enough memory" in str(error) or "can't allocate memory" in str(error):  # torch's CPU allocator
            raise _out_of_memory(error, device, knobs) from error
        raise


def _out_of_memory(error: BaseException, device: torch.device, knobs: Mapping[str, int]) -> RunError:
    named = " or ".join(f"`{key}` ({value})" for key, value in knobs.items())
    return RunError(f"out of memory on {device} ({show(error, 120)}): lower {named}, or choose another --device")
