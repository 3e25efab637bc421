"""Matrix products: how fast this machine does those that a calibration needs, and how many a run has really done."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

MIN_SECONDS = 0.1
MAX_REPEATS = 100
TOKENS = 1024
"""Tokens that are multiplied at a time."""
VOCABULARY_ROWS = 4096
"""The output projection is measured in pieces of so many rows: its logits do not all fit anywhere."""


@torch.inference_mode()
def floor(matrices: Sequence[tuple[int, int, int]], num_tokens: int) -> dict[str, float]:
    """Time nothing but the matrix products of one model's forward pass, in float32.

    Args:
        matrices: (count, inputs, outputs) of all matrices; see `Shape.matrices`.
        num_tokens: of all rows; they are multiplied `TOKENS` at a time.

    Returns:
        flops; seconds and cpu_seconds: each distinct product is timed by itself and counted as often as it occurs. The
        least of several times is taken, by MKL and by oneDNN: what else the machine does only adds to it, and a floor
        must not be high.
    """
    total: Counter[str] = Counter()
    pieces, rest = divmod(num_tokens, TOKENS)
    for tokens, batches in ((TOKENS, pieces), (rest, 1)):
        if not tokens or not batches:
            continue
        for count, inputs, outputs in matrices:
            piece = min(outputs, VOCABULARY_ROWS) if count == 1 else outputs
            times = batches * count * outputs / piece
            seconds, processor = _time_product(tokens, inputs, piece)
            total["seconds"] += times * seconds
            total["cpu_seconds"] += times * processor
            total["flops"] += times * 2.0 * tokens * inputs * piece
    return dict(total)


@torch.inference_mode()
def rates(kinds: Sequence[str], inputs: int, outputs: int) -> dict[str, float]:
    """Floating point operations per second of the products of one large matrix, by dtype ("float32", ...)."""
    flops = 2.0 * TOKENS * inputs * outputs
    return {kind: flops / _time_product(TOKENS, inputs, outputs, getattr(torch, kind))[0] for kind in kinds}


def _time_product(tokens: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    features, weight = torch.randn(tokens, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    seconds: list[float] = []
    processor: list[float] = []
    before = torch.backends.mkldnn.matmul.fp32_precision
    for precision in ("none", "bf16"):  # the second one is oneDNN, which rounds only where a CPU has AMX
        torch.backends.mkldnn.matmul.fp32_precision = precision
        torch.nn.functional.linear(features, weight)
        until, runs = time.perf_counter() + MIN_SECONDS, 0
        while runs < 3 or (time.perf_counter() < until and runs < MAX_REPEATS):
            begin, begun = time.perf_counter(), time.process_time()
            torch.nn.functional.linear(features, weight)
            seconds.append(time.perf_counter() - begin)
            processor.append(time.process_time() - begun)
            runs += 1
    torch.backends.mkldnn.matmul.fp32_precision = before
    return min(seconds), min(processor)


def _fused_attention_on_cpu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    """Scores and their products with the values; torch's counter knows the kernels of GPUs only."""
    batch, heads, tokens, width = query.shape
    return 2 * batch * heads * tokens * key.shape[-2] * (width + value.shape[-1])


_FORMULAS = {**flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention_on_cpu}


class CountedProducts(TorchDispatchMode):
    """Counts floating point operations while it is active, wherever torch's own counter knows a formula.

    Attributes:
        flops: "float32", "float64", ... of matrix products, and "attention" of the fused kernel -> operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket not in _FORMULAS:
            with self:
                parts = func.decompose(*args, **kwargs)  # under inference mode `linear` arrives whole
            if parts is not NotImplemented:
                return parts
        output = func(*args, **kwargs)
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            attends = "attention" in func._overloadpacket.__name__
            kind = "attention" if attends else str(args[0].dtype).removeprefix("torch.")
            self.flops[kind] += formula(*args, **kwargs, out_val=output)
        return output
