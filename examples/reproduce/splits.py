"""Test rows, rows for choosing, and training rows without near-duplicates between them.

The rule: two questions are near-duplicates if they share at least half of the three-word sequences of the one that has
fewer, after digits and names are replaced and without the instruction that all questions of a task begin with. A
paragraph in common, or one wording with other numbers, is far above that.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from shared import Message

WORDS = 3
SHARED = 0.5
"""Share of common word sequences from which on two questions are near-duplicates."""

Row = list[Message]
Shingles = frozenset[tuple[str, ...]]


def words_of(question: str, names: Collection[str] = ()) -> list[str]:
    """The words of a question: lower case, every number 0, every given name `name`, no punctuation."""
    return ["name" if word in names else word.casefold() for word in re.findall(r"\w+", re.sub(r"\d+", "0", question))]


def shingles(questions: Sequence[str], names: Collection[str] = ()) -> list[Shingles]:
    """The three-word sequences of every question of a task, behind the words that all of them begin with.

    A question of fewer words is one sequence.
    """
    every = [words_of(question, names) for question in questions]
    first, last = min(every, default=[]), max(every, default=[])
    start = next((at for at, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), 0)
    return [
        frozenset(tuple(words[at : at + WORDS]) for at in range(start, max(start + 1, len(words) - WORDS + 1)))
        for words in every
    ]


class Questions:
    """Questions that others are compared with."""

    def __init__(self) -> None:
        self._holders: dict[tuple[str, ...], list[int]] = {}
        self._sizes: list[int] = []

    def add(self, question: Shingles) -> None:
        """Compare with this one, too."""
        for shingle in question:
            self._holders.setdefault(shingle, []).append(len(self._sizes))
        self._sizes.append(len(question))

    def overlap(self, question: Shingles) -> float:
        """The largest share of common sequences, of the shorter of the two, that the question has with any of these."""
        common = Counter(holder for shingle in question for holder in self._holders.get(shingle, ()))
        return max((count / min(len(question), self._sizes[at]) for at, count in common.items()), default=0.0)


def split(rows: Sequence[Row], sizes: Iterable[tuple[str, int]], names: Collection[str] = ()) -> dict[str, list[Row]]:
    """Take the parts from the rows in their order; a row that is near one of another part is left out.

    Args:
        rows: all rows of a task, in random order.
        sizes: (part, its number of rows at most); a part gets fewer where no more are left.
        names: words that count as one.
    """
    parts: dict[str, list[Row]] = {}
    earlier = Questions()
    remaining = list(zip(rows, shingles([row[0]["content"] for row in rows], names), strict=True))
    for part, size in sizes:
        taken, left = [], []
        for row, question in remaining:
            if earlier.overlap(question) < SHARED:
                (taken if len(taken) < size else left).append((row, question))
        for _, question in taken:
            earlier.add(question)
        parts[part], remaining = [row for row, _ in taken], left
    return parts
