"""Calibration rows in micro-batches: rows of like length together, packed without and padded with filling.

Scope: planning and reshaping; depends on the rows alone, not on machine, device or number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BATCH_TOKENS = 1024
"""Tokens per micro-batch: enough to keep matrix products busy, little enough that activations stay below weights and
that several processes get even shares."""
PADDING = 1.06
"""A batch may hold this many times its real tokens once padded."""


@dataclass(frozen=True)
class Batch:
    """Rows that run together.

    Attributes:
        rows: indices of the rows.
        lengths: their tokens.
        ids: [rows, longest] int64 token ids, padded on the right.
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    ids: Tensor

    def pack(self, padded: Tensor) -> Tensor:
        """[b, s, d] -> [tokens, d]."""
        return torch.cat([row[:length] for row, length in zip(padded, self.lengths, strict=True)])

    def pad(self, packed: Tensor) -> Tensor:
        """[tokens, d] -> [b, s, d], zeros on the right."""
        if len(self.lengths) == 1:
            return packed[None]
        return torch.nn.utils.rnn.pad_sequence(list(packed.split(list(self.lengths))), batch_first=True)


def plan_batches(
    rows: Sequence[Sequence[int]], max_tokens: int = BATCH_TOKENS, padding: float = PADDING
) -> list[Batch]:
    """Group rows of like length into batches of at most `max_tokens` padded tokens; 0 leaves every row alone."""
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
        for place, row in enumerate(group):
            ids[place, : lengths[place]] = torch.as_tensor(list(rows[row]))
        batches.append(Batch(tuple(group), lengths, ids))
    return batches


def plan_task_batches(
    rows: Sequence[Sequence[int]], row_task: Sequence[int], max_tokens: int = BATCH_TOKENS
) -> list[Batch]:
    """As `plan_batches`, with rows of one task in each batch: what only concerns a task's expert runs on its rows."""
    planned = []
    for task in sorted(set(row_task)):
        own = [row for row, other in enumerate(row_task) if other == task]
        for batch in plan_batches([rows[row] for row in own], max_tokens):
            planned.append(replace(batch, rows=tuple(own[row] for row in batch.rows)))
    return planned


def plan_packs(batches: Sequence[Batch], max_tokens: int, groups: Sequence[int] | None = None) -> list[list[int]]:
    """Batches that what works token by token takes together, without padding: numbers of consecutive ones.

    Args:
        batches: as planned.
        max_tokens: of a pack of more than one batch; 0 leaves every batch alone.
        groups: per batch, a label; only batches of the same label go together.
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
