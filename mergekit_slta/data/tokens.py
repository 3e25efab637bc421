"""Texts as token ids, and the token at which a row's answer begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a text, cut to `max_length`.

    A begin-of-sequence token that stands in the text is not doubled by the one that the tokenizer adds.
    """
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, truncation=True, max_length=max_length + 1)
    ids = encoded["input_ids"]
    return ids[_doubled_bos(ids, tokenizer) :][:max_length]


def completion_start(
    text: str, start: int, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool
) -> int:
    """The first token that holds a character of the answer; at least 1, and len(ids) where the answer was cut off.

    It is found by characters: some tokenizers make one token of a header's line break and of what follows it.

    Args:
        text: the whole row.
        start: the character at which its answer begins.
        ids: the row's tokens, from `encode`.
        tokenizer, add_special_tokens: as for `encode`.
    """
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        whole = encoded["input_ids"]
        ends = [stop for _, stop in encoded["offset_mapping"]]
        first = next((place for place, stop in enumerate(ends) if stop > start), len(whole))
    else:  # no offsets: the first token in which the row differs from its prompt
        whole = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        prompt = tokenizer(text[:start], add_special_tokens=add_special_tokens)["input_ids"]
        pairs = zip(prompt, whole, strict=False)
        first = next((place for place, (one, other) in enumerate(pairs) if one != other), len(prompt))
    return min(max(1, first - _doubled_bos(whole, tokenizer)), len(ids))


def _doubled_bos(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """1 where two begin-of-sequence tokens stand at the beginning, else 0."""
    bos = tokenizer.bos_token_id
    return int(bos is not None and list(ids[:2]) == [bos, bos])
