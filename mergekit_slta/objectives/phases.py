"""The work of each phase of a run: products, other computations, and bytes; from headers and rows only.

Scope: amounts; `runtime.rates` turns them into seconds. Products are counted. The constants below stand for all other
computations: they are fitted to runs on a CPU of the demo, of a SmolLM2 shape, and of layers of a 1.1B shape, by
`examples/benchmarks/run.py check`, which also prints how well they hold.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_slta.checkpoints.plan import total_bytes
from mergekit_slta.data.batches import BATCH_TOKENS, Batch, plan_batches, plan_task_batches
from mergekit_slta.data.rows import Example
from mergekit_slta.generation.choices import BATCH_ROWS, OVERSAMPLING, num_needed
from mergekit_slta.job.job import Job
from mergekit_slta.libraries.torch import has_fast_bfloat16
from mergekit_slta.objectives.gradient_passes import GRADIENT_TOKENS
from mergekit_slta.objectives.sizes import Sizes
from mergekit_slta.runner.row_losses import measured_rows
from mergekit_slta.runtime.devices import is_here
from mergekit_slta.runtime.rates import EIGH, Phase

_WIDTHS, _INNERS, _SCORES, _LOGITS = 45.0, 8.0, 8.0, 10.0
"""How often a forward pass reads or writes a token's features [width], its MLP's features [inner width], a row's
attention scores [heads, s, s], and, where losses are computed, a token's logits, outside of products."""
_FORWARD, _DERIVATIVES, _GRAMS, _READ, _MERGE = 1200.0, 3000.0, 40.0, 150.0, 20.0
"""Operations, with the Python around them: of a layer's forward pass over a batch, of a layer's derivatives over a
batch, of a row's Gram matrix, of reading a tensor of a model, and of adding a tensor of a model to a merge."""
WRITING = "rows"
"""Name of the phase in which experts write rows."""
_STEP = 100.0
"""Operations of a layer for the next token of a batch of rows that are being written."""
_BACKWARD = 2.0
"""Work outside of products of a backward pass, in forward passes."""
_MERGED = 8.0
"""How often an element is read or written per model that is merged."""
_DOUBLES = 6.0
"""How often a closed form reads or writes an element of a task vector in float64."""


@dataclass(frozen=True)
class _Rows:
    """Rows as they run together.

    Attributes:
        tokens, answers: all tokens, and those that are predicted where losses are computed.
        squares: sum of the squares of the lengths.
        batches, rows: their numbers.
    """

    tokens: int
    answers: int
    squares: int
    batches: int
    rows: int


def _task_rows(examples: Sequence[Example], limit: int = GRADIENT_TOKENS) -> _Rows:
    ids, tasks = [example.row.ids for example in examples], [example.task for example in examples]
    return _rows(plan_task_batches(ids, tasks, limit), [len(e.row.ids) - e.row.completion for e in examples])


def _rows(batches: Sequence[Batch], answers: Sequence[int] = ()) -> _Rows:
    lengths = [length for batch in batches for length in batch.lengths]
    squares = sum(len(batch.lengths) * max(batch.lengths) ** 2 for batch in batches)
    return _Rows(sum(lengths), sum(answers), squares, len(batches), len(lengths))


class _Tally:
    """Adds up the work of a phase."""

    def __init__(self, name: str, sizes: Sizes) -> None:
        self._name, self._sizes, self._job = name, sizes, sizes.job
        settings = self._job.recipe.settings
        has_bfloat16 = settings.allows_bfloat16 and is_here(self._job.device) and has_fast_bfloat16(self._job.device)
        self._wide = settings.tensor_dtype
        self._layers = "bfloat16" if has_bfloat16 and name != "features" else self._wide
        self._flops: Counter[str] = Counter()
        self._touched = self._streamed = self._operations = self._read = 0.0

    def run(self, rows: _Rows, products: float, others: float | None = None) -> None:
        """Run rows through all layers: `products` times their products, `others` times everything else."""
        sizes, others = self._sizes, products if others is None else others
        depth, heads = len(sizes.layers), sizes.heads
        self._flops[self._layers] += products * rows.tokens * 2.0 * sum(sizes.layers)
        self._flops[self._wide] += others * rows.squares * depth * 4.0 * sizes.attention_width
        features = rows.tokens * (_WIDTHS * sizes.width + _INNERS * sizes.inner_width)
        self._touched += others * depth * sizes.item * (features + _SCORES * heads * rows.squares)
        self._operations += others * rows.batches * depth * _FORWARD

    def head(self, tokens: int, products: float, others: float) -> None:
        """Run tokens through the output projection."""
        size = self._sizes.parameters[self._sizes.head]
        self._flops[self._wide] += products * tokens * 2.0 * size
        self._streamed += others * tokens * _LOGITS * size / self._sizes.width * self._sizes.item

    def derivatives(self, rows: _Rows, losses: int) -> None:
        """Inner products with the task vectors of all models."""
        models, depth = self._sizes.models - 1, len(self._sizes.layers)
        self._flops[self._layers] += models * rows.tokens * 2.0 * sum(self._sizes.layers)
        outputs = 6 * self._sizes.width + 2 * self._sizes.inner_width
        self._touched += 4.0 * depth * rows.tokens * outputs * self._sizes.item * (models + losses)
        self._streamed += 5.0 * models * sum(self._sizes.parameters.values()) * self._sizes.item  # the task vectors
        self._operations += rows.batches * depth * _DERIVATIVES

    def grams(self, rows: _Rows, parts: float) -> None:
        """Differences of all models' outputs in `parts` submodules of a layer, and their products in float64."""
        models, depth = self._sizes.models - 1, len(self._sizes.layers)
        self._touched += rows.tokens * models * self._sizes.width * parts * depth * (3 * self._sizes.item + 3 * 8)
        self._operations += rows.rows * depth * parts * _GRAMS

    def read(self, count: float = 1, merges: float = 0, num_bytes: int | None = None) -> None:
        """Read every checkpoint `count` times, and merge `merges` models from them."""
        self._read += count * total_bytes(self._job.plan) if num_bytes is None else num_bytes
        parameters, models = self._sizes.parameters, self._sizes.models
        self._operations += (count * _READ + merges * _MERGE) * models * len(parameters)
        self._streamed += count * self._sizes.direction_bytes
        self._touched += merges * sum(parameters.values()) * self._sizes.item * (2 + _MERGED * (models - 1))

    def add(self, flops: dict[str, float], streamed: float) -> None:
        """Add other work."""
        self._flops.update(flops)
        self._streamed += streamed

    def phase(self, written: int = 0) -> Phase:
        """The phase."""
        return Phase(
            self._name, dict(self._flops), self._touched, self._streamed, self._operations, round(self._read), written
        )  # fmt: skip


