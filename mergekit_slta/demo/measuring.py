"""Measuring the demo's models: held-out scores, mergekit's own merges as baselines, and the table."""

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
        exact: share of rows, 0 to 1, whose every answer token is the likeliest one, end of sequence included.
        loss: mean cross-entropy of the answer tokens, in nats per token.
    """

    exact: float
    loss: float


Scores = Mapping[str, Score]
"""Task name, or "mean", to score."""


def measure_baselines(
    directory: Path, tests: Mapping[str, Sequence[data.Encoded]]
) -> tuple[Scores, dict[float, Scores]]:
    """Scores of mergekit's own merges of the same checkpoints: the experts' average, and task arithmetic by scale."""
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
    """One merge by mergekit, quietly."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    from mergekit_slta.libraries.mergekit import forget_loaders

    config = MergeConfiguration.model_validate(recipe)
    try:
        run_merge(config, str(folder), MergeOptions(quiet=True, write_model_card=False))
    finally:
        # mergekit keeps open files by path for the whole process: a later demo would read what it has overwritten.
        forget_loaders(config.referenced_models())


def encode_tests(splits: Mapping[str, data.Split], directory: Path) -> dict[str, list[data.Encoded]]:
    """The held-out examples by task, as token ids of the base's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory / "models" / "base")
    return {task.name: data.encode_examples(tokenizer, task, splits[task.name].test) for task in data.TASKS}


def evaluate(folder: Path, tests: Mapping[str, Sequence[data.Encoded]]) -> dict[str, Score]:
    """Scores of one checkpoint, computed in float32, by task and their "mean"."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scores = {name: score(model, rows) for name, rows in tests.items()}
    parts = list(scores.values())
    mean = Score(sum(part.exact for part in parts) / len(parts), sum(part.loss for part in parts) / len(parts))
    return {**scores, "mean": mean}


def score(model: LlamaForCausalLM, rows: Sequence[data.Encoded], batch_rows: int = 128) -> Score:
    """Teacher-forced: a row whose argmaxes all match is exactly what greedy decoding would write."""
    import torch
    import torch.nn.functional as functional

    exact, loss, tokens = 0, 0.0, 0
    with torch.inference_mode():
        for begin in range(0, len(rows), batch_rows):
            ids, labels = padded(rows[begin : begin + batch_rows])
            logits, wanted = model(input_ids=ids, use_cache=False).logits[:, :-1], labels[:, 1:]
            counted = wanted != NO_LOSS  # [rows, tokens]
            exact += int(((logits.argmax(-1) == wanted) | ~counted).all(1).sum())
            loss += float(functional.cross_entropy(logits[counted], wanted[counted], reduction="sum"))
            tokens += int(counted.sum())
    return Score(exact / len(rows), loss / tokens)


def _cells(table: Mapping[str, Scores]) -> list[list[str]]:
    """Header and one row per model: exact match in percent with the loss in parentheses."""
    columns = list(next(iter(table.values())))
    rows = [[name, *(f"{100 * s[c].exact:5.1f} ({s[c].loss:.3f})" for c in columns)] for name, s in table.items()]
    return [["model", *columns], *rows]


def text_table(table: Mapping[str, Scores]) -> str:
    """Columns aligned for a terminal: names to the left, numbers to the right."""
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
    """The same cells as a Markdown table."""
    header, *rows = _cells(table)
    rule = ["---", *["---:"] * (len(header) - 1)]
    caption = "Exact match in % (loss in nats per answer token) on held-out rows.\n\n"
    return caption + "".join(f"| {' | '.join(map(str.strip, row))} |\n" for row in [header, rule, *rows])


def plain(table: Mapping[str, Scores]) -> dict[str, dict[str, dict[str, float]]]:
    return {model: {task: asdict(score) for task, score in scores.items()} for model, scores in table.items()}
