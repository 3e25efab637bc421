"""What the modules here take from the SmolLM2 example next door, and small helpers for files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
SMOLLM2 = HERE.parent / "smollm2"
sys.path.insert(0, str(SMOLLM2))  # its modules import each other by their bare names

from common import (  # noqa: E402
    EncodedRow,
    Message,
    completed_directory,
    completion_loss,
    encode_row,
    installed_command,
    load_model,
    load_tokenizer,
    make_batches,
    read_rows,
    save_checkpoint,
    train,
    write_rows,
)
from prepare import make_base  # noqa: E402
from tasks import conversation, translate_rows  # noqa: E402

disable_progress_bar()

__all__ = [
    "HERE",
    "EncodedRow",
    "Message",
    "completed_directory",
    "completion_loss",
    "conversation",
    "encode_row",
    "installed_command",
    "load_model",
    "load_tokenizer",
    "make_base",
    "make_batches",
    "read_json",
    "read_rows",
    "save_checkpoint",
    "train",
    "translate_rows",
    "write_json",
    "write_rows",
]


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
