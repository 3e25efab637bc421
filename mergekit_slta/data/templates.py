"""Render chats as text with a chat template.

Scope: one task's template, what it renders, and the tokens in it. `job.templates` chooses it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_slta.errors import DataError, RecipeError, listing, show
from mergekit_slta.libraries.mergekit import chat_template_names, chat_template_text
from mergekit_slta.libraries.transformers import clock_at, template_literals

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL, OUTPUT, BASE = "model", "output", "base"
"""Values of the key `chat_template`: the expert's own template, the one that the merged model gets, the base's."""
INLINE = "inline"
"""Stands for a template that is written out in the recipe, in files and messages."""
MIN_INLINE_LENGTH = 20
"""mergekit takes a shorter text for a name, not for a template."""
_CONTROL_TOKEN = re.compile(r"<[|｜][^<>|｜\s\0]+[|｜]>|\[\|[^\[\]|\s\0]+\|\]")
"""Literals that are meant as one token by their form: `<|im_start|>`, `<｜User｜>`, `[|system|]`."""
_PROBES = (
    (["user", "assistant"], False),
    (["user", "assistant", "user"], True),
    (["system", "user", "assistant", "user"], True),
)
"""Roles of the messages, and whether to add a generation prompt."""
_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "text", "parameters": {"type": "object", "properties": {}}},
}


def today() -> date:
    """Today's date. Nothing else in this package reads the calendar for the rows."""
    return date.today()


class Template(NamedTuple):
    """A chat template.

    Attributes:
        text: the template in Jinja; None if there is none.
        origin: where it comes from: `MODEL`, `OUTPUT`, `BASE`, a name of mergekit's, a file, or `INLINE`.
    """

    text: str | None
    origin: str


def own_template(tokenizer: PreTrainedTokenizerBase | None, with_tools: bool = False) -> str | None:
    """The template that a tokenizer uses unless told otherwise; None if there is none.

    Args:
        tokenizer: the tokenizer.
        with_tools: for a chat with tools. Of several templates transformers then takes `tool_use`, if it is there.
    """
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return (with_tools and template.get("tool_use")) or template.get("default") or None
    return template or None


