"""A progress bar with the current part and the memory in use; and advice when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

import psutil
import torch
from tqdm import tqdm

from mergekit_slta.errors import RunError, show
from mergekit_slta.libraries.torch import is_out_of_memory


class Progress:
    """A progress bar over the parts of a run (forward groups, layers of a backward pass); a context manager.

    Args:
        verb: the activity, shown in front ("Calibrating").
        total: number of parts.
        quiet: show nothing.
    """

    def __init__(self, verb: str, total: int, *, quiet: bool) -> None:
        self._verb = verb
        self._bar = tqdm(total=total, desc=verb, disable=quiet)
        self._part: str | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.advance(self._part is not None)
        self._bar.close()

    def work_on(self, part: str) -> None:
        """Show the current part; when it changes, the part before it counts as done."""
        if part != self._part:
            self.advance(self._part is not None)
            self._part = part
            self.announce(part)

    def announce(self, name: str) -> None:
        """Show a name and the memory in use, without counting a part."""
        self._bar.set_description(f"{self._verb} {show(name, 60)}", refresh=False)
        self._bar.set_postfix_str(f"memory {psutil.Process().memory_info().rss / 2**30:.1f} GiB")

    def advance(self, parts: int) -> None:
        """Count `parts` more parts as done."""
        self._bar.update(parts)


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
