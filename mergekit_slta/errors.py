"""Every exception of the package.

    SltaError (click.ClickException)      one line: cause, value, remedy
    ├── RecipeError          exit 2       the recipe (YAML keys, values, layout) is wrong
    ├── DataError            exit 2       a calibration dataset, its columns or its rows are wrong
    ├── ModelError           exit 2       checkpoints are missing, do not match, or are not supported
    ├── AlphasError          exit 2       an alphas or statistics file is corrupt, or is for another job
    ├── OutputError          exit 2       a file or folder cannot be written, or holds something else
    ├── RegistrationError    exit 1       mergekit is too old, or the method's name is taken
    └── RunError             exit 1       a valid job failed while it ran
        └── InterruptionError exit 130     Ctrl-C

They derive from `click.ClickException`, so mergekit's own commands print them as one line and exit with `exit_code`.
"""

from __future__ import annotations

import difflib
import os
import sys
from pathlib import Path
from typing import IO, Any

import click

_LONGEST = 200


def show(value: object, longest: int = _LONGEST) -> str:
    """Return `value` as one line of at most `longest` printable characters.

    Recipes may come from strangers. Control characters, text direction marks and lone surrogates are dropped. White
    space becomes a space.
    """
    text = "".join(character if character.isprintable() else " " * character.isspace() for character in str(value))
    return text if len(text) <= longest else text[: longest - 1] + "…"


def listing(values: object, most: int = 12) -> str:
    """Join at most `most` of the `values` with commas, and say how many were left out."""
    items = [show(value, 80) for value in values]  # type: ignore[attr-defined]
    rest = len(items) - most
    return ", ".join(items[:most]) + (f", … ({rest} more)" if rest > 0 else "") if items else "none"


def path_hint(path: object) -> str:
    """A hint for a path to nothing: where paths start, and the path here that is spelled nearly like it, if any."""
    place, near = Path(), ""
    parts = Path(os.path.expanduser(str(path))).parts
    try:
        for number, part in enumerate(parts):
            if not (place / part).exists():
                names = {name.lower(): name for name in os.listdir(place)}
                found = difflib.get_close_matches(part.lower(), names, n=1)
                guess = Path(place, *(names[name] for name in found), *parts[number + 1 :])
                near = f"; did you mean {show(guess)}?" if found and guess.exists() else ""
                break
            place /= part
    except (OSError, ValueError):  # a folder that may not be read, or no path at all
        pass
    return f"(paths start at the current folder{near})"


class SltaError(click.ClickException):
    """Base of the package's errors.

    Attributes:
        message: one printable line: cause, value, remedy.
        code: name of the kind of problem, in lower case with hyphens ("unknown-key"). It does not change when the
            message is reworded. docs/errors.md lists them.
    """

    exit_code = 1

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(show(message, 2000))
        self.code = code


class RecipeError(SltaError):
    """The recipe is not one that this method can run."""

    exit_code = 2


class DataError(SltaError):
    """A calibration dataset cannot be used."""

    exit_code = 2


class ModelError(SltaError):
    """A checkpoint is missing, unsupported, or does not fit the base."""

    exit_code = 2


class AlphasError(SltaError):
    """An alphas or statistics file is corrupt, is of another type, or was made for another job."""

    exit_code = 2


class OutputError(SltaError):
    """A file or folder cannot be written, or writing it would destroy something else."""

    exit_code = 2


class RegistrationError(SltaError):
    """The method cannot be registered with the mergekit that is installed."""


class RunError(SltaError):
    """A valid job failed while it ran."""


class InterruptionError(RunError):
    """Ctrl-C. The message says what is kept, and how the command goes on."""

    exit_code = 130
    """As a shell reports a process that the signal has ended."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message; on a terminal it begins a line of its own, behind the `^C`."""
        stream = sys.stderr if file is None else file
        click.echo("\n" * stream.isatty() + self.message, file=stream)
