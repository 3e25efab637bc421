"""Score the demo's models and mergekit's own merges (the baselines) on held-out rows, and print the table."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_slta.demo import tasks as data
from mergekit_slta.demo.training import NO_LOSS, padded

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SCALES = tuple(tenth / 10 for tenth in range(1, 11))
"""Scales tried for task arithmetic."""


@dataclass(frozen=True)
class Score:
    """Held-out quality on one task (or the mean over tasks).

    Attributes:
        exact: share of rows, 0 to 1, in which every answer token, end of sequence included, is the most likely one.
        loss: mean cross-entropy of the answer tokens, in nats per token.
    """

    exact: float
    loss: float


Scores = Mapping[str, Score]
"""Task name, or "mean", to score."""


def measure_baselines(
    directory: Path, tests: Mapping[str, Sequence[data.Encoded]]
) -> tuple[Scores, dict[float, Scores]]:
    """Merge the same checkpoints with mergekit's own methods and score the results.

    Returns:
        Scores of the average of the experts, and of task arithmetic by scale.
    """
    models = directory / "models"
    experts = [str(models / name) for name in tests]

    def measured(recipe: dict[str, Any]) -> Scores:
        with tempfile.TemporaryDirectory(prefix="slta-demo-", ignore_cleanup_errors=True) as folder:
            _merge_in_process(recipe, Path(folder))
            return evaluate(Path(folder), tests)

    average = measured(_baseline("linear", experts, 1 / len(experts)))
    arithmetic = {
        scale: measured({**_baseline("task_arithmetic", experts, scale), "base_model": str(models / "base")})
        for scale in SCALES
    }
    return average, arithmetic


def _baseline(method: str, experts: Sequence[str], weight: float) -> dict[str, Any]:
    return {
        "merge_method": method,
        "models": [{"model": path, "parameters": {"weight": weight}} for path in experts],
        "parameters": {"normalize": False},
        "out_dtype": "bfloat16",
    }


def _merge_in_process(recipe: dict[str, Any], folder: Path) -> None:
    """Let mergekit merge, without output."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    from mergekit_slta.libraries.mergekit import forget_loaders

    config = MergeConfiguration.model_validate(recipe)
    try:
        run_merge(config, str(folder), MergeOptions(quiet=True, write_model_card=False))
    finally:
        # mergekit caches open files by path for the whole process; a later demo would read the overwritten files.
        forget_loaders(config.referenced_models())


def encode_tests(splits: Mapping[str, data.Split], directory: Path) -> dict[str, list[data.Encoded]]:
    """The held-out examples by task, tokenised with the base's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory / "models" / "base")
    return {task.name: data.encode_examples(tokenizer, task, splits[task.name].test) for task in data.TASKS}


def evaluate(folder: Path, tests: Mapping[str, Sequence[data.Encoded]]) -> dict[str, Score]:
    """Score a checkpoint in float32; returns a score for each task, and their mean under "mean"."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return with_mean({name: score(model, rows) for name, rows in tests.items()})


def with_mean(scores: Scores) -> dict[str, Score]:
    """The scores of all tasks, and their mean under "mean"."""
    parts = list(scores.values())
    mean = Score(sum(part.exact for part in parts) / len(parts), sum(part.loss for part in parts) / len(parts))
    return {**scores, "mean": mean}


def score(model: LlamaForCausalLM, rows: Sequence[data.Encoded], batch_rows: int = 128) -> Score:
    """Score answers with teacher forcing: each token given the prompt and the answer so far.

    If the most likely tokens of a row are all right, greedy decoding writes exactly this answer.
    """
    import torch
    import torch.nn.functional as functional

    exact, loss, tokens = 0, 0.0, 0
    with torch.inference_mode():
        for begin in range(0, len(rows), batch_rows):
            ids, labels = padded(rows[begin : begin + batch_rows])
            logits, targets = model(input_ids=ids, use_cache=False).logits[:, :-1], labels[:, 1:]
            counted = targets != NO_LOSS  # [rows, tokens]
            exact += int(((logits.argmax(-1) == targets) | ~counted).all(1).sum())
            loss += float(functional.cross_entropy(logits[counted], targets[counted], reduction="sum"))
            tokens += int(counted.sum())
    return Score(exact / len(rows), loss / tokens)


def _cells(table: Mapping[str, Scores]) -> list[list[str]]:
    """The header and one row for each model: exact match in per cent, with the loss in parentheses."""
    columns = list(next(iter(table.values())))
    rows = [[name, *(f"{100 * s[c].exact:5.1f} ({s[c].loss:.3f})" for c in columns)] for name, s in table.items()]
    return [["model", *columns], *rows]


def text_table(table: Mapping[str, Scores]) -> str:
    """The table for a terminal: names are aligned left, numbers right."""
    cells = _cells(table)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_table(table: Mapping[str, Scores]) -> str:
    """The table as Markdown."""
    header, *rows = _cells(table)
    rule = ["---", *["---:"] * (len(header) - 1)]
    caption = "Exact match in % (loss in nats per answer token) on held-out rows.\n\n"
    return caption + "".join(f"| {' | '.join(map(str.strip, row))} |\n" for row in [header, rule, *rows])


def plain(table: Mapping[str, Scores]) -> dict[str, dict[str, dict[str, float]]]:
    """The table as plain dictionaries, for JSON."""
    return {model: {task: asdict(score) for task, score in scores.items()} for model, scores in table.items()}
