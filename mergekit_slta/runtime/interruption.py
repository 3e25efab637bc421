"""Ctrl-C: the line that says how an interrupted command goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from mergekit_slta.errors import InterruptionError


@contextmanager
def interruptible(how: Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C inside the context into one line.

    In a command the line is an error, so that mergekit's commands end with it, too. A program that calls this package
    gets the line on the error output, and its own KeyboardInterrupt.

    Args:
        how: called at the interruption; says what is kept, and how the command goes on.

    Raises:
        InterruptionError: Ctrl-C in a command.
    """
    try:
        yield
    except KeyboardInterrupt:
        error = InterruptionError(f"Interrupted: {how()}", code="interrupted-run")
        if click.get_current_context(silent=True) is not None:
            raise error from None
        error.show(sys.stderr)
        raise
