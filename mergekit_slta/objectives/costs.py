"""What a job will cost, predicted from headers and rows alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mergekit_slta.checkpoints.plan import total_bytes
from mergekit_slta.data.batches import BATCH_TOKENS
from mergekit_slta.job.preflight import Job
from mergekit_slta.models.submodules import partition
from mergekit_slta.runner.backward import LOGITS
from mergekit_slta.runner.state import HEAD_ELEMENTS
from mergekit_slta.runtime.activations import activation_bytes


@dataclass(frozen=True)
class Costs:
    """Predictions for a calibration: floating point operations, bytes read, peak anonymous bytes besides the libraries,
    bytes of the largest single allocation, bytes written by the merge, bytes of features on disk meanwhile."""

    flops: float
    read_bytes: int
    peak_bytes: int
    largest_bytes: int
    written_bytes: int
    scratch_bytes: int = 0


LARGE_BLOCK = 32 * 2**20
"""Bytes from which malloc maps a block by itself, and gives it back at once."""
_KEPT = {"head_mlp": 3.6, "linear": 2.6}
"""granularity -> anonymous memory over what is in use, where blocks are smaller than that: malloc keeps them for the
next tensors of their size. As measured by `examples/benchmarks`; outputs of many sizes leave more behind."""
_KEPT_OTHERWISE, _KEPT_LARGE = 2.0, 1.5
_SOLVE = 5
"""Matrices that a solve among rows has at a time."""
_SLOPE_COPIES = 6
"""Copies of all slopes that moving, joining and solving them has at a time; counted in the code, not measured."""
_STEPS = {"model": "layer", "layer": "layer", "attn_mlp": "attn_mlp", "head_mlp": "attn_mlp", "linear": "linear"}
"""The granularity whose steps hold the same tensors at a time."""


def estimate(job: Job) -> Costs:
    """What the job will cost, from headers and rows alone (DESIGN: (T+1) x tokens x 2 x parameters).

    Peak memory is that of the larger of two moments: a step's tensors of every model with the features of a pack of
    batches at each of them, or a part of the vocabulary with its logits. Tensors that a checkpoint holds in the
    precision of the forward passes stay mapped, and are the system's.
    """
    models, experts = len(job.plan.models), len(job.plan.models) - 1
    base = job.plan.models[0]
    item = torch.finfo(job.dtype).bits // 8
    sizes = {name: math.prod(job.skeleton.shapes.get(name, ())) for name in job.plan.tensors}
    table = job.skeleton.embedding_weight
    head = table if job.plan.is_tied else job.skeleton.head_weight
    steps: dict[str, int] = {}  # parameters held at a time
    held: dict[str, int] = {}  # bytes of them that are no mapped file, over all models
    for submodule in partition(job.plan.tensors, job.skeleton.anatomy, _STEPS[job.recipe.settings.granularity]):
        if submodule.layer is not None:
            steps[submodule.forward_group] = steps.get(submodule.forward_group, 0) + sum(
                sizes[name] for name in submodule.tensors
            )
            copied = sum(sizes[name] * item * _copies(job, name) for name in submodule.tensors)
            held[submodule.forward_group] = held.get(submodule.forward_group, 0) + copied
    flops = models * job.num_tokens * 2.0 * (sum(steps.values()) + sizes[head])

    width = int(job.skeleton.config.hidden_size)
    wide = max(int(getattr(job.skeleton.config, "intermediate_size", 0) or 4 * width), width)
    lengths = [len(row.ids) for drawn in job.rows if drawn is not None for row in drawn.rows]
    longest = max(lengths, default=job.recipe.settings.max_seq_length)
    tokens = min(max(job.num_tokens, 1), max(BATCH_TOKENS, longest))
    if job.recipe.settings.granularity == "linear":  # row by row
        tokens = longest
    used = len({token for drawn in job.rows if drawn is not None for row in drawn.rows for token in row.ids})
    part = min(sizes[head] // width, max(1, HEAD_ELEMENTS // tokens))
    hidden = job.num_tokens * width * item
    in_layer = max(held.values(), default=0) + tokens * ((3 * wide + 4 * width) + models * width) * item
    in_layer += experts * longest * width * 8
    in_head = part * width * item * _copies(job, head) + models * tokens * part * item + experts * longest * part * 8
    in_embed = used * width * item * models
    weights = max((size * item for name, size in sizes.items() if name not in (table, head)), default=0)
    largest = max(weights, tokens * wide * item, tokens * part * item)

    out = job.recipe.config.out_dtype or job.recipe.config.dtype
    written = total_bytes(job.plan, [base])
    if out and written:
        bits = torch.finfo(getattr(torch, out.removeprefix("torch."))).bits
        written = sum(sizes.values()) * bits // 8
    if job.recipe.settings.objective != "features":
        return _of_gradients(job, sizes, head, longest, largest, written)
    kept = _KEPT.get(job.recipe.settings.granularity, _KEPT_OTHERWISE) if largest < LARGE_BLOCK else _KEPT_LARGE
    peak = int((hidden + max(in_layer, in_head, in_embed)) * kept)
    return Costs(flops, total_bytes(job.plan), peak, largest, written)


def _of_gradients(job: Job, sizes: dict[str, int], head: str, longest: int, largest: int, written: int) -> Costs:
    """Every row forward, forward again and back (twice the work) through its own expert; with steps, once forward
    through the base, and in each through the merged model as through the expert, with one slope more. Where steps have
    rows of their own, each row is part of one, and those of later ones go through their experts forward alone.

    The features of all layers are on disk, of one pass at a time. In memory are one layer of every model and a row's
    activations, or the output projection and its gradients.
    """
    settings, models = job.recipe.settings, len(job.plan.models)
    draws, steps = max(1, settings.label_samples), settings.steps if settings.objective == "joint" else 0
    item, width = torch.finfo(job.dtype).bits // 8, int(job.skeleton.config.hidden_size)
    prefix = job.skeleton.layers_path + "."
    layers: dict[str, int] = {}
    for name, size in sizes.items():
        if name.startswith(prefix):
            index = name[len(prefix) :].partition(".")[0]
            layers[index] = layers.get(index, 0) + size
    drawn = [rows for rows in job.rows if rows is not None]
    parts = [
        sum(len(row.ids) for rows in drawn for row in rows.part(number, settings.row_groups))
        for number in range(settings.row_groups)
    ]
    tokens = parts[0] * (2 + 2 * draws) + sum(parts[1:]) + job.num_tokens * (steps > 0)
    tokens += job.num_tokens * (steps // len(parts)) * (2 + 2 * (draws + 1))
    if settings.objective == "fisher":  # outputs by every model, in the place of products with their changes
        tokens += job.num_tokens * models
    flops = tokens * 2.0 * (sum(layers.values()) + sizes[head])
    wide = max(int(getattr(job.skeleton.config, "intermediate_size", 0) or 4 * width), width)
    in_layer = (models + 1 + (steps > 0)) * max(layers.values(), default=0) * item
    in_layer += longest * (6 * wide + 12 * width) * item
    slopes = draws + (steps > 0)
    logits = min(LOGITS, longest * sizes[head] // width) * item  # of a row, or of a part of it
    in_head = sizes[head] * item * ((_copies(job, head) > 0) + (steps > 0))
    in_head += (5 + 2 * slopes + 2 * (steps > 0)) * logits  # the teacher's beside the model's own; gradients twice
    largest = max(largest, logits * slopes)
    kept = _KEPT_OTHERWISE if largest < LARGE_BLOCK else _KEPT_LARGE
    scratch = activation_bytes(max(parts), job.skeleton.num_layers + 1, draws + (steps > 0), width, job.dtype)
    num_rows = sum(len(rows.rows) for rows in drawn)
    solve = _SOLVE * (draws * num_rows) ** 2 * 8  # among rows
    solve += _SLOPE_COPIES * num_rows * slopes * (models - 1) * len(job.submodules) * 8
    peak = int(max(max(in_layer, in_head) * kept, solve))
    read = 2 * total_bytes(job.plan) * (1 + steps)
    read += len(parts) * (steps > 0) * total_bytes(job.plan, [job.recipe.base])
    read += (len(parts) - 1) * (total_bytes(job.plan) - total_bytes(job.plan, [job.recipe.base]))
    return Costs(flops, read, peak, largest, written, scratch)


def _copies(job: Job, name: str) -> int:
    """In how many models a tensor has to be cast, or put on a device, which takes memory of its own."""
    if job.device.type != "cpu":
        return len(job.plan.models)
    count = 0
    for model in job.plan.models:
        header = job.plan.headers.get(model, {}).get(job.plan.source_name(name, model) or "")
        count += header is None or header.dtype != _SAFETENSORS.get(job.dtype)
    return count


_SAFETENSORS = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names of dtypes in the headers."""
