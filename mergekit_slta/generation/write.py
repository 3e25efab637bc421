"""Have experts write calibration rows: load each, sample, drop what is of no use, and keep what says the most.

Scope: whole models, one at a time in memory: every expert that writes, then the base, which scores what they wrote.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from mergekit_slta.checkpoints.tensors import Checkpoints, Weights
from mergekit_slta.errors import DataError, OutputError, RunError, listing, show
from mergekit_slta.files.lock import file_lock
from mergekit_slta.files.names import lock_path, resume_folder
from mergekit_slta.generation.choices import BATCH_ROWS, OVERSAMPLING
from mergekit_slta.generation.prompts import Prompt
from mergekit_slta.generation.sampling import Forward, write_batch
from mergekit_slta.generation.selection import SHORTENED, Candidate, choose, usable
from mergekit_slta.generation.store import check_rows_target, read_batch, write_batch_file, write_rows
from mergekit_slta.models.running import call_with_cache
from mergekit_slta.runtime.progress import Progress
from mergekit_slta.runtime.screen import describe_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TRIED, _TOLERANCE = 4, 0.01
"""Number of tokens after the prompt on which a model's cache is tried, and the largest relative difference of their
logits."""
_LOST_SHARE = 0.9
"""An expert is refused if the chat template shortens this share of the first answers that end."""
_COPIES = 4
"""Tensors as large as a row's logits that scoring it makes."""


@dataclass(frozen=True)
class Writer:
    """An expert that is to write rows.

    Attributes:
        model: its index in the checkpoints.
        name: its name, for messages.
        prompt: what it is given.
        path: the file to write.
        key: hash of everything that its rows depend on; seeds its random numbers.
    """

    model: int
    name: str
    prompt: Prompt
    path: Path
    key: str


def write_all(
    writers: Sequence[Writer], checkpoints: Checkpoints, tokenizer: PreTrainedTokenizerBase, *,
    wanted: int, max_length: int, seed: int, say: Callable[[str], None], quiet: bool,
) -> None:  # fmt: skip
    """Write the rows of all writers.

    Args:
        writers: the experts.
        checkpoints: the models, the base first.
        tokenizer: the output's.
        wanted: rows of each writer.
        max_length: most tokens of a row.
        seed: the recipe's.
        say: prints a line.
        quiet: show no progress.

    Raises:
        DataError: an expert writes too few rows that can be used.
        OutputError: a file is not replaced, or cannot be written.
        RunError: a model does not fit into the memory.
    """
    for writer in writers:
        check_rows_target(writer.path)
    check_memory(writers[0].name, checkpoints, max_length)
    numbers = range(OVERSAMPLING * wanted)
    batches = [numbers[start : start + BATCH_ROWS] for start in range(0, len(numbers), BATCH_ROWS)]
    total = (len(batches) + 1) * len(writers)
    with Progress("rows", total, quiet=quiet) as progress, torch.no_grad():
        written = []
        for writer in writers:
            with file_lock(lock_path(resume_folder(writer.path)), lambda holder, writer=writer: _busy(writer, holder)):
                written.append(_write(writer, checkpoints, tokenizer, batches, max_length, progress, say))
        chosen = [usable(candidates, wanted) for candidates in written]
        for writer, candidates, found in zip(writers, written, chosen, strict=True):
            _check_enough(writer.name, candidates, len(found.kept), found.dropped, wanted)
        weights = load_model(checkpoints, 0)
        for writer, candidates, found in zip(writers, written, chosen, strict=True):
            progress.announce(f"the base on rows of {writer.name}")
            able = [candidates[index] for index in found.kept]
            divergences = [_divergence(checkpoints, weights, row) for row in able]
            kept = choose(divergences, wanted, seed)
            mean = sum(divergences[place] for place in kept) / len(kept)
            facts = {
                "model": writer.name, "rows": len(kept), "written": len(candidates), "dropped": found.dropped,
                "divergence": round(mean, 6),
            }  # fmt: skip
            rows = [writer.prompt.as_row(able[place].prompt, able[place].answer) for place in kept]
            write_rows(writer.path, rows, writer.key, facts)
            progress.say(
                f"{show(writer.name)} has written {len(kept)} rows: {len(candidates)} in all"
                + "".join(f", {count} {reason}" for reason, count in found.dropped.items())
            )
            progress.advance(1)


