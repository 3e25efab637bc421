"""Refuse keys of a recipe's `tokenizer` section that mergekit would ignore.

Scope: the YAML. mergekit's own types accept any key, and read a `source` with a wrong `kind` as the name of a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_slta.errors import RecipeError, listing, show
from mergekit_slta.libraries.mergekit import tokenizer_keys


def check_tokenizer_section(section: object) -> None:
    """Check the keys of a `tokenizer` section, of its tokens and of their sources.

    Args:
        section: the parsed YAML.

    Raises:
        RecipeError: a key is unknown, a `kind` is none of mergekit's, or a source names no token, or two.
    """
    known = tokenizer_keys()
    if not isinstance(section, Mapping):  # mergekit's own types refuse it
        return
    _check_keys(section, known["section"], "under `tokenizer`")
    tokens = section.get("tokens")
    for token, entry in tokens.items() if isinstance(tokens, Mapping) else ():
        if not isinstance(entry, Mapping):
            continue
        where = f"under `tokenizer.tokens`, {show(token, 40)}"
        _check_keys(entry, known["token"], where)
        source = entry.get("source")
        if not isinstance(source, Mapping):
            continue
        kind = source.get("kind")
        if kind is None:
            _check_keys(source, known["model"], where)
        elif kind not in known:
            raise RecipeError(
                f"`kind` {where} is {show(kind)!r}: choose one of model_token, zero, or name a model as `source`",
                code="invalid-value",
            )
        else:
            _check_keys(source, known[kind], where)
        if kind == "model_token" and (source.get("token") is None) == (source.get("token_id") is None):
            raise RecipeError(
                f"`source` {where} should have one of `token` and `token_id`: which row of the model it means",
                code="invalid-value",
            )


def _check_keys(given: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
    unknown = [key for key in given if key not in known]
    if unknown:
        raise RecipeError(f"unknown key `{show(unknown[0])}` {where}: known keys: {listing(known)}", code="unknown-key")
