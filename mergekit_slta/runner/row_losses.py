"""Measure the loss of the base and of each row's own expert on the first rows of every task.

Scope: which rows are measured, and the losses from logits that come in parts of the vocabulary. A loss is the mean
next-token cross-entropy in nats over the tokens of the row's answer. An expert whose loss is not below the base's was
probably trained on rows of another format.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from mergekit_slta.checkpoints.tensors import Checkpoints
from mergekit_slta.data.batches import Batch
from mergekit_slta.data.rows import Example
from mergekit_slta.models.skeleton import Skeleton
from mergekit_slta.runner.state import ForwardState

LOSS_ROWS = 10
"""Rows of each task whose losses are measured by a pass that needs no losses."""


def measured_rows(examples: Sequence[Example]) -> list[int]:
    """Indices of the rows to measure: of each task the first `LOSS_ROWS` that hold a token of their answer."""
    chosen: dict[int, list[int]] = {}
    for index, example in enumerate(examples):
        own = chosen.setdefault(example.task, [])
        if example.row.completion < len(example.row.ids) and len(own) < LOSS_ROWS:
            own.append(index)
    return sorted(index for own in chosen.values() for index in own)


def states_beside(
    skeleton: Skeleton, checkpoints: Checkpoints, examples: Sequence[Example], rows: Collection[int], *, with_base: bool
) -> dict[int, ForwardState]:
    """The states of a forward pass that run rows through their own experts; see `ForwardState.beside`.

    Args:
        skeleton, checkpoints: those of the pass.
        examples: the calibration rows.
        rows: indices of the rows; batches hold one row, so that losses do not depend on the number of processes.
        with_base: also run the rows through the base, because the pass itself does not.
    """
    by_model: dict[int, list[Batch]] = {}
    for row in rows:
        ids = examples[row].row.ids
        for model in (0, examples[row].task + 1) if with_base else (examples[row].task + 1,):
            by_model.setdefault(model, []).append(Batch((row,), (len(ids),), torch.tensor([ids])))
    return {model: ForwardState(skeleton, checkpoints, batches) for model, batches in by_model.items()}


class RowLosses:
    """The losses of the base and of each row's own expert on some rows.

    Args:
        examples: the calibration rows.
        rows: indices of the measured rows; all logits of other rows and of other experts are ignored.
    """

    def __init__(self, examples: Sequence[Example], rows: Collection[int]) -> None:
        self._examples, self._rows = examples, frozenset(rows)
        # (row, whether it is the expert's) -> vocabulary seen so far, log sum of exponentials [n], label's logit [n]
        self._sums: dict[tuple[int, int], tuple[int, Tensor, Tensor]] = {}

    def add(self, row: int, model: int, logits: Tensor) -> None:
        """Add a row's logits [tokens, v] for the next part of the vocabulary, from the model with index `model`."""
        example = self._examples[row]
        if row not in self._rows or model not in (0, example.task + 1):
            return
        own, key = example.row, (row, int(model > 0))
        logits = logits[own.completion - 1 : len(own.ids) - 1].float()  # [n, v], n tokens of the answer
        start, log_sum, label_logit = self._sums.get(key, (0, None, None))
        labels = torch.tensor(own.ids[own.completion :], device=logits.device) - start
        inside = (labels >= 0) & (labels < logits.shape[1])
        found = logits.gather(1, labels.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        found = found.masked_fill(~inside, -torch.inf).cpu().double()
        total = logits.logsumexp(1).cpu().double()
        if log_sum is not None and label_logit is not None:
            total, found = torch.logaddexp(log_sum, total), torch.maximum(label_logit, found)
        self._sums[key] = start + logits.shape[1], total, found

    def losses(self) -> Tensor:
        """[rows, 2] float64, nats per token of base and expert; NaN for rows that are not measured, 0 for measured rows
        without logits."""
        losses = torch.full((len(self._examples), 2), float("nan"), dtype=torch.float64)
        losses[sorted(self._rows)] = 0
        for key, (_, log_sum, label_logit) in self._sums.items():
            losses[key] = (log_sum - label_logit).mean()
        return losses
