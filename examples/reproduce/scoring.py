"""How good a model is at the tasks: completion loss, token accuracy, greedy answers, and what it forgot."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from experts import products_in
from shared import EncodedRow, Message, encode_row, make_batches, read_json, read_rows
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 1600
Scores = dict[str, dict[str, float]]


@torch.inference_mode()
def completion_scores(
    model: PreTrainedModel, pad_id: int, rows: Sequence[EncodedRow], precision: str
) -> dict[str, float]:
    """Mean cross-entropy (nats) and share of tokens predicted right, over all completion tokens of the rows.

    The layers multiply in `precision`; the projection to the vocabulary and the loss are float32.
    """
    total, right, count = 0.0, 0, 0
    device = model.device
    for batch in make_batches(list(rows), BATCH_TOKENS):
        width = max(len(row.ids) for row in batch)
        ids = torch.full((len(batch), width), pad_id, device=device)
        attention = torch.zeros_like(ids)
        scored = torch.zeros_like(ids, dtype=torch.bool)
        for index, row in enumerate(batch):
            ids[index, : len(row.ids)] = torch.tensor(row.ids, device=device)
            attention[index, : len(row.ids)] = 1
            scored[index, max(1, row.prompt_length) : len(row.ids)] = True
        with products_in(precision, device.type):
            hidden = model.model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
        predicted = scored[:, 1:]
        logits = model.lm_head(hidden[:, :-1][predicted].float())
        targets = ids[:, 1:][predicted]
        total += cross_entropy(logits, targets, reduction="sum").item()
        right += int((logits.argmax(-1) == targets).sum())
        count += targets.numel()
    return {"loss": total / count, "accuracy": right / count, "tokens": count}


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    files: dict[str, Sequence[list[Message]]],
    precision: str,
) -> Scores:
    """Scores of a model on named sets of conversations."""
    return {
        name: completion_scores(
            model, tokenizer.pad_token_id, [encode_row(tokenizer, messages) for messages in rows], precision
        )
        for name, rows in files.items()
    }


def general_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, passages: Sequence[str], precision: str
) -> float:
    """Mean loss per token on running text, without a chat template: what fine-tuning and merging forgot."""
    rows = [EncodedRow(tokenizer(text, add_special_tokens=False)["input_ids"], 1) for text in passages]
    return completion_scores(model, tokenizer.pad_token_id, rows, precision)["loss"]


def last_number(text: str) -> str | None:
    """The last number of a worked answer."""
    found = re.findall(r"-?\d+(?:\.\d+)?", text)
    return found[-1] if found else None


def as_json(text: str) -> Any:
    """What a text says as JSON; the text itself where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


READINGS: dict[str, Callable[[str], Any]] = {"math": last_number, "extract": as_json}
"""What counts of an answer, by task; the whole text for the others."""


@torch.inference_mode()
def exact_matches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, rows: Sequence[list[Message]],
    max_new_tokens: int,
) -> float:  # fmt: skip
    """Share of the conversations whose greedy answer says what the reference says."""
    read = READINGS.get(task, str)
    tokenizer.padding_side = "left"
    prompts = [
        tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True) for messages in rows
    ]
    inputs = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    wanted = [messages[-1]["content"] for messages in rows]
    right = [read(given.strip()) == read(reference.strip()) for given, reference in zip(answers, wanted, strict=True)]
    return sum(right) / len(right)


def task_rows(workdir: Path, task: str, split: str) -> list[list[Message]]:
    """The conversations of one split of a task."""
    return read_rows(workdir / "data" / f"{task}_{split}.jsonl")


def general_passages(workdir: Path) -> list[str]:
    """Held-out running text."""
    return read_json(workdir / "data" / "general.json")
