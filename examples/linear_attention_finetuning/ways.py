"""What prepare.py and compare.py share: the two ways of fine-tuning, names of files, and remembered held-out losses.

The helpers of the SmolLM2 example next door (data, chat template, completion loss, checkpoints) are used as they are.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

SMOLLM2 = Path(__file__).resolve().parent.parent / "smollm2"
sys.path.insert(0, str(SMOLLM2))  # its modules import each other by their bare names

from common import TASKS, Losses, held_out_loss, load_model, load_tokenizer  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

disable_progress_bar()

WAYS = {"all": "all weights", "attention": "linear layers of attention"}
"""Ways of fine-tuning: the prefix of file names, and what to call them in a table."""
ATTENTION_WEIGHT = re.compile(r"\.[qkvo]_proj\.weight$")
"""Names of the weights that the second way trains."""
LEARNING_RATES_NAME = "learning_rates.json"
TRAINING_NAME = "training.json"
LOSSES_NAME = "losses.json"


def smollm2_prepare() -> ModuleType:
    """Load the prepare.py of the SmolLM2 example, under a name that does not collide with the one beside this file."""
    spec = importlib.util.spec_from_file_location("smollm2_prepare", SMOLLM2 / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expert_name(way: str, task: str) -> str:
    """Return the directory name of an expert inside the work directory."""
    return f"{way}_{task}"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a file that is not there is an empty one."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def evaluate(workdir: Path, names: Iterable[str], log: Callable[[str], None]) -> dict[str, Losses]:
    """Return the held-out loss per completion token on every task, by directory name.

    Losses are remembered in WORKDIR/losses.json for as long as the checkpoint is the same one.
    """
    remembered = read_json(workdir / LOSSES_NAME)
    losses: dict[str, Losses] = {}
    for name in names:
        made = (workdir / name / "config.json").stat().st_mtime_ns
        if remembered.get(name, {}).get("made") != made:
            log(f"evaluating {name}")
            model, tokenizer = load_model(workdir / name), load_tokenizer(workdir / name)
            values = {task: held_out_loss(model, tokenizer, workdir / "data" / f"{task}_test.jsonl") for task in TASKS}
            remembered[name] = {"made": made, "losses": values}
            write_json(workdir / LOSSES_NAME, remembered)
        losses[name] = remembered[name]["losses"]
    return losses


def align(rows: list[list[str]]) -> str:
    """Render rows of equal length as columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        [cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs)]
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)
