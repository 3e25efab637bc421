"""Choose the rows to keep among those that an expert has written: pure functions of tokens and numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mergekit_slta.generation.choices import LOOP_SHARE, NEAR_SHARE, NGRAM, RANDOM_SHARE, UNLIKELY_SHARE

SHORTENED = "shortened by the chat template"
_BROKEN = frozenset("\0\N{REPLACEMENT CHARACTER}")
"""Characters of texts that were not decoded to what a person writes."""


@dataclass(frozen=True)
class Candidate:
    """A row that an expert has written.

    Attributes:
        number: its number, from 0.
        prompt, answer: its texts, without the template's own. The prompt is empty if there is no template.
        ids: token ids of the whole row, with the template's own and with the token that ended the answer.
        begin, prompt_end: positions of the first token of the user's turn and behind its last; 0 if there is no
            template. `prompt_end` is 0, too, if the turn did not end.
        start: position of the answer's first token.
        is_ended: whether the answer ended by itself, not at `max_seq_length`.
        is_complete: whether there is an answer at all: False if the user's turn did not end.
        log_prob: mean log-probability of the sampled tokens under the expert at temperature 1, in nats.
        answer_log_prob: the sum over the tokens `ids[start:]`.
        is_whole: whether the template renders all of both texts. True if the row is not complete.
    """

    number: int
    prompt: str
    answer: str
    ids: tuple[int, ...]
    begin: int
    prompt_end: int
    start: int
    is_ended: bool
    is_complete: bool
    log_prob: float
    answer_log_prob: float
    is_whole: bool = True

    @property
    def written(self) -> tuple[int, ...]:
        """The tokens of the user's turn and of the answer, without the template's."""
        return (*self.ids[self.begin : self.prompt_end], *self.ids[self.start :])


@dataclass(frozen=True)
class Selection:
    """The rows to keep.

    Attributes:
        kept: indices of the candidates, ascending.
        dropped: reason -> number of rows that were dropped for it.
    """

    kept: tuple[int, ...]
    dropped: dict[str, int] = field(default_factory=dict)


def ngrams(tokens: Sequence[int], size: int = NGRAM) -> list[tuple[int, ...]]:
    """All runs of `size` tokens, in order; the whole text if it is shorter."""
    return [tuple(tokens[start : start + size]) for start in range(max(1, len(tokens) - size + 1))]


def repeated_share(tokens: Sequence[int], size: int = NGRAM) -> float:
    """Share of a text's n-grams that have occurred before in it: near 1 for a loop."""
    found = ngrams(tokens, size)
    return 1 - len(set(found)) / len(found)


def near_duplicates(texts: Sequence[Sequence[int]], size: int = NGRAM, share: float = NEAR_SHARE) -> list[bool]:
    """Whether each text repeats an earlier one that is kept: all its tokens, or `share` of its n-grams."""
    kept: list[set[tuple[int, ...]]] = []
    is_near = []
    for text in texts:
        own = set(ngrams(text, size))
        is_near.append(any(len(own & other) >= share * len(own) for other in kept))
        if not is_near[-1]:
            kept.append(own)
    return is_near


def usable(candidates: Sequence[Candidate], wanted: int) -> Selection:
    """Drop rows that say nothing: broken, empty, endless and shortened ones, near-duplicates, and the least likely.

    Shortened are rows of which the chat template leaves something out.
    Answers that `max_seq_length` has cut off count as endless if they are loops. Other cut answers are dropped, too,
    as far as there are enough that end.
    """
    dropped: Counter[str] = Counter()
    ended, cut = [], []
    for index, one in enumerate(candidates):
        if set(f"{one.prompt}{one.answer}") & _BROKEN:
            dropped["broken"] += 1
        elif (one.is_complete and not one.answer.strip()) or (one.prompt_end and not one.prompt.strip()):
            dropped["empty"] += 1
        elif not one.is_complete or (not one.is_ended and repeated_share(one.ids[one.start :]) >= LOOP_SHARE):
            dropped["endless"] += 1
        elif not one.is_whole:
            dropped[SHORTENED] += 1
        else:
            (ended if one.is_ended else cut).append(index)
    order = [*ended, *cut]
    is_near = near_duplicates([candidates[index].written for index in order])
    unlike = [index for index, repeats in zip(order, is_near, strict=True) if not repeats]
    dropped["duplicates"] = len(order) - len(unlike)
    number = math.floor(UNLIKELY_SHARE * len(unlike))
    unlikely = set(sorted(unlike, key=lambda index: (candidates[index].log_prob, index))[:number])
    dropped["unlikely"] = len(unlikely)
    likely = [index for index in unlike if index not in unlikely]
    is_enough = sum(candidates[index].is_ended for index in likely) >= wanted
    kept = [index for index in likely if candidates[index].is_ended or not is_enough]
    dropped["cut"] = len(likely) - len(kept)
    return Selection(tuple(sorted(kept)), {reason: count for reason, count in dropped.items() if count})


def choose(divergences: Sequence[float], wanted: int, seed: int) -> tuple[int, ...]:
    """Choose `wanted` rows: most by the largest divergence, a share at random among the others.

    Args:
        divergences: of each row.
        wanted: number of rows to choose, at most all.
        seed: of the random share; uses a local generator.

    Returns:
        Indices, ascending.
    """
    at_random = math.floor(RANDOM_SHARE * wanted)
    ranked = sorted(range(len(divergences)), key=lambda index: (-divergences[index], index))
    top, rest = ranked[: wanted - at_random], sorted(ranked[wanted - at_random :])
    drawn = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:at_random].tolist()
    return tuple(sorted([*top, *(rest[place] for place in drawn)]))
