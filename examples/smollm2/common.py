"""Shared helpers of the SmolLM2 example: rows, batches, held-out loss, and the report table."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

TASKS = ("math", "translate")
EVALUATION_BATCH_TOKENS = 1200

Message = dict[str, str]
Losses = dict[str, float]


@dataclass(frozen=True)
class EncodedRow:
    """One conversation as token ids; the completion starts at ``prompt_length``."""

    ids: list[int]
    prompt_length: int


def installed_command(name: str) -> str:
    """Return the path of an installed command, the one beside this Python first."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise click.ClickException(f"the command {name} is not installed: pip install mergekit-slta")
    return found


def set_threads(threads: int | None) -> None:
    """Limit torch to ``threads`` CPU threads (``None`` leaves torch's default)."""
    if threads is not None:
        torch.set_num_threads(threads)


def load_model(path: Path) -> PreTrainedModel:
    """Load a checkpoint in float32, which is what CPUs compute in at full speed."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer saved next to a checkpoint."""
    return AutoTokenizer.from_pretrained(path)


@contextmanager
def completed_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``target`` only when the block succeeds."""
    temporary = target.with_name(target.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    os.replace(temporary, target)


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Save a model as sharded bfloat16 safetensors together with its tokenizer and chat template."""
    model.to(torch.bfloat16).save_pretrained(path, max_shard_size="100MB")
    tokenizer.save_pretrained(path)


def write_rows(path: Path, rows: list[list[Message]]) -> None:
    """Write conversations as JSON lines with a ``messages`` column."""
    lines = (json.dumps({"messages": messages}, ensure_ascii=False) for messages in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_rows(path: Path) -> list[list[Message]]:
    """Read conversations written by :func:`write_rows`."""
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").split("\n") if line]


def encode_row(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> EncodedRow:
    """Tokenize a conversation; its last message up to and including the end token is the completion."""
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    full = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
    if not full.startswith(prompt):
        raise ValueError("the chat template does not render the prompt as a prefix of the conversation")
    # The template writes the special tokens itself, so the tokenizer must not add any.
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    completion_ids = tokenizer(full[len(prompt) :], add_special_tokens=False)["input_ids"]
    return EncodedRow(prompt_ids + completion_ids, len(prompt_ids))


def make_batches(rows: list[EncodedRow], max_tokens: int) -> list[list[EncodedRow]]:
    """Group rows of similar length so that no batch exceeds ``max_tokens`` with its padding."""
    batches: list[list[EncodedRow]] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if batches and (len(batches[-1]) + 1) * len(row.ids) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def completion_loss(model: PreTrainedModel, batch: list[EncodedRow], pad_id: int) -> tuple[torch.Tensor, int]:
    """Return the summed cross-entropy over the completion tokens of a batch, and their number."""
    width = max(len(row.ids) for row in batch)
    ids = torch.full((len(batch), width), pad_id)
    attention = torch.zeros_like(ids)
    is_completion = torch.zeros_like(ids, dtype=torch.bool)
    for index, row in enumerate(batch):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        attention[index, : len(row.ids)] = 1
        is_completion[index, row.prompt_length : len(row.ids)] = True
    predicted = is_completion[:, 1:]
    hidden = model.model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
    # The vocabulary projection is a fifth of the network: only project positions that are scored.
    logits = model.lm_head(hidden[:, :-1][predicted])
    targets = ids[:, 1:][predicted]
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum"), targets.numel()


@torch.inference_mode()
def held_out_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> float:
    """Return the mean loss per completion token over all conversations of a file."""
    model.eval()
    rows = [encode_row(tokenizer, messages) for messages in read_rows(path)]
    total, count = 0.0, 0
    for batch in make_batches(rows, EVALUATION_BATCH_TOKENS):
        loss, tokens = completion_loss(model, batch, tokenizer.pad_token_id)
        total += loss.item()
        count += tokens
    return total / count


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[Message]],
    *,
    steps: int,
    learning_rate: float,
    batch_tokens: int,
    seed: int,
    log: Callable[[str], None],
) -> None:
    """Fine-tune every weight of ``model`` in place, with the loss on completion tokens only."""
    torch.manual_seed(seed)
    shuffler = random.Random(seed)
    batches = make_batches([encode_row(tokenizer, messages) for messages in rows], batch_tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    order: list[list[EncodedRow]] = []
    running = 0.0
    model.train()
    for step in range(1, steps + 1):
        if not order:
            order = shuffler.sample(batches, len(batches))
        total, count = completion_loss(model, order.pop(), tokenizer.pad_token_id)
        loss = total / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if step == 1 else 0.9 * running + 0.1 * loss.item()
        if step == 1 or step % 10 == 0:
            log(f"  step {step:3d}/{steps}  loss {running:.3f}")


def evaluate_models(workdir: Path, models: Sequence[Path], log: Callable[[str], None]) -> dict[str, Losses]:
    """Return the held-out completion loss on every task of base, experts and ``models``, by directory."""
    losses: dict[str, Losses] = {}
    for path in [*(workdir / name for name in ("base", *TASKS)), *models]:
        # Directories inside the work directory go by their name, which also tells base and experts apart.
        name = path.name if path.resolve().parent == workdir.resolve() else str(path)
        if name in losses:
            continue
        log(f"evaluating {path}")
        model, tokenizer = load_model(path), load_tokenizer(path)
        losses[name] = {
            task: held_out_loss(model, tokenizer, workdir / "data" / f"{task}_test.jsonl") for task in TASKS
        }
    return losses


def recovered_shares(losses: dict[str, Losses]) -> dict[str, Losses]:
    """Return how much of each task's base-to-expert gap every merged model closes (1.0 = the expert)."""
    if not {"base", *TASKS} <= losses.keys():
        return {}
    base = losses["base"]
    gaps = {task: base[task] - losses[task][task] for task in TASKS}
    return {
        name: {task: (base[task] - values[task]) / gaps[task] for task in TASKS if gaps[task]}
        for name, values in losses.items()
        if name not in ("base", *TASKS)
    }


def format_table(losses: dict[str, Losses]) -> str:
    """Render held-out losses, and recovered shares where there are merged models, as an aligned table."""
    shares = recovered_shares(losses)
    header = ["model", *(f"{task} loss" for task in TASKS)]
    if shares:
        header += [f"{task} gap recovered" for task in TASKS]
    table = [header]
    for name, values in losses.items():
        cells = [name, *(f"{values[task]:.3f}" for task in TASKS)]
        if shares:
            cells += [f"{shares[name][task]:.0%}" if task in shares.get(name, {}) else "" for task in TASKS]
        table.append(cells)
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in ([(cell, width) for cell, width in zip(row, widths, strict=True)] for row in table)
    )


def write_evaluation(workdir: Path, losses: dict[str, Losses]) -> None:
    """Write ``evaluation.json`` with the losses and the recovered shares."""
    report = {"held_out_completion_loss": losses, "gap_recovered": recovered_shares(losses)}
    (workdir / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
