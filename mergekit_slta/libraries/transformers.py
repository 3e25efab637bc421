"""All undocumented names of transformers that this package uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

USED = {
    "transformers.PreTrainedModel._no_split_modules": "class names of the decoder layers (`layer_classes`)",
}
"""name -> its use in this package."""


def layer_classes(model: PreTrainedModel) -> set[str]:
    """Class names of a model's decoder layers.

    Relies on `_no_split_modules`, which transformers uses for device maps: a set, a list, or None.
    """
    return set(model._no_split_modules or ())


def is_built_in(config: PretrainedConfig) -> bool:
    """Whether a config's class is one of transformers' own.

    Relies on transformers importing a checkpoint's remote code under `transformers_modules`.
    """
    return type(config).__module__.startswith("transformers.")
