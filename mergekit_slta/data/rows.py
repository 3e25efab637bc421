"""Calibration rows: one row, and the rows of a task.

Scope: what a row is, hashes of rows, and the seeded permutation of a dataset; `draw.py` draws them from datasets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np
import torch


@dataclass(frozen=True)
class Row:
    """One calibration row.

    Attributes:
        number: the row's number in the dataset.
        text: the rendered text.
        ids: token ids, cut to `max_seq_length`.
        completion: position of the answer's first token; losses are taken over the answer. 1 if the whole row is the
            answer, because the first token of a row has no loss.
        num_cut: number of tokens behind these that `max_seq_length` cut off.
    """

    number: int
    text: str
    ids: tuple[int, ...]
    completion: int = 1
    num_cut: int = 0

    @property
    def num_answer_tokens(self) -> int:
        """Number of tokens with a loss."""
        return len(self.ids) - self.completion


@dataclass(frozen=True)
class Example:
    """A calibration row and its task.

    Attributes:
        row: the row.
        task: index of the task's expert in canonical order.
        repeat: number of rows with the same tokens before it, of this task or of others.
    """

    row: Row
    task: int
    repeat: int = 0


@dataclass(frozen=True)
class TaskRows:
    """The rows of one task, in the order in which they were drawn.

    Attributes:
        name: the expert's name.
        dataset: the dataset's name in the recipe.
        rows: the rows to fit.
        held_out: the rows to measure merges on, see `draw.RowSource.held_out`; empty if there are too few rows.
        chat_template: origin of the template that rendered them (see `Template`); None if none of them is a chat.
        day: the date that the template may have written into them; None if it does not read it.
        is_planned: whether the expert has not written them yet. The rows are then as many and as long as they can be,
            and have no text.
    """

    name: str
    dataset: str
    rows: tuple[Row, ...]
    held_out: tuple[Row, ...] = ()
    chat_template: str | None = None
    day: date | None = None
    is_planned: bool = False

    @property
    def num_tokens(self) -> int:
        """Total number of tokens."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def num_cut(self) -> int:
        """Number of rows that `max_seq_length` cut."""
        return sum(row.num_cut > 0 for row in self.rows)

    @property
    def num_answer_tokens(self) -> int:
        """Number of tokens with a loss."""
        return sum(row.num_answer_tokens for row in self.rows)

    def part(self, number: int, parts: int) -> tuple[Row, ...]:
        """Divide the rows into `parts` consecutive parts of equal size; return part `number`, from 0."""
        count = len(self.rows)
        return self.rows[count * number // parts : count * (number + 1) // parts]

    @property
    def acceptance(self) -> tuple[Row, ...]:
        """The first half of the held-out rows: those that choose among merges, and that the evaluation is about. The
        second half is for comparisons between methods."""
        return self.held_out[: (len(self.held_out) + 1) // 2]

    @property
    def comparison(self) -> tuple[Row, ...]:
        """The second half of the held-out rows: neither fitted nor used to choose a merge. `compare` scores on them."""
        return self.held_out[len(self.acceptance) :]

    @property
    def sha256(self) -> str:
        """Hash of the fitted rows, see `hash_rows`."""
        return hash_rows(self.rows)


def hash_rows(rows: Sequence[Row]) -> str:
    """Hash the texts, the tokens and where the answers begin. It changes with the data, the template and the
    tokenizer."""
    digest = hashlib.sha256()
    for row in rows:
        content = [row.text, row.ids, *([row.completion] if row.completion > 1 else [])]
        digest.update(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def sample_numbers(num_rows: int, seed: int) -> Iterator[int]:
    """Draw row numbers without replacement."""
    yield from map(int, permutation(num_rows, seed))


def permutation(num_rows: int, seed: int) -> np.ndarray:
    """[num_rows] int64, the seeded permutation of a dataset's row numbers. Uses a local generator."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed), device="cpu").numpy()
