"""A recipe as a model card shows it: with names in place of local paths."""

from __future__ import annotations

import os
from typing import Any

import yaml

from mergekit_slta.reporting.names import PublicNames, last_parts

_MODEL_KEYS = ("base_model", "model", "tokenizer_source", "source", "path", "lora")
_FILE_KEYS = ("alphas", "chat_template")


def public_recipe(text: str, names: PublicNames) -> str | None:
    """A recipe without comments and local paths; None if it is not one."""
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    return yaml.safe_dump(_public(content, names), sort_keys=False, allow_unicode=True, width=100).strip()


def _public(value: Any, names: PublicNames, key: object = None) -> Any:
    if isinstance(value, dict):
        return {inner: _public(each, names, inner) for inner, each in value.items()}
    if isinstance(value, list):
        return [_public(each, names, key) for each in value]
    if not isinstance(value, str):
        return value
    if key in _MODEL_KEYS:
        return names.model("+".join(map(os.path.normpath, value.split("+")))).replace(" + ", "+")
    if key == "dataset":
        return names.dataset(value)
    if key in _FILE_KEYS and "\n" not in value and "{" not in value:
        return last_parts([value])[0]
    return value
