"""How good a model is at the tasks: completion loss, token accuracy, greedy answers, and what it forgot."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from experts import products_in
from shared import EncodedRow, Message, encode_row, load_model, load_tokenizer, make_batches, read_json, read_rows
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mergekit_slta.data.rows import sample_numbers

BATCH_TOKENS = 1600
Scores = dict[str, dict[str, Any]]


@torch.inference_mode()
def answer_states(
    model: PreTrainedModel, pad_id: int, rows: Sequence[EncodedRow], precision: str
) -> list[torch.Tensor]:
    """What the output projection gets where a token of the completion is predicted: [tokens, width] float32 by row.

    The layers multiply in `precision`.
    """
    states: dict[int, torch.Tensor] = {}
    device = model.device
    for batch in make_batches(list(rows), BATCH_TOKENS):
        width = max(len(row.ids) for row in batch)
        ids = torch.full((len(batch), width), pad_id, device=device)
        attention = torch.zeros_like(ids)
        for index, row in enumerate(batch):
            ids[index, : len(row.ids)] = torch.tensor(row.ids, device=device)
            attention[index, : len(row.ids)] = 1
        with products_in(precision, device.type):
            hidden = model.model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
        for index, row in enumerate(batch):
            states[id(row)] = hidden[index, max(1, row.prompt_length) - 1 : len(row.ids) - 1].float().clone()
    return [states[id(row)] for row in rows]


@dataclass(frozen=True)
class Teacher:
    """What an expert predicts on rows of its task: its states by row, and its output projection."""

    states: list[torch.Tensor]
    head: torch.nn.Module

    def log_probabilities(self, row: int) -> torch.Tensor:
        """[tokens, vocabulary] float32."""
        return self.head(self.states[row]).log_softmax(-1)


@functools.cache
def teacher(workdir: Path, task: str, precision: str, device: str) -> Teacher:
    """The expert of a task on its test rows."""
    model, tokenizer = load_model(workdir / task).to(device).eval(), load_tokenizer(workdir / "base")
    rows = [encode_row(tokenizer, messages) for messages in task_rows(workdir, task, "test")]
    return Teacher(answer_states(model, tokenizer.pad_token_id, rows, precision), model.lm_head)


@torch.inference_mode()
def completion_scores(
    model: PreTrainedModel, pad_id: int, rows: Sequence[EncodedRow], precision: str, expert: Teacher | None = None
) -> dict[str, Any]:
    """Mean cross-entropy (nats) and share of tokens predicted right, over all completion tokens of the rows.

    The layers multiply in `precision`; the projection to the vocabulary and the loss are float32.

    Args:
        model, pad_id, rows, precision: what is scored, and how.
        expert: its predictions of the same rows. With them the scores have `rows`, for every row: the completion's
            summed cross-entropy (`loss`), its number of tokens, and KL(expert || model) summed over it (`divergence`),
            in nats, to six digits.
    """
    losses, divergences, counts, right = [], [], [], 0
    for index, (row, states) in enumerate(zip(rows, answer_states(model, pad_id, rows, precision), strict=True)):
        logits = model.lm_head(states).log_softmax(-1)
        targets = torch.tensor(row.ids[max(1, row.prompt_length) :], device=model.device)
        losses.append(-logits.gather(-1, targets[:, None]).sum().item())
        right += int((logits.argmax(-1) == targets).sum())
        counts.append(targets.numel())
        if expert:
            wanted = expert.log_probabilities(index)
            divergences.append((wanted.exp() * (wanted - logits)).sum().item())
    scores = {"loss": sum(losses) / sum(counts), "accuracy": right / sum(counts), "tokens": sum(counts)}
    if not expert:
        return scores
    per_row = {"loss": [*map(six_digits, losses)], "tokens": counts, "divergence": [*map(six_digits, divergences)]}
    return {**scores, "rows": per_row}


def six_digits(value: float) -> float:
    """Enough for a comparison, and a third of the file."""
    return float(f"{value:.6g}")


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    files: dict[str, Sequence[list[Message]]],
    precision: str,
    expert: Callable[[str], Teacher | None] = lambda name: None,
) -> Scores:
    """Scores of a model on named sets of conversations; row by row, too, where `expert` has predictions of a set."""
    return {
        name: completion_scores(
            model,
            tokenizer.pad_token_id,
            [encode_row(tokenizer, messages) for messages in rows],
            precision,
            expert(name),
        )
        for name, rows in files.items()
    }


def score_test_rows(workdir: Path, model: PreTrainedModel, tasks: Sequence[str], precision: str) -> Scores:
    """Scores of a model on the test rows of tasks, each row beside the task's expert."""
    tokenizer, device = load_tokenizer(workdir / "base"), str(model.device)
    rows = {task: task_rows(workdir, task, "test") for task in tasks}
    return score(model, tokenizer, rows, precision, lambda task: teacher(workdir, task, precision, device))


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


def drawn_rows(workdir: Path, task: str, seed: int, count: int) -> list[list[Message]]:
    """The conversations that a calibration with `seed` draws from the rows to train on."""
    rows = task_rows(workdir, task, "train")
    return [rows[number] for number in islice(sample_numbers(len(rows), seed), count)]


def general_passages(workdir: Path) -> list[str]:
    """Held-out running text."""
    return read_json(workdir / "data" / "general.json")