def _write(
    writer: Writer, checkpoints: Checkpoints, tokenizer: PreTrainedTokenizerBase, batches: Sequence[range],
    max_length: int, progress: Progress, say: Callable[[str], None],
) -> list[Candidate]:  # fmt: skip
    """All rows of a writer; those of an earlier run are read."""
    found = [read_batch(writer.path, number, writer.key) for number in range(len(batches))]
    done = sum(rows is not None for rows in found)
    if done:
        say(f"Resuming an earlier run: {done} of {len(batches)} batches of rows of {show(writer.name)} are written")
        progress.advance(done)
    weights: Weights = {}
    forward: Forward | None = None
    candidates: list[Candidate] = []
    for number, (numbers, rows) in enumerate(zip(batches, found, strict=True)):
        if rows is None:
            progress.announce(f"{writer.name}, batch {number + 1}/{len(batches)}")
            weights = weights or load_model(checkpoints, writer.model)
            forward = forward or _forward(writer, checkpoints, weights, say)
            rows = write_batch(
                forward, writer.prompt, numbers, writer.key, max_length, tokenizer, checkpoints.device,
            )  # fmt: skip
            if number == 0:
                _check_rendered(writer.name, rows)
            write_batch_file(writer.path, number, writer.key, rows)
            progress.advance(1)
        candidates += rows
    return candidates


