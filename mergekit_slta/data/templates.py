"""Render chats as text with a chat template.

Scope: one task's template. `rendering.py` decides which rows are chats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ChatTemplate:
    """What renders the chats of a task.

    Attributes:
        tokenizer: the output's; it gives the special tokens, such as `bos_token`, and tokenizes the rows.
        text: the template in Jinja; None if there is none.
    """

    tokenizer: PreTrainedTokenizerBase
    text: str | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """The template that a tokenizer uses by default."""
        template = getattr(tokenizer, "chat_template", None)
        return cls(tokenizer, template.get("default") if isinstance(template, dict) else template)

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
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.text,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            tokenize=False,
        )
