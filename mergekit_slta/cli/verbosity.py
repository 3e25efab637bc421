"""The option `-v/--verbose` of every command: prints the traceback of an error, and more log messages."""

from __future__ import annotations

import logging

import click

_KEY = "mergekit_slta.verbosity"


def with_verbose(command: click.Command, *, expose_value: bool = False) -> click.Command:
    """Add `-v/--verbose` to a command. With `expose_value`, the command's function gets the count as `verbosity`."""
    command.params.append(
        click.Option(
            ["-v", "--verbose", "verbosity"],
            count=True,
            expose_value=expose_value,
            callback=_remember,
            help="Show the traceback of an error, and log more (repeat for more)",
        )
    )
    return command


def is_verbose(ctx: click.Context) -> bool:
    """Whether the command that ran under `ctx` was given `-v`."""
    return bool(ctx.meta.get(_KEY))


def _remember(ctx: click.Context, option: click.Parameter, value: int) -> int:
    ctx.meta[_KEY] = value  # the group's context shares it, and handles errors
    if value:
        logging.basicConfig(level=logging.INFO if value == 1 else logging.DEBUG)  # as mergekit's own -v does
    return value
