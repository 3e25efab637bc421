"""Tokenize texts, and find the first token of a row's answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int, *, add_special_tokens: bool) -> list[int]:
    """Tokenize a text, and cut it to `max_length` tokens.

    If the text begins with a begin-of-sequence token, the one that the tokenizer adds is dropped.
    """
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, truncation=True, max_length=max_length + 1)
    ids = encoded["input_ids"]
    return ids[_doubled_bos(ids, tokenizer) :][:max_length]


def completion_start(
    text: str, start: int, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool
) -> int:
    """Position of the first token that holds a character of the answer.

    At least 1; len(ids) if the answer was cut off. It is found from character offsets, because some tokenizers merge
    the last character of the prompt and the first of the answer into one token.

    Args:
        text: the whole row.
        start: index of the answer's first character.
        ids: the row's token ids, from `encode`.
        tokenizer, add_special_tokens: as for `encode`.
    """
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        whole = encoded["input_ids"]
        ends = [stop for _, stop in encoded["offset_mapping"]]
        first = next((place for place, stop in enumerate(ends) if stop > start), len(whole))
    else:  # no offsets: find the first token where row and prompt differ
        whole = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        prompt = tokenizer(text[:start], add_special_tokens=add_special_tokens)["input_ids"]
        pairs = zip(prompt, whole, strict=False)
        first = next((place for place, (one, other) in enumerate(pairs) if one != other), len(prompt))
    return min(max(1, first - _doubled_bos(whole, tokenizer)), len(ids))


def _doubled_bos(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """1 if the ids begin with two begin-of-sequence tokens, else 0."""
    bos = tokenizer.bos_token_id
    return int(bos is not None and list(ids[:2]) == [bos, bos])
