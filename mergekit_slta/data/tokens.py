"""Tokenize texts, and find the first and the last token of a row's answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_END_TOKEN = re.compile(r"</s>|end|eo[stmd]", re.IGNORECASE)
"""How special tokens that end an answer are named: `<|im_end|>`, `<end_of_turn>`, `<|eot_id|>`."""


class Encoded(NamedTuple):
    """A row as tokens. The answer ends where the row does.

    Attributes:
        ids: token ids.
        completion: position of the first token that holds a character of the answer: at least 1, and len(ids) if the
            answer was cut off.
        num_cut: number of tokens that were cut off.
    """

    ids: tuple[int, ...]
    completion: int
    num_cut: int = 0


def encode(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    add_special_tokens: bool,
    answer: int = 0,
    completion_eos: bool | None = None,
) -> Encoded:
    """Tokenize a whole text, then keep its first `max_length` tokens.

    Truncation and padding that were saved with the tokenizer have no effect. If the text begins with a
    begin-of-sequence token, the one that the tokenizer adds is dropped.

    The answer is found from character offsets, because some tokenizers merge the last character of the prompt and the
    first of the answer into one token. White space behind an end token, and what follows it, is left out of rows that
    end with an answer. So is white space at the end of a chat, unless it is part of a token with other characters.

    Args:
        text: the whole row.
        tokenizer: the output's.
        max_length: number of tokens that are kept.
        add_special_tokens: whether the tokenizer adds its usual special tokens; False for a chat.
        answer: index of the answer's first character; 0 if the whole text is the answer.
        completion_eos: whether the tokenizer's end token follows an answer that does not end with one; None if the text
            is a chat, or has no answer. The tokenizer may have none.
    """

    def tokenize(part: str, **options: bool) -> dict[str, list]:
        # The arguments override what the tokenizer's files say (`split_special_tokens`, `truncation`, ...).
        return tokenizer(
            part, add_special_tokens=add_special_tokens, truncation=False, padding=False, split_special_tokens=False,
            verbose=False, **options,
        )  # fmt: skip

    special = [] if add_special_tokens and completion_eos is None else special_tokens(tokenizer)
    text = _without_rest(text, special, answer)
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
    if not add_special_tokens and text[-1:].isspace():
        bare = tokenize(text.rstrip())["input_ids"]
        ids = bare if ids[: len(bare)] == bare else ids
    if completion_eos is not None and tokenizer.eos_token_id is not None:
        ids = _with_end(ids, text, tokenizer, special, completion_eos)
    doubled = _doubled_bos(ids, tokenizer)
    kept = tuple(ids[doubled:][:max_length])
    return Encoded(kept, min(max(1, first - doubled), len(kept)), len(ids) - doubled - len(kept))


def decode_row(ids: Sequence[int], completion: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The text before a row's answer, and the answer, as the model sees them: with special tokens.

    Args:
        ids: token ids of the row.
        completion: position of the answer's first token.
        tokenizer: the output's.
    """

    def decode(part: Sequence[int]) -> str:
        return str(tokenizer.decode(list(part), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    whole, prompt = decode(ids), decode(ids[:completion])
    if whole.startswith(prompt):  # an answer alone may lose the space that it begins with
        return prompt, whole[len(prompt) :]
    return prompt, decode(ids[completion:])


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A tokenizer's special tokens, longest first. Those of white space alone are left out."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({token for token in (*added, *tokenizer.all_special_tokens) if token.strip()}, key=len, reverse=True)


def shared_end(shared: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where the answer begins in a chat that shares no more than this text with its prompt.

    Behind the text's last special token or white space, so that no part of the answer's first word is left out.
    """
    marks = "|".join(["\\s", *map(re.escape, special_tokens(tokenizer))])
    found = re.match(rf"(?s:.*)(?:{marks})", shared)
    return found.end() if found else 0


def _without_rest(text: str, special: Sequence[str], start: int) -> str:
    """Leave out white space behind a special token, if nothing but other special tokens follows it."""
    kept = stop = len(text)
    while True:  # from the end: a tokenizer may have thousands of special tokens, and a text may be long
        bare = start + len(text[start:stop].rstrip())
        token = next((token for token in special if text.endswith(token, start, bare)), None)
        if token is None:
            return text[:kept]
        kept = bare if bare < stop else kept
        stop = bare - len(token)


def _with_end(
    ids: Sequence[int], text: str, tokenizer: PreTrainedTokenizerBase, special: Sequence[str], completion_eos: bool
) -> list[int]:
    """Let ids end with the tokenizer's end token once, or not at all.

    Args:
        ids: token ids of the text. Some tokenizers end every text with their end token.
        text, special: the text, and the tokenizer's special tokens.
        tokenizer: the output's.
        completion_eos: whether the end token follows a text that ends with no such token.
    """
    ended = any(text.endswith(token) for token in special if _END_TOKEN.search(token))
    end = tokenizer.eos_token_id
    kept = list(ids)
    while kept and kept[-1] == end:
        kept.pop()
    return [*kept, end] if text.endswith(tokenizer.eos_token) or (completion_eos and not ended) else kept


def _doubled_bos(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """1 if the ids begin with two begin-of-sequence tokens, else 0."""
    bos = tokenizer.bos_token_id
    return int(bos is not None and list(ids[:2]) == [bos, bos])
