"""Trains the demo's models: Llamas of about a million parameters, in float32 on the CPU, stored as bfloat16."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_slta.demo import tasks as data

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SHARD_SIZE = "500KB"
"""Small, so that every checkpoint has several shards, as large models have."""
NO_LOSS = -100
"""Label that transformers' losses ignore."""


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama: 6 layers, hidden size 128, 4 query and 2 key-value heads, separate output embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(
    model: LlamaForCausalLM,
    mixture: Sequence[tuple[Sequence[data.Encoded], float]],
    updates: int,
    rate: float,
    batch_rows: int,
    rng: random.Random,
) -> None:
    """Train with AdamW, a short warm-up and linear decay.

    Args:
        model: the model; changed in place.
        mixture: pools of texts, each with its share of a batch.
        updates: number of optimizer updates.
        rate: peak learning rate.
        batch_rows: rows per update.
        rng: chooses the rows of the batches.
    """
    import torch

    pools, shares = zip(*mixture, strict=True)
    warm_up = max(1, min(30, updates // 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / warm_up, 1.0) * max(0.02, 1 - done / updates)
    )
    model.train()
    for _ in range(updates):
        rows = [rng.choice(pool) for pool in rng.choices(pools, shares, k=batch_rows)]
        ids, labels = padded(rows)
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def padded(rows: Sequence[data.Encoded]) -> tuple[Any, Any]:
    """(ids, labels), both [rows, longest] int64; padded on the right, so that causal attention needs no mask."""
    import torch

    longest = max(len(row.ids) for row in rows)
    ids = [[*row.ids, *[0] * (longest - len(row.ids))] for row in rows]
    labels = [[*[NO_LOSS] * row.start, *row.ids[row.start :], *[NO_LOSS] * (longest - len(row.ids))] for row in rows]
    return torch.tensor(ids), torch.tensor(labels)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a bfloat16 copy in several shards, with the tokenizer; `model` itself stays float32."""
    import copy

    import torch

    with quiet_transformers():
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread. More threads speed up such small matrices little, and slow them down on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers: a demo prints only what goes through `echo`."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
