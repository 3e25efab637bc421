"""Read a recipe in mergekit's YAML format, from a file or from what a caller gives.

Scope: what mergekit itself accepts, and keys that it would ignore.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from mergekit.config import MergeConfiguration
from pydantic import ValidationError

from mergekit_slta.errors import RecipeError, path_hint, show
from mergekit_slta.recipe.read import check_content, no_recipe


def load_config(path: str | os.PathLike[str]) -> tuple[MergeConfiguration, str]:
    """Read a recipe file; returns mergekit's configuration and the file's text.

    Raises:
        RecipeError: the file is missing, is not YAML, or is not a recipe that mergekit accepts.

    Examples:
        >>> config, source = mergekit_slta.load_config("recipe.yml")
        >>> config.merge_method
        'submodule_linear'
    """
    if not isinstance(path, (str, os.PathLike)):
        raise no_recipe(path)
    try:
        source = Path(path).read_text(encoding="utf-8")
        documents = list(yaml.safe_load_all(source))
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"the recipe {show(path)} is not a UTF-8 text file: save it as one", code="unreadable-recipe"
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError(
            f"the recipe {show(path)} is not valid YAML ({show(error)}): correct that line", code="not-yaml"
        ) from error
    except RecursionError as error:
        raise _not_accepted(path, error) from error
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"cannot read the recipe {show(path)} ({show(getattr(error, 'strerror', None) or error)}): check its path"
            + f" {path_hint(path)}" * isinstance(error, FileNotFoundError),
            code="unreadable-recipe",
        ) from error
    return _make_config(documents[0] if len(documents) == 1 else documents or None, path), source


def as_config(recipe: object) -> MergeConfiguration:
    """mergekit's configuration of a recipe that a caller gives: a file's path, its content, or the configuration.

    Raises:
        RecipeError: it is none of these, or not a recipe that mergekit accepts.
    """
    if isinstance(recipe, MergeConfiguration):
        return recipe
    if not isinstance(recipe, Mapping):
        return load_config(recipe)[0]  # type: ignore[arg-type]
    try:
        return _make_config(_plain(recipe))
    except RecursionError as error:  # a mapping that holds itself
        raise _not_accepted(None, error) from error


def _plain(value: Any) -> Any:
    """A copy of a recipe's content as YAML would give it: lists for tuples, text for paths."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _make_config(content: object, path: str | os.PathLike[str] | None = None) -> MergeConfiguration:
    try:
        check_content(content, path)
        return MergeConfiguration.model_validate(content)
    except ValidationError as error:
        raise _not_accepted(path, _first(error)) from error
    except RuntimeError as error:  # mergekit's own validators
        name = str(error).removeprefix("Can't parse ")
        if name != str(error) and os.path.isdir(name):
            raise RecipeError(
                f"mergekit reads `@` and `+` in {show(name)} as a revision and an adapter: rename the folder",
                code="missing-model",
            ) from error
        raise _not_accepted(path, error) from error


def _not_accepted(path: str | os.PathLike[str] | None, reason: object) -> RecipeError:
    where = f"the recipe {show(path)}" if path is not None else "the recipe"
    return RecipeError(f"{where} is not a merge recipe ({show(reason)}): correct it", code="not-a-recipe")


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"])
    return show(f"{place}: {problem['msg']}" if place else problem["msg"])
