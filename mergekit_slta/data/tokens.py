"""Tokenize texts, and find the first token of a row's answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoded(NamedTuple):
    """A row as tokens.

    Attributes:
        ids: token ids.
        completion: position of the first token that holds a character of the answer: at least 1, and len(ids) if the
            answer was cut off.
    """

    ids: tuple[int, ...]
    completion: int


def encode(
    text: str, tokenizer: PreTrainedTokenizerBase, max_length: int, *, add_special_tokens: bool, answer: int = 0
) -> Encoded:
    """Tokenize a whole text, then keep its first `max_length` tokens.

    Truncation and padding that were saved with the tokenizer have no effect. If the text begins with a
    begin-of-sequence token, the one that the tokenizer adds is dropped.

    The answer is found from character offsets, because some tokenizers merge the last character of the prompt and the
    first of the answer into one token.

    Args:
        text: the whole row.
        tokenizer: the output's.
        max_length: number of tokens that are kept.
        add_special_tokens: whether the tokenizer adds its usual special tokens.
        answer: index of the answer's first character; 0 if the whole text is the answer.
    """

    def tokenize(part: str, **options: bool) -> dict[str, list]:
        # The arguments override what the tokenizer's files say (`split_special_tokens`, `truncation`, ...).
        return tokenizer(
            part, add_special_tokens=add_special_tokens, truncation=False, padding=False, split_special_tokens=False,
            verbose=False, **options,
        )  # fmt: skip

    if answer and tokenizer.is_fast:
        encoded = tokenize(text, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        first = next((place for place, (_, stop) in enumerate(encoded["offset_mapping"]) if stop > answer), len(ids))
    elif answer:  # no offsets: find the first token where row and prompt differ
        ids = tokenize(text)["input_ids"]
        prompt = tokenize(text[:answer])["input_ids"]
        pairs = zip(prompt, ids, strict=False)
        first = next((place for place, (one, other) in enumerate(pairs) if one != other), len(prompt))
    else:
        ids, first = tokenize(text)["input_ids"], 0
    doubled = _doubled_bos(ids, tokenizer)
    kept = tuple(ids[doubled:][:max_length])
    return Encoded(kept, min(max(1, first - doubled), len(kept)))


def _doubled_bos(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """1 if the ids begin with two begin-of-sequence tokens, else 0."""
    bos = tokenizer.bos_token_id
    return int(bos is not None and list(ids[:2]) == [bos, bos])
