"""Let an expert write rows: sample token by token, a batch of rows at once.

Scope: one batch. All rows of a batch begin with the same tokens and grow by one token a step, so nothing is padded.
When a row's user turn ends, the template's tokens up to the answer follow without being sampled.

Every row has random numbers of its own, drawn on the CPU before the row begins: they do not depend on the batch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_slta.generation.choices import ANSWER_TEMPERATURE, PROMPT_SHARE, PROMPT_TEMPERATURE
from mergekit_slta.generation.prompts import Prompt
from mergekit_slta.generation.selection import Candidate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Forward = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""(token ids [b, s], cache of the tokens before them) -> logits [b, s, v] and the new cache, or None for no cache."""
_MARGIN = 4
"""Tokens before the text that ends the user's turn that are decoded with it: the most of one character."""


@dataclass
class _Row:
    """A row that is being written."""

    number: int
    uniforms: Tensor
    """[max_length] float64 in [0, 1)."""
    ids: list[int]
    forced: list[int] = field(default_factory=list)
    """Tokens of the template that come next."""
    prompt: list[int] = field(default_factory=list)
    prompt_text: str = ""
    prompt_end: int = 0
    start: int = 0
    """Position of the answer's first token; 0 in the user's turn."""
    answer: list[int] = field(default_factory=list)
    skipped: int = 0
    """Characters of the answer's first token that are the template's."""
    log_probs: list[float] = field(default_factory=list)
    answer_log_prob: float = 0.0
    is_ended: bool = False
    is_given_up: bool = False


def uniforms(key: str, number: int, count: int) -> Tensor:
    """[count] float64 in [0, 1): the random numbers of row `number`, for a run with the hash `key`."""
    seed = int.from_bytes(hashlib.sha256(f"{key} {number}".encode()).digest()[:8], "big") >> 1
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), device="cpu")


