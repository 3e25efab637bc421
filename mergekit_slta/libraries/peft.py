"""All undocumented functions of peft that this package uses: they match an adapter's settings with module names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

USED = {
    "peft.tuners.tuners_utils.check_target_module_exists(config, key)": "`is_target`",
    "peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING": "`changes_weights`",
    "peft.utils.other.get_pattern_key(pattern_keys, key_to_match)": "`pattern_key`",
}
"""name(parameters) -> its use in this package."""


def changes_weights(kind: object) -> bool:
    """Whether an adapter of a kind (`peft_type`) is a change of the model's weights. Kinds unknown to peft may be.

    Others, such as prompts, prefixes and further inputs of the attention, cannot be merged. Relies on the classes of
    those kinds having no `merge_and_unload`.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    known = {name.value: tuner for name, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    return not isinstance(kind, str) or kind not in known or hasattr(known[kind], "merge_and_unload")


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether peft adapts a module with an adapter's settings. peft ignores tensors of other modules.

    Relies on peft reading only the four keys below from its config, as attributes.

    Raises:
        re.error, TypeError, AttributeError: the settings are invalid.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    return bool(check_target_module_exists(SimpleNamespace(**{key: config.get(key) for key in keys}), module))


def pattern_key(patterns: Sequence[str], module: str) -> str:
    """The key of `rank_pattern` or `alpha_pattern` that applies to a module; the module itself if none does.

    Raises:
        re.error: a pattern is not a regular expression.
    """
    from peft.utils.other import get_pattern_key

    return get_pattern_key(patterns, module)
