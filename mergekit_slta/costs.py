"""What a job will cost, predicted from headers and rows alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mergekit_slta.batches import BATCH_TOKENS
from mergekit_slta.plan import total_bytes
from mergekit_slta.preflight import Job
from mergekit_slta.submodules import split
from mergekit_slta.walk import HEAD_ELEMENTS


@dataclass(frozen=True)
class Costs:
    """Predictions for a calibration: floating point operations, bytes read, peak anonymous bytes, bytes written."""

    flops: float
    read_bytes: int
    peak_bytes: int
    written_bytes: int


_STEPS = {"model": "layer", "layer": "layer", "attn_mlp": "attn_mlp", "head_mlp": "attn_mlp", "linear": "linear"}
"""The granularity whose steps hold the same tensors at a time."""


def estimate(job: Job) -> Costs:
    """What the job will cost, from headers and rows alone (DESIGN: (T+1) x tokens x 2 x parameters)."""
    models = len(job.plan.models)
    base = job.plan.models[0]
    item = torch.finfo(job.dtype).bits // 8
    sizes = {name: math.prod(job.skeleton.shapes.get(name, ())) for name in job.plan.tensors}
    head = job.skeleton.embedding_weight if job.plan.is_tied else job.skeleton.head_weight
    steps: dict[str, int] = {}  # parameters held at a time
    for submodule in split(job.plan.tensors, job.skeleton.anatomy, _STEPS[job.recipe.settings.granularity]):
        if submodule.layer is not None:
            steps[submodule.step] = steps.get(submodule.step, 0) + sum(sizes[name] for name in submodule.tensors)
    flops = models * job.num_tokens * 2.0 * (sum(steps.values()) + sizes[head])
    largest = max(steps.values(), default=0)
    width = int(job.skeleton.config.hidden_size)
    tokens = min(job.num_tokens, max(BATCH_TOKENS, job.recipe.settings.max_seq_length))
    wide = max(int(getattr(job.skeleton.config, "intermediate_size", 0) or 4 * width), width)
    activations = tokens * (3 * wide + (models + 4) * width) * item
    in_layer = models * largest * item + activations
    in_head = models * (HEAD_ELEMENTS + HEAD_ELEMENTS // max(1, tokens) * width) * item
    hidden = job.num_tokens * width * item
    out = job.recipe.config.out_dtype or job.recipe.config.dtype
    written = total_bytes(job.plan, [base])
    if out and written:
        bits = torch.finfo(getattr(torch, out.removeprefix("torch."))).bits
        written = sum(sizes.values()) * bits // 8
    return Costs(flops, total_bytes(job.plan), hidden + max(in_layer, in_head), written)