def sample_tokens(logits: Tensor, temperatures: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Sample a token for each row by the inverse of the distribution function.

    Args:
        logits: [b, v].
        temperatures, drawn: [b] float64; `drawn` in [0, 1).

    Returns:
        [b] int64 tokens, and [b] float64 their log-probabilities at temperature 1.
    """
    log_probs = torch.log_softmax(logits.double(), dim=-1)  # [b, v]
    cumulated = torch.softmax(log_probs / temperatures[:, None], dim=-1).cumsum(-1)  # [b, v]
    wanted = (drawn * cumulated[:, -1])[:, None]
    tokens = torch.searchsorted(cumulated, wanted, right=True).clamp(max=logits.shape[1] - 1)
    return tokens[:, 0], log_probs.gather(1, tokens)[:, 0]


def write_batch(
    forward: Forward, prompt: Prompt, numbers: Sequence[int], key: str, max_length: int,
    tokenizer: PreTrainedTokenizerBase, device: torch.device,
) -> list[Candidate]:  # fmt: skip
    """Write the rows with the given numbers.

    Args:
        forward: runs the expert.
        prompt: what all rows begin with.
        numbers: the rows' numbers.
        key: hash of the run, see `uniforms`.
        max_length: most tokens of a row.
        tokenizer: the output's.
        device: the device of the expert.
    """
    vocabulary = len(tokenizer)
    before = list(prompt.before_ids)
    longest_prompt = int(PROMPT_SHARE * (max_length - len(before) - len(prompt.between_ids)))
    rows = [_Row(number, uniforms(key, number, max_length), list(before)) for number in numbers]
    if prompt.between is None:
        for row in rows:
            row.start = len(before)
    live, cache, length = rows, None, len(before)
    ids = torch.tensor([before] * len(rows), device=device)
    while live and length < max_length:
        logits, cache = forward(ids, cache)
        temperatures = [ANSWER_TEMPERATURE if row.start else PROMPT_TEMPERATURE for row in live]
        tokens, log_probs = sample_tokens(
            logits[:, -1, :vocabulary].cpu(), torch.tensor(temperatures, dtype=torch.float64),
            torch.stack([row.uniforms[length] for row in live]),
        )  # fmt: skip
        for row, token, log_prob in zip(live, tokens.tolist(), log_probs.tolist(), strict=True):
            _append(row, token, log_prob, prompt, longest_prompt, tokenizer)
        length += 1
        going = [place for place, row in enumerate(live) if not (row.is_ended or row.is_given_up)]
        if len(going) < len(live) and cache is not None and going:
            cache.reorder_cache(torch.tensor(going, device=device))
        live = [live[place] for place in going]
        if live:
            ids = torch.tensor([row.ids[-1:] if cache is not None else row.ids for row in live], device=device)
    begin = 0 if prompt.between is None else len(before)
    return [_finished(row, begin, prompt, tokenizer) for row in rows]


def _append(
    row: _Row, token: int, log_prob: float, prompt: Prompt, longest_prompt: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Append the next token to a row: one of the template, or the sampled one."""
    if row.forced:
        row.ids.append(row.forced.pop(0))
        if not row.forced:
            row.start = len(row.ids)
        return
    row.log_probs.append(log_prob)
    if row.start:
        row.ids.append(token)
        row.answer_log_prob += log_prob
        row.is_ended = token in prompt.ends
        if not row.is_ended:
            row.answer.append(token)
        return
    if token in prompt.ends:  # it gives way to the first token of the template
        row.ids.append(prompt.between_ids[0])
        _begin_answer(row, _decoded(row.prompt, tokenizer), len(row.ids) - 1, prompt.between_ids[1:])
        return
    row.ids.append(token)
    row.prompt.append(token)
    if (match := _stopped(row.prompt, prompt.stop, tokenizer)) is not None:
        following, beyond = prompt.after_stop(match)
        _begin_answer(row, match.string[: match.start()], len(row.ids), following)
        if beyond:  # the token is the answer's first
            row.prompt_end = row.start = len(row.ids) - 1
            row.answer, row.answer_log_prob = [token], log_prob
            row.skipped = len(_decoded([token], tokenizer)) - len(beyond)
    else:
        row.is_given_up = len(row.prompt) > longest_prompt


def _stopped(
    ids: Sequence[int], stop: re.Pattern[str] | None, tokenizer: PreTrainedTokenizerBase
) -> re.Match[str] | None:
    """Where the text that ends the user's turn begins in all of its text; None if it is not there yet."""
    if stop is None:
        return None
    window = ids[-len(stop.pattern.encode()) - _MARGIN :]  # every token has a byte at least
    return stop.search(_decoded(ids, tokenizer)) if stop.search(_decoded(window, tokenizer)) else None


def _begin_answer(row: _Row, text: str, end: int, following: Sequence[int]) -> None:
    """End the user's turn: its text, the position behind it, and the tokens up to the answer that are to come."""
    row.prompt_text, row.prompt_end, row.forced = text, end, list(following)
    row.start = 0 if following else len(row.ids)
    row.is_given_up = not text.strip()


def _finished(row: _Row, begin: int, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Candidate:
    answer, is_complete = _decoded(row.answer, tokenizer)[row.skipped :], row.start > 0 and not row.is_given_up
    return Candidate(
        number=row.number,
        prompt=row.prompt_text,
        answer=answer,
        ids=tuple(row.ids),
        begin=begin,
        prompt_end=row.prompt_end,
        start=row.start or len(row.ids),
        is_ended=row.is_ended,
        is_complete=is_complete,
        log_prob=sum(row.log_probs) / max(1, len(row.log_probs)),
        answer_log_prob=row.answer_log_prob,
        is_whole=not is_complete or prompt.renders(row.prompt_text, answer),
    )


def _decoded(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of tokens as it is, without a character that was cut off at its end."""
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).rstrip("\N{REPLACEMENT CHARACTER}")
