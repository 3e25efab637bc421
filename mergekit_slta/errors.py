"""Every exception of the package.

    SltaError (click.ClickException)      one line: cause, value, remedy
    ├── RecipeError          exit 2       the recipe (YAML keys, values, layout) is wrong
    ├── DataError            exit 2       a calibration dataset, its columns or its rows are wrong
    ├── ModelError           exit 2       checkpoints are missing, differ, or are not supported
    ├── AlphasError          exit 2       an alphas or statistics file is corrupt, foreign or does not fit
    ├── OutputError          exit 2       a file or folder cannot be written, or only by destroying something else
    ├── RegistrationError    exit 1       mergekit is too old, or the method's name is taken
    └── RunError             exit 1       a valid job failed while it ran

They derive from `click.ClickException`, so mergekit's own commands print them as one line and exit with `exit_code`.
"""

from __future__ import annotations

import click

_LONGEST = 200


def show(value: object, longest: int = _LONGEST) -> str:
    """Make `value` one line of printable characters, at most `longest` of them: recipes may come from strangers.

    Control characters, marks of text direction and lone surrogates are dropped; any white space becomes a space.
    """
    text = "".join(character if character.isprintable() else " " * character.isspace() for character in str(value))
    return text if len(text) <= longest else text[: longest - 1] + "…"


def listing(values: object, most: int = 12) -> str:
    """Join at most `most` of the `values` with commas, and say how many were left out."""
    items = [show(value, 80) for value in values]  # type: ignore[attr-defined]
    rest = len(items) - most
    return ", ".join(items[:most]) + (f", … ({rest} more)" if rest > 0 else "") if items else "none"


class SltaError(click.ClickException):
    """Base of the package's errors.

    Attributes:
        message: one printable line: cause, value, remedy.
        code: names the kind of problem, in lower case with hyphens ("unknown-key"). It stays the same when the wording
            of the message changes.
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
    """An alphas or statistics file is corrupt, foreign, or was made for something else."""

    exit_code = 2


class OutputError(SltaError):
    """A file or folder cannot be written, or only by destroying something else."""

    exit_code = 2


class RegistrationError(SltaError):
    """The method cannot be registered with the mergekit that is installed."""


class RunError(SltaError):
    """A valid job failed while it ran."""
