"""`mergekit-slta ...`: the table of commands, and the error line of a failed command.

Scope: click and the standard library only. The file of a command is imported when the command is used, so `--help` does
not load torch, transformers and mergekit.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import sys
import traceback
from typing import Any, NamedTuple

import click

from mergekit_slta import __version__
from mergekit_slta.cli.verbosity import is_verbose
from mergekit_slta.errors import OutputError, RunError, show


class _Entry(NamedTuple):
    module: str
    summary: str


_MERGEKIT, _PLAIN = "mergekit_slta.cli.mergekit_commands", "mergekit_slta.cli.plain_commands"
COMMANDS = {
    "init": _Entry("mergekit_slta.cli.init_command", "Write a recipe from what models say of themselves."),
    "check": _Entry(_MERGEKIT, "Check RECIPE, its models and its data; print the plan and its cost."),
    "rows": _Entry(_MERGEKIT, "Have experts write the calibration rows of RECIPE."),
    "calibrate": _Entry(_MERGEKIT, "Compute the merging weights of RECIPE, without merging."),
    "merge": _Entry(_MERGEKIT, "Calibrate RECIPE and merge it into OUT."),
    "compare": _Entry(_MERGEKIT, "Merge RECIPE's models by several methods, and score all on held-out rows."),
    "report": _Entry(_PLAIN, "Draw the figures of a saved file or of a merged model."),
    "solve": _Entry(_PLAIN, "Compute new weights from saved statistics, with other settings."),
    "export": _Entry(_PLAIN, "Write a stock mergekit recipe that gives the same merge."),
    "linearity": _Entry(_MERGEKIT, "Measure how linear the experts of RECIPE are."),
    "env": _Entry("mergekit_slta.cli.environment", "Print versions and devices, for bug reports."),
    "demo": _Entry(_PLAIN, "Train tiny models, merge them, and compare with other methods."),
}
"""The commands in the order of use. Each summary is the first line of the command's docstring; a test compares them."""


class _LazyGroup(click.Group):
    """Loads a command when it is used, and turns unexpected errors into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return getattr(importlib.import_module(COMMANDS[cmd_name].module), cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = difflib.get_close_matches(args[0].lower(), COMMANDS, n=1)
        if near and args[0] not in COMMANDS and not ctx.resilient_parsing:
            ctx.fail(f"No such command {show(args[0], 40)!r}: did you mean {near[0]}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, click.UsageError):
            raise
        except Exception as error:
            number = error.errno if isinstance(error, OSError) else None
            if is_verbose(ctx) and number != errno.EPIPE:
                traceback.print_exc()
            if isinstance(error, click.ClickException) or number in (errno.EPIPE, errno.ENOSPC):
                raise
            hint = "" if is_verbose(ctx) else "; -v shows where"
            raise RunError(f"{type(error).__name__}: {show(error)}{hint}", code="unexpected-error") from error

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command. If nobody reads its output any more (`| head`), click ends it quietly, with exit code 1."""
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            where = show(error.filename or "the output")
            OutputError(f"cannot write {where} ({error.strerror}): free some room", code="cannot-write").show()
            sys.exit(OutputError.exit_code)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mergekit-slta")
def main() -> None:
    """Merge fine-tuned language models submodule by submodule, with weights in closed form."""
