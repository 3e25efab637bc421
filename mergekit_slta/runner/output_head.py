"""The output head of every model, the positions of batches that predict answers, and the losses there.

Scope: shared by forward passes, which measure models, and backward passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_slta.checkpoints.tensors import Weights
from mergekit_slta.data.batches import TokenRows
from mergekit_slta.runner.row_weights import RowWeights


class Head:
    """Final norm and output projection of every model.

    Args:
        weights: any lane's; its rows are not used.

    Attributes:
        names: the tensors after the layers, without the output projection.
        source: name of the output projection; that of the embedding table if the two are tied.
        raw: the output projection of every model, see `Checkpoints.raw`.
        loaded: the tensors `names` of every model.
        vocabulary: V, the number of rows that every projection has.
    """

    def __init__(self, weights: RowWeights) -> None:
        self._skeleton, self._checkpoints = weights.skeleton, weights.checkpoints
        plan, skeleton = self._checkpoints.plan, self._skeleton
        self.names = weights.outer_tensors()[1]
        tied = plan.is_tied or skeleton.head_weight not in plan.tensors
        self.source = skeleton.embedding_weight if tied else skeleton.head_weight
        self.raw = self._checkpoints.raw(self.source)
        self.loaded = self._checkpoints.load(self.names)
        self.vocabulary = min(tensor.shape[0] for tensor in self.raw)

    def of_expert(self, task: int) -> Weights:
        """The tensors of a task's expert."""
        projection = self._checkpoints.place(self.raw[task + 1][: self.vocabulary], self.source, task + 1)
        return {**self.loaded[task + 1], self._skeleton.head_weight: projection}

    def shared(self, weights: RowWeights) -> Weights | None:
        """The tensors that all rows of a lane use; None if each row uses its own expert's."""
        shared = weights.shared(self.loaded)
        if shared is not None:
            shared[self._skeleton.head_weight] = weights.shared_projection(self.raw, self.source)
        return shared

    def log_probs(self, features: Tensor, part: AnswerPart, weights: Weights) -> Tensor:
        """[n, V] float32 log-probabilities at some positions, from the last layer's outputs [tokens, d]."""
        chosen = features[part.positions.to(features.device)].to(self._skeleton.device)
        return torch.log_softmax(self._skeleton.head(chosen[None], weights)[0].float(), dim=-1)


@dataclass(frozen=True)
class AnswerPart:
    """Some of the positions of a batch that predict its rows' answers.

    Attributes:
        positions: [n] int64, among the packed tokens of the batch.
        rows: [n] int64, the row of each.
        labels: [n] int64, the token behind each.
        places: [n] int64, the number of that token in the row's answer.
    """

    positions: Tensor
    rows: Tensor
    labels: Tensor
    places: Tensor

    @property
    def token_rows(self) -> TokenRows:
        """The row of each position, as of one sequence."""
        is_single = len(self.rows.unique()) == 1
        return TokenRows(self.rows[None], int(self.rows[0]), is_single=is_single, is_by_sequence=is_single)

    def split(self, size: int, *, by_row: bool = False) -> list[AnswerPart]:
        """Parts of at most `size` positions, if asked for of one row each."""
        lengths = self.rows.unique_consecutive(return_counts=True)[1].tolist() if by_row else [len(self.rows)]
        sizes = [min(size, length - start) for length in lengths for start in range(0, length, max(1, size))]
        return [AnswerPart(*part) for part in zip(*(value.split(sizes) for value in vars(self).values()), strict=True)]


def answer_part(weights: RowWeights, index: int) -> AnswerPart:
    """All positions of a batch that predict its rows' answers."""
    batch = weights.batches[index]
    found: list[list[Tensor]] = [[], [], [], []]
    for row, tokens in zip(batch.rows, batch.positions, strict=True):
        own = weights.rows[row]
        places = torch.arange(len(own.ids) - own.completion)
        labels = torch.tensor(own.ids[own.completion :], dtype=torch.int64)
        for into, value in zip(
            found,
            (tokens.start + own.completion - 1 + places, torch.full_like(places, row), labels, places),
            strict=True,
        ):
            into.append(value)
    return AnswerPart(*map(torch.cat, found))


def answer_parts(weights: RowWeights, batches: Sequence[int], size: int) -> Iterator[tuple[int, AnswerPart]]:
    """Yield the positions of some batches that predict answers, at most `size` at a time, each time with the index of
    the batch."""
    for index in batches:
        for part in answer_part(weights, index).split(size):
            yield index, part


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums over rows: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def divergence(taught: Tensor, log_probs: Tensor) -> Tensor:
    """KL(expert || model) in nats at each position, [n], from log-probabilities [n, V]."""
    return (taught.exp() * (taught - log_probs)).sum(-1, dtype=sum_dtype(taught.device))


def cross_entropy(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of labels [n] in nats, [n], from log-probabilities [n, V]."""
    return -log_probs.gather(1, labels.to(log_probs.device)[:, None])[:, 0].to(sum_dtype(log_probs.device))
