"""All undocumented names of transformers that this package uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, tzinfo
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

USED = {
    "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "`causal_lm_class`",
    "transformers.PreTrainedModel._no_split_modules": "class names of the decoder layers (`layer_classes`)",
    "transformers.utils.chat_template_utils._compile_jinja_template(chat_template)": "`template_literals`",
    "transformers.utils.chat_template_utils.datetime": "what `strftime_now` of a chat template reads (`clock_at`)",
}
"""name -> its use in this package."""


def layer_classes(model: PreTrainedModel) -> set[str]:
    """Class names of a model's decoder layers.

    Relies on `_no_split_modules`, which transformers uses for device maps: a set, a list, or None.
    """
    return set(model._no_split_modules or ())


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
