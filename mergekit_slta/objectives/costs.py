"""Estimate the costs of a calibration, from headers and rows only.

Floating point operations and bytes are exact counts. Memory is a sum of named parts, times a margin.
"""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_slta.checkpoints.plan import total_bytes
from mergekit_slta.data.batches import BATCH_TOKENS, GRADIENT_TOKENS
from mergekit_slta.job.job import Job
from mergekit_slta.maths.gauss_newton import STEPS_KEPT
from mergekit_slta.maths.ridges import FIRST_RIDGES, RIDGE_FACTORS
from mergekit_slta.models.submodules import partition
from mergekit_slta.objectives.phases import (
    Measured,
    direction_phase,
    evaluation,
    features_phase,
    measuring_phase,
    merge_phase,
    steps_phase,
)
from mergekit_slta.objectives.sizes import Sizes
from mergekit_slta.recipe.objectives import JointSettings
from mergekit_slta.runner.head_loss import LOGIT_GRADIENTS
from mergekit_slta.runner.row_losses import measured_rows
from mergekit_slta.runner.state import HEAD_ELEMENTS
from mergekit_slta.runtime.activations import activation_bytes
from mergekit_slta.runtime.rates import Phase

MEMORY_MARGIN = 1.5
"""Ratio of peak memory to the sum of its parts. The allocator keeps freed blocks for later tensors of the same size."""
SOLVE_MATRICES = 5
"""Number of matrices [rows x draws, rows x draws] that a joint solve holds at a time."""
_DERIVATIVE_COPIES = 6
"""Number of copies of all derivatives in memory while they are rebased, joined and solved."""
_SAME_GROUPS = {"model": "layer", "layer": "layer", "attn_mlp": "attn_mlp", "head_mlp": "attn_mlp", "linear": "linear"}
"""granularity -> the granularity whose forward groups hold the same tensors."""