def _forward(writer: Writer, checkpoints: Checkpoints, weights: Weights, say: Callable[[str], None]) -> Forward:
    """What runs a model token by token: with a cache, if that gives what the whole text gives; else it is said.

    (With the cache of transformers' Bamba it does not.)
    """
    model, before = checkpoints.skeleton.model, writer.prompt.before_ids

    def forward(ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        return call_with_cache(model, weights, ids, cache)

    size = checkpoints.skeleton.shapes[checkpoints.skeleton.embedding_weight][0]
    ids = torch.tensor([[*before, *(place % size for place in range(size // 2, size // 2 + _TRIED))]])
    ids = ids.to(checkpoints.device)
    whole, _ = forward(ids, None)
    logits, cache = forward(ids[:, : len(before)], None)
    found = [logits]
    for place in range(len(before), ids.shape[1]):
        if cache is None:
            break
        logits, cache = forward(ids[:, place : place + 1], cache)
        found.append(logits)
    steps = torch.cat(found, 1)
    if steps.shape == whole.shape and (steps - whole).norm() <= _TOLERANCE * whole.norm():
        return forward
    say(f"{show(writer.name)} writes without a cache, which is slower: with the one of transformers its logits differ")
    return lambda ids, _: (forward(ids, None)[0], None)


def load_model(checkpoints: Checkpoints, model: int) -> Weights:
    """All tensors of a model that text runs through, cast and on the device.

    Raises:
        ModelError: a tensor is missing, or holds NaN or Inf.
    """
    skeleton, plan = checkpoints.skeleton, checkpoints.plan
    is_tied = plan.is_tied or skeleton.head_weight not in plan.tensors
    names = [name for name in skeleton.shapes if not (is_tied and name == skeleton.head_weight)]
    (weights,) = checkpoints.load(names, [model])
    if is_tied:
        weights[skeleton.head_weight] = weights[skeleton.embedding_weight]
    checkpoints.flush()
    return skeleton.for_products(weights)


def _divergence(checkpoints: Checkpoints, weights: Weights, row: Candidate) -> float:
    """Mean over the answer's tokens of log p_expert - log p_base: an estimate of KL(expert || base) in nats per token,
    because the expert has written them."""
    ids = torch.tensor([row.ids], device=checkpoints.device)
    logits, _ = call_with_cache(checkpoints.skeleton.model, weights, ids, None)
    return (row.answer_log_prob - _log_prob(logits[0], ids[0], row.start)) / (len(row.ids) - row.start)


def _log_prob(logits: Tensor, ids: Tensor, start: int) -> float:
    """Log-probability of the tokens [s] from position `start` on, from logits [s, v]."""
    predicted = logits[start - 1 : len(ids) - 1].float()
    chosen = predicted.gather(1, ids[start:, None])[:, 0] - predicted.logsumexp(-1)
    return float(chosen.cpu().double().sum())


def model_bytes(shapes: Mapping[str, Sequence[int]], itemsize: int) -> int:
    """Size in memory of a model with tensors of these shapes."""
    return sum(map(math.prod, shapes.values())) * itemsize


def check_memory(name: str, checkpoints: Checkpoints, max_length: int) -> None:
    """Check that a whole model fits into the free memory of the device, with the cache and the logits of a batch.

    Raises:
        RunError: it does not.
    """
    skeleton, device = checkpoints.skeleton, checkpoints.device
    size = model_bytes(skeleton.shapes, checkpoints.dtype.itemsize)
    config = skeleton.config
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    total_heads = getattr(config, "num_attention_heads", None)
    share = heads / total_heads if isinstance(heads, int) and isinstance(total_heads, int) else 1.0
    cache = 2 * skeleton.num_layers * int(skeleton.width * share) * BATCH_ROWS * max_length * checkpoints.dtype.itemsize
    logits = _COPIES * max_length * skeleton.shapes[skeleton.embedding_weight][0] * 4
    needed = size + max(cache, logits)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu":
        free = psutil.virtual_memory().available
    else:
        return
    if needed > free:
        raise RunError(
            f"out of memory on {device} ({show(name)} needs {describe_bytes(needed)} to write its rows, and "
            f"{describe_bytes(free)} are free; layer by layer, every token would read {describe_bytes(size)}): lower "
            f"`max_seq_length` ({max_length}) or name rows as `dataset`, or choose another --device",
            code="out-of-memory",
        )


def _check_rendered(name: str, candidates: Sequence[Candidate]) -> None:
    """Refuse an expert whose chat template leaves out part of (nearly) all answers.

    Raises:
        DataError: see above.
    """
    ended = [one for one in candidates if one.is_ended and one.answer.strip()]
    lost = [one for one in ended if not one.is_whole]
    if lost and len(lost) >= _LOST_SHARE * len(ended):
        raise DataError(
            f"the chat template leaves out part of the answers that {show(name)} writes ({len(lost)} of {len(ended)}, "
            f"such as {show(lost[0].answer.strip(), 40)}): set another `chat_template`, or name a `dataset`",
            code="invalid-template",
        )


def _check_enough(
    name: str, candidates: Sequence[Candidate], count: int, dropped: Mapping[str, int], wanted: int
) -> None:
    """Refuse an expert with too few usable rows.

    Raises:
        DataError: see above.
    """
    if count >= wanted:
        return
    is_mute = not any(f"{one.prompt}{one.answer}".strip() for one in candidates)
    reasons = listing([f"{number} {reason}" for reason, number in dropped.items()])
    if dropped.get("empty", 0) == len(candidates):
        reasons = "all are empty" + ": it writes only end tokens" * is_mute
    elif dropped.get("duplicates", 0) > len(candidates) // 2:
        reasons += ": its rows are all alike"
    elif dropped.get("endless", 0) > len(candidates) // 2:
        reasons += ": raise `max_seq_length`"
    elif dropped.get(SHORTENED, 0) > len(candidates) // 2:
        reasons += ": set another `chat_template`"
    raise DataError(
        f"{show(name)} has written {len(candidates)} rows, and {count} of them can be used, fewer than the {wanted} "
        f"that are needed ({reasons}): give it a `hint`, name a `dataset`, or lower `num_samples`",
        code="too-few-rows",
    )


def _busy(writer: Writer, holder: str) -> OutputError:
    return OutputError(
        f"another process ({show(holder)}) writes {show(writer.path)} already: wait for it, or write elsewhere",
        code="in-use",
    )
