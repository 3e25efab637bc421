"""All undocumented names of transformers that this package uses."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime, tzinfo
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.core_model_loading import WeightConverter

USED = {
    "transformers.conversion_mapping.get_model_conversion_mapping(model)": "`read_names`",
    "transformers.core_model_loading.WeightConverter": "`read_names`",
    "transformers.core_model_loading.WeightRenaming": "`read_names`",
    "transformers.core_model_loading.dot_natural_key(s)": "the order of experts (`read_names`)",
    "transformers.core_model_loading.rename_source_key"
    "(source_key, weight_renamings, weight_converters)": "`read_names`",
    "transformers.core_model_loading.revert_weight_conversion(model, state_dict)": "`to_checkpoint`",
    "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "`causal_lm_class`",
    "transformers.PreTrainedModel._from_config": "a model of a named class (`make_model`)",
    "transformers.utils.chat_template_utils._compile_jinja_template(chat_template)": "`template_literals`",
    "transformers.utils.chat_template_utils.datetime": "what `strftime_now` of a chat template reads (`clock_at`)",
}
"""name -> its use in this package."""


def make_model(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """Make the model that a config's `architectures` names, with random weights.

    A class of transformers' own is taken by its name, also if it is for images and text. Everything else is what
    `AutoModelForCausalLM` makes of the config.

    Relies on `PreTrainedModel._from_config`, which makes a model in a dtype.
    """
    import transformers

    names = config.architectures or ()
    found = getattr(transformers, names[0], None) if len(names) == 1 and is_built_in(config) else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found._from_config(config, dtype=dtype)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def causal_lm_class(model_type: str) -> str | None:
    """Name of the class that `AutoModelForCausalLM` makes for a config's `model_type`; None for an unknown type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    return found if isinstance(found, str) else None


def is_built_in(config: PretrainedConfig) -> bool:
    """Whether a config's class is one of transformers' own.

    Relies on transformers importing a checkpoint's remote code under `transformers_modules`.
    """
    return type(config).__module__.startswith("transformers.")


def template_literals(text: str) -> list[str]:
    """All literal texts of a chat template: what it writes as it stands, and the strings in its expressions.

    Relies on transformers compiling templates in an environment of its own, with its extensions.

    Raises:
        jinja2.TemplateSyntaxError: the text is not a template.
    """
    import jinja2.nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tree = _compile_jinja_template(text).environment.parse(text)
    constants = (node.value for node in tree.find_all(jinja2.nodes.Const))
    written = (node.data for node in tree.find_all(jinja2.nodes.TemplateData))
    return [*written, *(value for value in constants if isinstance(value, str))]


@contextmanager
def clock_at(day: date) -> Iterator[None]:
    """Chat templates see the midnight that begins `day` as the present, inside the context.

    Relies on `strftime_now` calling `datetime.now()`. It cannot be given to `apply_chat_template` as a variable:
    transformers replaces functions among these by text.
    """
    from transformers.utils import chat_template_utils

    class Fixed(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Fixed:
            return cls(day.year, day.month, day.day, tzinfo=tz)

    original = chat_template_utils.datetime
    chat_template_utils.datetime = Fixed  # type: ignore[misc]
    try:
        yield
    finally:
        chat_template_utils.datetime = original  # type: ignore[misc]


@contextmanager
def without_dtype_warning() -> Iterator[None]:
    """Leave out transformers' warning that `torch_dtype` is deprecated, inside the context: mergekit sets it.

    Relies on the names of the loggers that warn of it.
    """

    def is_other(record: logging.LogRecord) -> bool:
        return "`torch_dtype` is deprecated" not in record.getMessage()

    loggers = [logging.getLogger(f"transformers.{name}") for name in ("configuration_utils", "modeling_utils")]
    for logger in loggers:
        logger.addFilter(is_other)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_other)


@dataclass
class Conversion:
    """Tensors of a checkpoint that transformers makes one or several tensors of a model of (fused experts).

    Attributes:
        target: name of the first tensor of the model.
        sources: names in the checkpoint, in transformers' order.
    """

    target: str
    _converter: WeightConverter
    sources: list[str] = field(default_factory=list)
    _patterns: list[str] = field(default_factory=list)

    def convert(self, model: PreTrainedModel, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """name in the model -> tensor, from the tensors of `sources`."""
        converter = copy.deepcopy(self._converter)
        for source, pattern, tensor in zip(self.sources, self._patterns, tensors, strict=True):
            converter.add_tensor(self.target, source, pattern, lambda tensor=tensor: tensor)  # type: ignore[arg-type, misc]
        made: dict[str, Any] = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def read_names(model: PreTrainedModel, names: Iterable[str]) -> tuple[dict[str, str], list[Conversion]]:
    """Find out what transformers makes of the tensors of a checkpoint.

    Relies on transformers renaming a key, then looking for one converter, as in its loading.

    Args:
        model: the model; may be on the meta device.
        names: names in the checkpoint.

    Returns:
        name in the model -> name in the checkpoint, for all that are only renamed; and the conversions. Names that are
        in neither are ignored when the checkpoint is loaded.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    plain: dict[str, str] = {}
    conversions: dict[str, Conversion] = {}
    for name in sorted(names, key=dot_natural_key):
        prefix = model.base_model_prefix
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            continue
        if pattern is None:
            plain[target] = name
            continue
        found = conversions.setdefault(target, Conversion(target, by_pattern[pattern]))
        found.sources.append(name)
        found._patterns.append(pattern)
    return plain, list(conversions.values())


def to_checkpoint(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name and divide tensors of a model as transformers saves them: experts one by one, where it does."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(tensors))