@dataclass(frozen=True)
class Costs:
    """Estimated costs of a calibration and its merge.

    Attributes:
        flops: floating point operations of the calibration.
        read_bytes: bytes of checkpoints that the calibration reads.
        memory: part -> bytes in use at the peak, without the libraries.
        largest_bytes: the largest single allocation.
        written_bytes: bytes of the merged model.
        scratch_bytes: bytes of activations and of a closed form on disk during the calibration.
        combine_flops: floating point operations of the closed form; those of its eigenproblems count as ten times the
            cube of their size.
        phases: the work of each phase, in order. Losses and their gradients are computed for the tokens of answers, so
            the products of all phases are fewer than `flops` where rows have prompts.
    """

    flops: float
    read_bytes: int
    memory: dict[str, int]
    largest_bytes: int
    written_bytes: int
    scratch_bytes: int = 0
    combine_flops: float = 0.0
    phases: tuple[Phase, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Bytes of anonymous memory at the peak, without the libraries."""
        return int(MEMORY_MARGIN * sum(self.memory.values()))


def estimate_features(job: Job) -> Costs:
    """Estimate `objective: features`: (T + 1) x tokens x 2 x parameters operations; every byte is read once.

    The first rows of each task also run through their expert, for the losses; with merged inputs through the base, too.
    With `evaluate`, the held-out rows run through base, merge and their expert.

    Memory peaks in a layer (weights of a forward group of every model, and features of a pack), in the head (a part of
    the vocabulary, and its logits) or in the embeddings.
    """
    sizes = Sizes(job)
    models, item, width, longest = sizes.models, sizes.item, sizes.width, sizes.longest
    group_bytes: dict[str, int] = {}  # without memory-mapped files
    in_layers = 0
    granularity = job.recipe.settings.granularity
    for submodule in partition(job.plan.tensors, job.skeleton.anatomy, _SAME_GROUPS[granularity]):
        if submodule.layer is not None:
            in_layers += sum(sizes.parameters[name] for name in submodule.tensors)
            copied = sum(sizes.parameters[name] * item * sizes.copies(name) for name in submodule.tensors)
            group_bytes[submodule.forward_group] = group_bytes.get(submodule.forward_group, 0) + copied
    head_size = sizes.parameters[sizes.head]
    tokens = min(max(job.num_tokens, 1), max(BATCH_TOKENS, longest))
    if granularity == "linear":  # batches hold one row
        tokens = longest
    part = min(head_size // width, max(1, HEAD_ELEMENTS // tokens))  # vocabulary entries at a time
    used = len({token for drawn in job.rows if drawn is not None for row in drawn.rows for token in row.ids})
    moments = (
        {
            "weights of a forward group of every model": max(group_bytes.values(), default=0),
            "activations": tokens * (3 * sizes.inner_width + (4 + models) * width) * item,
            "differences in float64": (models - 1) * longest * width * 8,
        },
        {
            "weights of a part of the head of every model": part * width * item * sizes.copies(sizes.head),
            "logits": models * tokens * part * item,
            "differences in float64": (models - 1) * longest * part * 8,
        },
        {"embeddings of the rows' tokens of every model": used * width * item * models},
        sizes.combining,
    )
    peak = max(moments, key=lambda parts: sum(parts.values()))
    beside = 0 if granularity == "model" else sizes.measured_tokens * (1 + job.recipe.settings.own.inputs_are_merged)
    return Costs(
        flops=(models * job.num_tokens + beside + 3 * sizes.held_out_tokens) * 2.0 * (in_layers + head_size),
        read_bytes=(1 + (sizes.held_out_tokens > 0)) * total_bytes(job.plan),
        memory={"hidden states of all rows": (job.num_tokens + beside) * width * item, **peak},
        largest_bytes=max(sizes.largest_weight, tokens * sizes.inner_width * item, tokens * part * item),
        written_bytes=sizes.written_bytes(),
        scratch_bytes=sizes.direction_bytes,
        combine_flops=sizes.combine_flops,
        phases=(
            *direction_phase(sizes),
            *features_phase(sizes, sizes.examples, with_losses=True),
            *measuring_phase(sizes, evaluation(sizes)),
            *merge_phase(sizes),
        ),
    )


def estimate_merge(job: Job) -> Costs:
    """Estimate `objective: data_free`: a merge, and a forward pass of base, merge and expert over held-out rows."""
    sizes = Sizes(job)
    head_size = sizes.parameters[sizes.head]
    measures = sizes.held_out_tokens > 0
    return Costs(
        flops=3 * sizes.held_out_tokens * 2.0 * (sum(sizes.layers) + head_size),
        read_bytes=total_bytes(job.plan) * measures,
        memory=max(
            sizes.combining,
            {"weights of a layer of every model": sizes.models * max(sizes.layers, default=0) * sizes.item * measures},
            key=lambda parts: sum(parts.values()),
        ),
        largest_bytes=max([sizes.largest_weight, *sizes.combining.values()]),
        written_bytes=sizes.written_bytes(),
        scratch_bytes=sizes.direction_bytes * measures,
        combine_flops=sizes.combine_flops,
        phases=(*direction_phase(sizes), *measuring_phase(sizes, evaluation(sizes)), *merge_phase(sizes)),
    )


def estimate_gradients(job: Job) -> Costs:
    """Estimate `objective: joint`: at most this, since `steps: auto` may stop early.

    A full pass is a forward pass, then a backward pass: it repeats the forward pass of each layer, goes back to the
    layer's input for each loss, and takes the products of its inputs with every expert's task vectors. With steps, the
    rows of the first step make a pass of `features`, and the held-out rows run through their experts and the starting
    points. In each step its rows run through their experts, and make a full pass through the merged model; the held-out
    rows run through each trial. Without held-out rows there is only the pass of `features`. Without steps, all rows
    make a full pass through their experts, and the first rows of each task go through the base. The activations of all
    layers are on disk, for one pass at a time.
    """
    settings, sizes = job.recipe.settings.own, Sizes(job)
    assert isinstance(settings, JointSettings)
    models, item, width, longest = sizes.models, sizes.item, sizes.width, sizes.longest
    steps, draws = settings.max_steps, max(1, settings.label_samples)
    derivatives = draws + (steps > 0)
    has_rows = None not in job.rows
    examples = [job.examples(step) if has_rows else [] for step in range(steps or 1)]
    parts = [sum(len(example.row.ids) for example in own) for own in examples]  # tokens
    kept_rows = sum(sorted(len(own) for own in examples)[-STEPS_KEPT:])
    is_unmeasured = steps > 0 and has_rows and not sizes.held_out_tokens  # the result is that of `features`
    if is_unmeasured:
        tokens, read_bytes = models * parts[0], total_bytes(job.plan)
        phases = features_phase(sizes, examples[0])
    elif steps:
        one = job.recipe.settings.ridge is not None
        tried = [1] * steps if one else [len(FIRST_RIDGES)] + [len(RIDGE_FACTORS)] * (steps - 1)
        tokens = (
            models * parts[0]
            + sum(parts) * (3 + derivatives + models - 1)
            + sizes.held_out_tokens * (4 + len(job.directions) + sum(tried))
        )
        read_bytes = (2 + 3 * steps) * total_bytes(job.plan)
        starts = 2 + len(job.directions)  # merged models, beside the base
        trials = [Measured(sizes.held_out, merged=count, others=0) for count in tried]
        phases = [
            *features_phase(sizes, examples[0]),
            *steps_phase(sizes, examples, draws=draws, is_merged=True),
            *measuring_phase(sizes, [Measured(sizes.held_out, merged=starts, others=2), *trials]),
        ]
    else:
        tokens = job.num_tokens * (2 + draws + models - 1) + 2 * sizes.measured_tokens + 3 * sizes.held_out_tokens
        read_bytes = (3 + (sizes.held_out_tokens > 0)) * total_bytes(job.plan)
        read_bytes += total_bytes(job.plan, job.experts)  # layer by layer, for the repeated forward pass
        losses = [Measured([examples[0][row] for row in measured_rows(examples[0])], merged=0, others=2)]
        phases = steps_phase(sizes, examples, draws=draws, is_merged=False)
        phases += measuring_phase(sizes, losses + evaluation(sizes))
    head_size = sizes.parameters[sizes.head]
    logits = min(LOGIT_GRADIENTS, longest * head_size // width) * item  # of a row, or of some of its positions
    batch = max(longest, min(GRADIENT_TOKENS, max(parts)))
    moments = (
        {
            "weights of a layer of every model": (models + 1 + (steps > 0)) * max(sizes.layers, default=0) * item,
            # Of each loss the gradients by all outputs, and the changes of one output along the task vectors.
            "activations of a batch": batch
            * item
            * ((6 + 3 * derivatives + models - 1) * sizes.inner_width + (12 + 4 * derivatives) * width),
        },
        {
            "output projections": head_size * item * ((sizes.copies(sizes.head) > 0) + (steps > 0)),
            # Logits, probabilities, and those of as many positions that wait for the projection; with steps, also the
            # teacher's.
            "logits and their gradients": (5 + 4 * (steps > 0)) * logits,
        },
        {
            "matrices of the solve": SOLVE_MATRICES * (draws * kept_rows) ** 2 * 8,
            "derivatives": _DERIVATIVE_COPIES * kept_rows * derivatives * (models - 1) * len(job.submodules) * 8,
        },
        sizes.combining,
    )
    depth, dtype = job.skeleton.num_layers + 1, job.dtype
    lanes = max(3 + len(job.directions), len(FIRST_RIDGES)) if steps else 2
    measuring = activation_bytes(sizes.held_out_tokens, 2 * (1 + lanes), 0, width, dtype)
    teachers = 2 * (steps > 0)
    stepping = activation_bytes(max(parts), depth + teachers, derivatives, width, dtype)
    stepping += activation_bytes(sizes.held_out_tokens, teachers, 0, width, dtype)
    return Costs(
        flops=tokens * 2.0 * (sum(sizes.layers) + head_size),
        read_bytes=read_bytes,
        memory=max(moments, key=lambda parts: sum(parts.values())),
        largest_bytes=max(sizes.largest_weight, 2 * logits),
        written_bytes=sizes.written_bytes(),
        scratch_bytes=sizes.direction_bytes + (0 if is_unmeasured else max(stepping, measuring)),
        combine_flops=sizes.combine_flops,
        phases=(*direction_phase(sizes), *phases, *merge_phase(sizes)),
    )