@dataclass(frozen=True)
class ChatTemplate:
    """What renders the chats of a task.

    Attributes:
        tokenizer: the output's; it gives the special tokens, such as `bos_token`, and tokenizes the rows.
        find: chooses and checks the template of chats with tools (True) or of other chats (False). It is called when
            the first such chat needs it.
        day: the date that templates see as today.
    """

    tokenizer: PreTrainedTokenizerBase
    find: Callable[[bool], Template]
    day: date

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """The template that a tokenizer uses by default."""
        return cls(tokenizer, lambda with_tools: Template(own_template(tokenizer, with_tools), OUTPUT), today())

    @cached_property
    def found(self) -> Template:
        """The template of chats without tools.

        Raises:
            RecipeError, DataError: what `find` raises.
        """
        return self.find(False)

    @cached_property
    def found_for_tools(self) -> Template:
        """The template of chats with tools.

        Raises:
            RecipeError, DataError: what `find` raises.
        """
        return self.find(True)

    @property
    def text(self) -> str | None:
        """The template of chats without tools, in Jinja; None if there is none."""
        return self.found.text

    def text_for(self, tools: object) -> str | None:
        """The template in Jinja for chats with these tools, or without; None if there is none."""
        return (self.found_for_tools if tools else self.found).text

    @property
    def used(self) -> Template | None:
        """The template, if a chat has needed it. That of chats with tools has the same origin."""
        return self.__dict__.get("found") or self.__dict__.get("found_for_tools")

    @property
    def written_day(self) -> date | None:
        """The date that the chats may hold; None if no template that was used reads it."""
        used = (self.__dict__.get(name) for name in ("found", "found_for_tools"))
        return self.day if any("strftime_now" in (template.text or "") for template in used if template) else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Render a chat as text, with all special tokens.

        Args:
            messages: the chat; each message has a `role` and a `content`.
            add_generation_prompt: end with the text that begins an assistant's message.
            tools: descriptions of the functions that the assistant may call.

        Raises:
            Exception: whatever Jinja or the template itself raises.
        """
        with clock_at(self.day):
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.text_for(tools),
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                tokenize=False,
            )


def read_template(value: str, model: str) -> Template:
    """Read a template that the key `chat_template` names: one of mergekit's, a file, or the text itself.

    Args:
        value: the key's value.
        model: the expert's name, for messages.

    Raises:
        RecipeError: it is none of them.
        DataError: the file cannot be read.
    """
    if value in chat_template_names():
        return Template(chat_template_text(value), value)
    exists = os.path.isfile(value)
    if not exists and ("{{" in value or "{%" in value):
        return Template(value, INLINE)
    if not exists or value.endswith(".json"):
        missing = ", and there is no such file" if not exists and (os.sep in value or Path(value).suffix) else ""
        raise RecipeError(
            f"`chat_template` of {show(model)} is {show(value)!r}{missing}: choose one of "
            f"{listing((MODEL, OUTPUT, BASE, *chat_template_names()), 20)}, a `.jinja` file (paths start at the "
            "current folder), or a Jinja template",
            code="invalid-value",
        )
    try:
        return Template(Path(value).read_text(encoding="utf-8-sig"), value)
    except (OSError, UnicodeDecodeError) as error:
        raise not_a_template(value, error) from error


def not_a_template(name: str, error: Exception) -> DataError:
    """The error for a chat template that cannot be read or is not valid Jinja."""
    return DataError(
        f"`chat_template` is not a template ({show(error)}): {show(name)}; correct it, or set another `chat_template`",
        code="invalid-template",
    )


def written_text(template: str, tokenizer: PreTrainedTokenizerBase, with_tools: bool = False) -> str:
    """All text that a template writes by itself: its literals and three rendered chats, separated by NUL characters.

    Some templates join tokens from parts (`'<|' + role + '|>'`), which only a rendered chat shows.

    Args:
        template: the template in Jinja.
        tokenizer: the output's.
        with_tools: render the chats with a tool.

    Raises:
        jinja2.TemplateSyntaxError: it is not valid Jinja.
    """
    return "\0".join(
        [*template_literals(template), *(text for text in _rendered(template, tokenizer, with_tools) if text)]
    )


def render_alike(one: str, other: str, tokenizer: PreTrainedTokenizerBase, with_tools: bool = False) -> bool:
    """Whether two templates render a few short chats, with a tool or without, as the same text."""
    return one == other or _rendered(one, tokenizer, with_tools) == _rendered(other, tokenizer, with_tools)


def _rendered(template: str, tokenizer: PreTrainedTokenizerBase, with_tools: bool) -> list[str | None]:
    """Render the probes; None where the template refuses one."""
    chat = ChatTemplate(tokenizer, lambda with_tools: Template(template, INLINE), date(2000, 1, 1))
    texts: list[str | None] = []
    for roles, add_generation_prompt in _PROBES:
        messages = [{"role": role, "content": f"text {number}"} for number, role in enumerate(roles)]
        try:
            texts.append(chat.render(messages, add_generation_prompt, [_TOOL] if with_tools else None))
        except Exception:  # a template may know no system message, say
            texts.append(None)
    return texts


def control_tokens(text: str) -> list[str]:
    """Literals of a text that are meant as one token by their form, each once."""
    return list(dict.fromkeys(_CONTROL_TOKEN.findall(text)))


def added_tokens(text: str, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Tokens in a text that were added to a tokenizer's vocabulary: its special tokens and the like.

    Tokens of white space alone are left out, because templates write them as ordinary text.
    """
    added: Iterable[str] = () if tokenizer is None else tokenizer.added_tokens_encoder
    return sorted(token for token in added if token.strip() and token in text)


def num_tokens(literal: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of tokens that a literal becomes: 1 if the vocabulary has it and the tokenizer does not split it."""
    ids = tokenizer(
        literal, add_special_tokens=False, truncation=False, padding=False, split_special_tokens=False, verbose=False
    )["input_ids"]
    return 1 if tokenizer.get_vocab().get(literal) in ids else len(ids)
