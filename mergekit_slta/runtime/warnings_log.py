"""Collect the warnings of a run, to repeat them at its end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_PACKAGE = logging.getLogger("mergekit_slta")


class _Collector(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())
        if not logging.getLogger().handlers and logging.lastResort is not None:
            logging.lastResort.handle(record)  # a handler of this package would switch it off


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Yield a list that gets each warning that this package logs inside the context; they are logged as before."""
    messages: list[str] = []
    handler = _Collector(messages)
    _PACKAGE.addHandler(handler)
    try:
        yield messages
    finally:
        _PACKAGE.removeHandler(handler)
