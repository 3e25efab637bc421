"""Expert Merging: a weight for every matrix and expert, learnt from what the experts predict on rows without labels.

Zhang et al., "Expert Merging: Model Merging with Unsupervised Expert Alignment and Importance-Guided Layer Chunking",
ICLR 2026 (arXiv 2509.25712), without its layer chunking (Expert Merging++); https://github.com/Littleor/ExpertMerging,
whose settings for a model of one billion parameters these are. The paper aligns hidden states, too. The repository's
default leaves that out, and gives it weight 1 where it is asked for; here it is done behind half of the layers.

The matrices of the layers are merged; embeddings, output head and norms stay the base's, as in the repository.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from closed_form import load_models
from data_free import matrices
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from transformers import PreTrainedModel

RATE, DECAY, CLIP, RESTART = 0.5, 1e-5, 1.0, 50
"""Of AdamW: rate, decay of weights, norm of the gradient at most, updates of the first period of the rate's cosine."""
ROWS_AT_ONCE = 8
"""Rows of an update."""
KEEP = 5.0
"""Weight of the mean distance between the weights and where they began."""
MOST = 0.95
PASSES = 4
"""What a row costs, in forward passes: the expert's, the merge's, and its backward pass, which counts as two."""


def merge_into(
    student: PreTrainedModel, base: PreTrainedModel, experts: Sequence[PreTrainedModel], weights: dict[str, Tensor]
) -> None:
    """Turn a model into the base plus the weighted task vectors, in place; weights: name -> [experts]."""
    for name, of_name in weights.items():
        parameter, origin = student.get_parameter(name), base.get_parameter(name)
        parameter.copy_(origin)
        for expert, weight in zip(experts, of_name.tolist(), strict=True):
            parameter.add_(expert.get_parameter(name) - origin, alpha=weight)


def loss(student: PreTrainedModel, expert: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Cross-entropy of the merge's predictions against the expert's, mean over the tokens of a row, plus the mean
    squared distance of their hidden states behind half of the layers."""
    tokens, middle = torch.tensor([list(ids)]), student.config.num_hidden_layers // 2
    with torch.no_grad():
        wanted = expert(input_ids=tokens, use_cache=False, output_hidden_states=True)
    found = student(input_ids=tokens, use_cache=False, output_hidden_states=True)
    soft = cross_entropy(found.logits[0], wanted.logits[0].softmax(-1))
    return soft + mse_loss(found.hidden_states[middle], wanted.hidden_states[middle])


@torch.no_grad()
def slopes(
    student: PreTrainedModel, base: PreTrainedModel, experts: Sequence[PreTrainedModel], names: Sequence[str]
) -> Tensor:
    """Derivatives of what has gone backward through the merge by the weights, [names, experts]; forgets it."""
    found = torch.zeros(len(names), len(experts))
    for row, name in zip(found, names, strict=True):
        parameter, origin = student.get_parameter(name), base.get_parameter(name)
        for number, expert in enumerate(experts):
            row[number] = (parameter.grad * (expert.get_parameter(name) - origin)).sum()
        parameter.grad = None
    return found


def in_turn(rows: Sequence[Sequence[Sequence[int]]]) -> Iterator[tuple[int, Sequence[int]]]:
    """(task, row) without end: a row of every task in turn, and again from the first row on."""
    step = 0
    while True:
        yield from ((task, of_task[step % len(of_task)]) for task, of_task in enumerate(rows))
        step += 1


@torch.no_grad()
def merge(
    base: Path, experts: Sequence[Path], rows: Sequence[Sequence[Sequence[int]]], out: Path, start: float, steps: int
) -> None:
    """Merge experts, and write a float32 checkpoint without tokenizer.

    Args:
        base, experts: checkpoints.
        rows: by expert, the token ids of rows of its task.
        out: the checkpoint.
        start: all weights at the beginning; they are logistic functions of what is learnt, so it is `MOST` at most.
        steps: rows of each task that are gone through, each as often as it takes.
    """
    origin, *models = load_models(base, experts)
    (student,) = load_models(base, [])
    names = sorted(matrices(student))
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in names)
    first = torch.full((len(names), len(models)), min(start, MOST))
    raw = first.logit().requires_grad_()
    optimizer = torch.optim.AdamW([raw], lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, RESTART, 2, eta_min=RATE / 10)
    waiting = islice(in_turn(rows), steps * len(models))
    while batch := [*islice(waiting, ROWS_AT_ONCE)]:
        merge_into(student, origin, models, dict(zip(names, raw.sigmoid(), strict=True)))
        with torch.enable_grad():
            for task, ids in batch:
                (loss(student, models[task], ids) / ROWS_AT_ONCE).backward()
            weights = raw.sigmoid()
            distance = (weights - first).abs().sum() / len(names) * len(batch) / ROWS_AT_ONCE
            ((weights * slopes(student, origin, models, names)).sum() + KEEP * distance).backward()
        torch.nn.utils.clip_grad_norm_([raw], CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    merge_into(student, origin, models, dict(zip(names, raw.sigmoid(), strict=True)))
    student.save_pretrained(out)