def direction_phase(sizes: Sizes) -> list[Phase]:
    """Computing a closed form; nothing if there is none."""
    if sizes.job.recipe.closed_form is None:
        return []
    tally = _Tally("direction", sizes)
    tally.read(num_bytes=total_bytes(sizes.job.plan))
    elements = sum(sizes.parameters.values()) * len(sizes.job.experts)
    tally.add({EIGH: sizes.eigh_flops, "float64": sizes.combine_flops - sizes.eigh_flops}, _DOUBLES * 8 * elements)
    return [tally.phase()]


def features_phase(sizes: Sizes, examples: Sequence[Example], *, with_losses: bool = False) -> list[Phase]:
    """A pass of `features` over some rows, and the losses of its first rows."""
    tally, job, models = _Tally("features", sizes), sizes.job, sizes.models
    granularity = job.recipe.settings.granularity
    is_alone = granularity == "linear" and with_losses
    rows = _rows(plan_batches([example.row.ids for example in examples], 0 if is_alone else BATCH_TOKENS))
    tally.read()
    tally.run(rows, models)
    # The first step of `joint` has the weights of blocks.
    parts = len(job.submodules) / max(1, len(sizes.layers)) if with_losses else 2
    tally.grams(rows, parts)
    tally.head(rows.tokens, models, models)
    if with_losses and granularity != "model":
        beside = _task_rows([examples[row] for row in measured_rows(examples)], 0)
        count = 1 + job.recipe.settings.own.inputs_are_merged
        tally.run(beside, count)
        tally.head(beside.tokens, count, count)
    return [tally.phase()]


def steps_phase(sizes: Sizes, steps: Sequence[Sequence[Example]], *, draws: int, is_merged: bool) -> list[Phase]:
    """Derivatives of the losses of each step's rows, at a merged model or at the rows' experts."""
    tally, models = _Tally("steps", sizes), sizes.models - 1
    losses = draws + is_merged
    for examples in steps:
        rows = _task_rows(examples)
        tally.read(2, merges=2 * is_merged)
        if not is_merged:
            tally.read(num_bytes=total_bytes(sizes.job.plan, sizes.job.experts))
        forward = 2 + is_merged
        tally.run(rows, forward + losses, forward + _BACKWARD * losses)
        tally.derivatives(rows, losses)
        tally.head(rows.answers, 2 + 2 * is_merged + models, 2 + losses)
    return [tally.phase()]


@dataclass(frozen=True)
class Measured:
    """Models that are measured on some rows.

    Attributes:
        examples: the rows.
        merged: number of merged models.
        others: number of other models that the rows run through: the base, and each row's expert.
    """

    examples: Sequence[Example]
    merged: int
    others: int


def measuring_phase(sizes: Sizes, passes: Sequence[Measured]) -> list[Phase]:
    """Passes that measure models, each in one reading of the checkpoints."""
    tally = _Tally("measuring", sizes)
    for each in passes:
        rows, models = _task_rows(each.examples), each.merged + each.others
        tally.read(1, merges=each.merged)
        tally.run(rows, models)
        compared = models - (each.others > 1)  # with the row's expert
        tally.head(rows.answers, 2 * compared, 2 * compared)
    return [tally.phase()] * bool(passes)


def evaluation(sizes: Sizes) -> list[Measured]:
    """What is measured of a merge that no search has measured."""
    return [Measured(sizes.held_out, merged=1, others=2)] * bool(sizes.held_out)


def merge_phase(sizes: Sizes) -> list[Phase]:
    """mergekit's merge."""
    tally = _Tally("merge", sizes)
    tally.read(1, merges=1)
    return [tally.phase(sizes.written_bytes())]


def writing_phase(job: Job) -> list[Phase]:
    """The rows that experts have to write, as many and as long as they can be; empty if there are none.

    A step reads all weights of an expert for a token of each row of a batch. The base then runs the rows once.
    """
    planned = [drawn for drawn in job.rows if drawn is not None and drawn.is_planned]
    if not planned:
        return []
    settings = job.recipe.settings
    size, length = sum(map(math.prod, job.skeleton.shapes.values())), settings.max_seq_length
    rows = OVERSAMPLING * num_needed(settings) * len(planned)
    steps = len(planned) * math.ceil(rows / len(planned) / BATCH_ROWS) * length
    reads = total_bytes(job.plan) * (len(planned) + 1) // len(job.plan.models)
    return [
        Phase(
            WRITING,
            {settings.tensor_dtype: 2.0 * size * 2 * rows * length},
            streamed_bytes=float(steps * size * job.dtype.itemsize),
            operations=float(steps * job.skeleton.num_layers * _STEP),
            read_bytes=reads,
        )
    ]
