"""How a merged model is used: the lines of Python in its model card.

Scope: small files of the model's folder; no library that runs models is loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_slta.files.names import CONFIG_NAME, TOKENIZER_CONFIG_NAME

CHAT_TEMPLATE_NAME = "chat_template.jinja"
OWNER = "your-name"
"""Stands for the owner of the model's repository."""
_CAUSAL = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Usage:
    """What a model's folder says of its use.

    Attributes:
        name: of the folder.
        is_chat: whether its tokenizer has a chat template.
        is_causal: whether its class is a language model alone, which transformers' text generation loads.
        has_code: whether it needs code of its own.
    """

    name: str
    is_chat: bool
    is_causal: bool
    has_code: bool

    @classmethod
    def of(cls, name: str, folder: Path) -> Usage | None:
        """Read a folder; None if it holds no config or no tokenizer."""
        config, tokenizer = _read(folder / CONFIG_NAME), _read(folder / TOKENIZER_CONFIG_NAME)
        if not config or tokenizer is None:
            return None
        classes = config.get("architectures")
        return cls(
            name,
            bool(tokenizer.get("chat_template")) or (folder / CHAT_TEMPLATE_NAME).is_file(),
            isinstance(classes, list) and bool(classes) and str(classes[0]).endswith(_CAUSAL),
            bool(config.get("auto_map")),
        )

    @property
    def code(self) -> str:
        """Lines of Python that load the model and write an answer."""
        model = json.dumps(f"{OWNER}/{self.name}")
        options = f'dtype="auto", device_map="auto"{", trust_remote_code=True" * self.has_code}'
        if not self.is_causal:
            return (
                "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
                f"model = AutoModelForImageTextToText.from_pretrained({model}, {options})\n"
                f"processor = AutoProcessor.from_pretrained({model})"
            )
        begin = (
            f'from transformers import pipeline\n\ngenerate = pipeline("text-generation", model={model}, {options})\n'
        )
        if self.is_chat:
            return begin + (
                'messages = [{"role": "user", "content": "What can you do?"}]\n'
                'print(generate(messages, max_new_tokens=256)[0]["generated_text"][-1]["content"])'
            )
        return begin + 'print(generate("Once upon a time", max_new_tokens=64)[0]["generated_text"])'


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
