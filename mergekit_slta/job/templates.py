"""Choose the chat template that renders each task's rows, and check that the output's tokenizer fits it.

Scope: the models' own templates, the recipe's, and the one that the merged model gets. A template is chosen when the
first chat of a task needs it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_slta.checkpoints.tokenizers import EndTokens, OwnTokenizer, differing_tokens, end_tokens, own_tokenizer
from mergekit_slta.data.templates import (
    BASE,
    INLINE,
    MIN_INLINE_LENGTH,
    MODEL,
    OUTPUT,
    ChatTemplate,
    Template,
    added_tokens,
    control_tokens,
    not_a_template,
    num_tokens,
    own_template,
    read_template,
    render_alike,
    written_text,
)
from mergekit_slta.errors import DataError, listing, show
from mergekit_slta.libraries.mergekit import chat_template_names, chat_template_text
from mergekit_slta.recipe.recipe import Recipe, Task

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

LOG = logging.getLogger(__name__)
_DESCRIPTIONS = {MODEL: "its own", OUTPUT: "the merged model's", BASE: "the base's", INLINE: "the recipe's"}


def describe_template(origin: str) -> str:
    """Name a template by its origin, for messages: "its own", "the merged model's", "chatml"."""
    return _DESCRIPTIONS.get(origin, show(origin))


class Templates:
    """The chat templates of a recipe's tasks.

    Args:
        recipe: the recipe.
        options: mergekit's options.
        tokenizer: the output's.
        day: the date that templates see as today.
    """

    def __init__(self, recipe: Recipe, options: MergeOptions, tokenizer: PreTrainedTokenizerBase, day: date) -> None:
        self.recipe = recipe
        self.options = options
        self.tokenizer = tokenizer
        self.day = day
        self._own: dict[ModelReference, OwnTokenizer] = {}
        self._warned: set[str] = set()

    def of(self, task: Task) -> ChatTemplate:
        """What renders the chats of a task."""
        return ChatTemplate(self.tokenizer, lambda with_tools: self._choose(task, with_tools), self.day)

    def own(self, model: ModelReference) -> OwnTokenizer:
        """A model's own tokenizer and template."""
        if model not in self._own:
            self._own[model] = own_tokenizer(model, self.options)
        return self._own[model]

    @cached_property
    def shipped(self) -> str | None:
        """The template that the merged model gets for chats without tools; None if it gets none.

        With `chat_template: auto` it is the one that most models have; among equals the base's, then the first
        expert's. (mergekit's own choice among equals differs from run to run.)
        """
        given = self.recipe.config.chat_template
        if not given or given == "auto":
            places = [ModelReference(model=model.model) for model in self.recipe.models] if given else []
            found = [template.strip() for place in places if (template := self.own(place).template)]
            return Counter(found).most_common(1)[0][0] if found else own_template(self.tokenizer)
        return chat_template_text(given) if given in chat_template_names() else given

    def _shipped(self, with_tools: bool) -> str | None:
        """The template that the merged model gets; the recipe's replaces all of a tokenizer's templates."""
        several = with_tools and not self.recipe.config.chat_template
        return own_template(self.tokenizer, with_tools) if several else self.shipped

    @property
    def resolved_key(self) -> str | None:
        """The recipe's top-level `chat_template`; `auto` is replaced by the template, if mergekit can be given it."""
        given, shipped = self.recipe.config.chat_template, self.shipped
        usable = shipped is not None and "{" in shipped and len(shipped) >= MIN_INLINE_LENGTH
        return shipped if given == "auto" and usable else given

    def warn_of_differing_tokens(self) -> None:
        """Warn of experts whose tokenizer numbers tokens in another way than the base's.

        The rows of the embeddings are merged by number, unless the recipe has a `tokenizer` section.
        """
        if self.recipe.config.tokenizer or self.recipe.config.tokenizer_source:
            return
        for task in self.recipe.tasks:
            own = self.own(task.model).tokenizer
            if tokens := differing_tokens(own, self.tokenizer) if own else []:
                LOG.warning(
                    "the tokenizer of %s numbers %d tokens in another way than the base's (%s), and embeddings are "
                    "merged by number: a `tokenizer` section, as `tokenizer: {source: base}`, merges them by name",
                    show(self.recipe.names[task.model]), len(tokens), listing(tokens, 3),
                )  # fmt: skip

    def ends_of(self, task: Task, config: PretrainedConfig) -> EndTokens:
        """The tokens behind which a task's expert stops, by its own tokenizer."""
        own = self.own(task.model).tokenizer or self.own(self.recipe.base).tokenizer or self.tokenizer
        return end_tokens(task.model, config, own, own)

    def warn_of_other_ends(self, configs: Mapping[ModelReference, PretrainedConfig]) -> None:
        """Warn of experts that end their answers with a token behind which the merged model does not stop.

        Args:
            configs: the models' configs. The merged model gets the base's, with its generation config.
        """
        base = self.own(self.recipe.base).tokenizer or self.tokenizer
        merged = end_tokens(self.recipe.base, configs[self.recipe.base], base, self.tokenizer)
        for task in self.recipe.tasks:
            ends = self.ends_of(task, configs[task.model])
            if lost := sorted((ends.acting - merged.acting) | (ends.all - merged.all)):
                LOG.warning(
                    "%s ends its answers with %s, and the merged model stops at %s, as the base does: it may not stop "
                    "where the expert does, unless `eos_token_id` of its generation_config.json gets that token, too",
                    show(self.recipe.names[task.model]), listing(lost), listing(sorted(merged.acting)) or "no token",
                )  # fmt: skip

    def warn_of_lost_templates(self) -> None:
        """Warn of experts whose own template the merged model does not get, where no rows of theirs are chats."""
        if self.recipe.config.chat_template not in (None, "auto"):
            return  # it has been chosen
        for task in self.recipe.tasks:
            name, own = self.recipe.names[task.model], self.own(task.model)
            if name not in self._warned and self._differs(own, with_tools=False):
                LOG.warning(
                    "%s has a chat template of its own, and the merged model gets %s: the recipe's top-level "
                    "`chat_template` chooses it", show(name), "another" if self.shipped else "none",
                )  # fmt: skip

    def _choose(self, task: Task, with_tools: bool) -> Template:
        """Choose and check the template of a task's chats; warn if the expert's own differs from the merged model's.

        Raises:
            RecipeError, DataError: there is none where the key says so, it is not valid, or the output's tokenizer
                splits a token of it.
        """
        name = self.recipe.names[task.model]
        own = self.own(task.model)
        template = self._named(task, own, with_tools)
        if template.text is None:
            if task.chat_template is None:
                return template  # `data.rendering` says so
            raise DataError(
                f"`chat_template` of {show(name)} is {show(task.chat_template)!r}, and there is no such chat template "
                f"({describe_template(template.origin)}): set another, or choose a column or a template with `text`",
                code="missing-chat-template",
            )
        try:
            written = written_text(template.text, self.tokenizer, with_tools)
        except Exception as error:  # Jinja's own, which this package does not depend on
            raise not_a_template(f"{describe_template(template.origin)}, for {name}", error) from error
        self._check_tokens(task, template, written)
        self._warn_of_differing_templates(name, own, template, with_tools)
        return template

    def _named(self, task: Task, own: OwnTokenizer, with_tools: bool) -> Template:
        key = task.chat_template
        if key is None:
            key = MODEL if own.template and not self.recipe.config.chat_template else OUTPUT
            if key == OUTPUT and own.problem and not self.recipe.config.chat_template:
                LOG.warning(
                    "the tokenizer of %s cannot be read (%s): the merged model's chat template renders its rows",
                    show(self.recipe.names[task.model]), own.problem,
                )  # fmt: skip
        if key == MODEL:
            return Template(own.template_for(with_tools), MODEL)
        if key == OUTPUT:
            return Template(self._shipped(with_tools), OUTPUT)
        if key == BASE:
            return Template(self.own(self.recipe.base).template_for(with_tools), BASE)
        return read_template(key, self.recipe.names[task.model])

    def _check_tokens(self, task: Task, template: Template, written: str) -> None:
        """Refuse a template with a token that the output's tokenizer splits: no model has seen the parts in its place.

        Such tokens are those that the models whose template it is have added to their vocabularies. (Zephyr's writes
        `<|user|>`, which its own tokenizer splits.) A template of no model is meant for tokens of the form `<|...|>`,
        unless the expert was trained with the parts.

        Raises:
            DataError: see above.
        """
        text = (template.text or "").strip()  # `auto` strips, too
        owners = [model for model in self.recipe.models if text in map(str.strip, self.own(model).templates)]
        if task.model in owners:
            owners = [task.model]  # it may split what others do not
        tokens = [] if owners else [token for token in control_tokens(written) if not self._splits(task.model, token)]
        for model in dict.fromkeys([task.model, *(owners or self.recipe.models)]):
            tokens += added_tokens(written, self.own(model).tokenizer)
        for token in tokens:
            parts = num_tokens(token, self.tokenizer)
            if parts == 1:
                continue
            known = [model for model in self.recipe.models if self._has(model, token)]
            remedies = ["add `tokenizer: {source: union}` to the recipe"] if known else []
            if template.origin != OUTPUT:
                remedies.append(f"set `chat_template: {OUTPUT}` for the model")
            raise DataError(
                f"the chat template for {show(self.recipe.names[task.model])} ({describe_template(template.origin)}) "
                f"writes {show(token)}, which the merged model's tokenizer splits into {parts} tokens: "
                f"{' or '.join(remedies) or 'choose another `chat_template`'}",
                code="split-token",
            )

    def _splits(self, model: ModelReference, token: str) -> bool:
        """Whether a model's own template writes a token that its own tokenizer splits."""
        return any(token in text for text in self.own(model).templates) and not self._has(model, token)

    def _has(self, model: ModelReference, token: str) -> bool:
        tokenizer = self.own(model).tokenizer
        return tokenizer is not None and num_tokens(token, tokenizer) == 1

    def _warn_of_differing_templates(self, name: str, own: OwnTokenizer, template: Template, with_tools: bool) -> None:
        if name not in self._warned and self._differs(own, with_tools):
            self._warned.add(name)
            used, shipped = describe_template(template.origin), self._shipped(with_tools)
            if template.origin != MODEL:
                LOG.warning(
                    "%s: its rows are rendered with %s chat template, not with its own: add `chat_template: %s` under "
                    "its `parameters` if it was trained with its own", show(name), used, MODEL,
                )  # fmt: skip
            elif shipped:
                LOG.warning(
                    "%s: its rows are rendered with %s chat template, but the merged model gets another, so users will "
                    "send it other prompts: add `chat_template: %s` under its `parameters` to calibrate on the merged "
                    "model's", show(name), used, OUTPUT,
                )  # fmt: skip
            else:
                LOG.warning(
                    "%s: its rows are rendered with %s chat template, but the merged model gets none: choose one with "
                    "the recipe's top-level `chat_template`", show(name), used,
                )  # fmt: skip

    def _differs(self, own: OwnTokenizer, with_tools: bool) -> bool:
        """Whether a model has a template of its own that renders chats otherwise than the merged model's."""
        shipped, trained = self._shipped(with_tools), own.template_for(with_tools)
        return bool(trained) and not (shipped and render_alike(trained, shipped, self.tokenizer, with_tools))
