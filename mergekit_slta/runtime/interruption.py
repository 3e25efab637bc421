"""Ctrl-C: the line that says how an interrupted command goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from mergekit_slta.errors import InterruptionError

_SAID = "mergekit_slta_said"
"""Attribute of an interrupt for which a line has been printed."""


def before_calibration() -> str:
    """What is kept if a calibration or a merge is interrupted while it is prepared."""
    return "nothing is calibrated yet, and finished downloads are kept; run the same command again"


@contextmanager
def interruptible(how: Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C inside the context into one line.

    In a command the line is an error, so that mergekit's commands end with it, too. A program that calls this package
    gets the line on the error output, and its own KeyboardInterrupt.

    Not for work whose errors a caller may handle and go on.

    Args:
        how: called at the interruption; says what is kept, and how the command goes on.

    Raises:
        InterruptionError: Ctrl-C in a command.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if getattr(interrupt, _SAID, False):  # by a context inside
            raise
        error = InterruptionError(f"Interrupted: {how()}", code="interrupted-run")
        if click.get_current_context(silent=True) is not None:
            raise error from None
        error.show(sys.stderr)
        setattr(interrupt, _SAID, True)
        raise
