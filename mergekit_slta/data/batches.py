"""Group calibration rows of similar length into micro-batches, and pack or pad their tokens.

Scope: planning and reshaping. The plan depends only on the rows, not on machine, device or number of processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

BATCH_TOKENS = 1024
"""Tokens of a micro-batch. Enough for efficient matrix products; few enough that activations take less memory than
weights, and that several processes get equal shares."""
GRADIENT_TOKENS = 1024
"""The same for passes with gradients."""
PADDING = 1.06
"""Maximum ratio of padded tokens to real tokens in a batch."""


class TokenRows(NamedTuple):
    """The rows that the tokens of a padded batch belong to.

    Attributes:
        index: [b, s] int64, the row of each token.
        first: the row of the first token.
        is_single: all tokens belong to one row.
        is_by_sequence: the tokens of each of the b sequences belong to one row.
    """

    index: Tensor
    first: int
    is_single: bool
    is_by_sequence: bool


@dataclass(frozen=True)
class Batch:
    """A batch of b rows; the longest has s tokens.

    Attributes:
        rows: [b] indices of the rows.
        lengths: [b] number of tokens of each row.
        ids: [b, s] int64 token ids, padded with zeros on the right.
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    ids: Tensor

    def pack(self, padded: Tensor) -> Tensor:
        """Drop the padding: [b, s, d] -> [tokens, d]."""
        return torch.cat([row[:length] for row, length in zip(padded, self.lengths, strict=True)])

    def pad(self, packed: Tensor) -> Tensor:
        """Add padding: [tokens, d] -> [b, s, d], with zeros on the right."""
        if len(self.lengths) == 1:
            return packed[None]
        return torch.nn.utils.rnn.pad_sequence(list(packed.split(list(self.lengths))), batch_first=True)

    @property
    def positions(self) -> list[slice]:
        """[b] each row's tokens among the packed ones."""
        ends = list(itertools.accumulate(self.lengths))
        return [slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]

    @property
    def token_rows(self) -> TokenRows:
        """The row of each token."""
        rows = torch.tensor(self.rows, dtype=torch.int64)[:, None].expand(self.ids.shape)
        return TokenRows(rows, self.rows[0], is_single=len(self.rows) == 1, is_by_sequence=True)

    def alone(self) -> list[Batch]:
        """A batch for each row."""
        return [
            Batch((row,), (length,), ids[None, :length])
            for row, length, ids in zip(self.rows, self.lengths, self.ids, strict=True)
        ]


def plan_batches(
    rows: Sequence[Sequence[int]], max_tokens: int = BATCH_TOKENS, padding: float | None = None
) -> list[Batch]:
    """Group rows of similar length into batches.

    Args:
        rows: token ids of each row.
        max_tokens: maximum padded tokens of a batch of several rows; 0 puts each row into its own batch.
        padding: maximum ratio of padded tokens to real tokens; None means `PADDING`.
    """
    padding = PADDING if padding is None else padding
    order = sorted(range(len(rows)), key=lambda row: (len(rows[row]), row))
    groups: list[list[int]] = []
    for row in order:
        group = [*groups[-1], row] if groups else []
        area = len(rows[row]) * len(group)
        if group and area <= max_tokens and area <= padding * sum(len(rows[other]) for other in group):
            groups[-1] = group
        else:
            groups.append([row])
    batches = []
    for group in groups:
        lengths = tuple(len(rows[row]) for row in group)
        ids = torch.zeros((len(group), max(lengths)), dtype=torch.int64)
        for index, row in enumerate(group):
            ids[index, : lengths[index]] = torch.as_tensor(list(rows[row]))
        batches.append(Batch(tuple(group), lengths, ids))
    return batches


def plan_task_batches(
    rows: Sequence[Sequence[int]], row_task: Sequence[int], max_tokens: int = BATCH_TOKENS
) -> list[Batch]:
    """As `plan_batches`, but a batch holds rows of one task only: for passes that run each row through its own expert.

    Args:
        rows: token ids of each row.
        row_task: each row's task.
        max_tokens: see `plan_batches`.
    """
    planned = []
    for task in sorted(set(row_task)):
        own = [row for row, other in enumerate(row_task) if other == task]
        for batch in plan_batches([rows[row] for row in own], max_tokens):
            planned.append(replace(batch, rows=tuple(own[row] for row in batch.rows)))
    return planned


def plan_packs(batches: Sequence[Batch], max_tokens: int, groups: Sequence[int] | None = None) -> list[list[int]]:
    """Group consecutive batches whose tokens can be concatenated for token-wise modules.

    Args:
        batches: from `plan_batches` or `plan_task_batches`.
        max_tokens: maximum tokens of a pack of several batches; 0 puts each batch into its own pack.
        groups: a label per batch; only batches with the same label share a pack.

    Returns:
        Packs, as lists of batch indices.
    """
    packs: list[list[int]] = []
    size = 0
    for number, batch in enumerate(batches):
        size += sum(batch.lengths)
        same = bool(packs) and (groups is None or groups[number] == groups[packs[-1][0]])
        if same and size <= max_tokens:
            packs[-1].append(number)
        else:
            packs.append([number])
            size = sum(batch.lengths)
    return packs
