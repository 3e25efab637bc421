"""What this package uses of peft that peft does not document: how adapters name the modules that they adapt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

USED = {
    "peft.tuners.tuners_utils.check_target_module_exists(config, key)": "`is_target`",
    "peft.utils.other.get_pattern_key(pattern_keys, key_to_match)": "`pattern_key`",
}
"""name(parameters) -> what it is used for."""


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether peft adapts a module under an adapter's settings; it ignores tensors of other modules.

    Relies on peft asking its config for the four keys below and no others, as attributes.

    Raises:
        re.error, TypeError, AttributeError: the settings are none that peft understands.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    return bool(check_target_module_exists(SimpleNamespace(**{key: config.get(key) for key in keys}), module))


def pattern_key(patterns: Sequence[str], module: str) -> str:
    """The key of `rank_pattern` or `alpha_pattern` that applies to a module; the module itself where none does.

    Raises:
        re.error: a pattern is no regular expression.
    """
    from peft.utils.other import get_pattern_key

    return get_pattern_key(patterns, module)
