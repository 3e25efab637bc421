"""The arithmetic that predicts times on a GPU: operations over a share of a rate, bytes over a rate of copying.

Scope: pure functions of shapes and rows; nothing is read, torch is not imported. Operations and bytes are those that
`mergekit-slta check` prints (a test compares them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rendering import table
from workload import LARGE, SMALL, Shape, instruction_lengths

ONE_B = LARGE
EIGHT_B = Shape("8b", "Llama-3-8B shape", 128256, 4096, 14336, 32, 32, 8, tied=False, shard_bytes=2_000_000_000)
SEVENTY_B = Shape("70b", "Llama-3-70B shape", 128256, 8192, 28672, 80, 64, 8, tied=False)
SHAPES = {"small": SMALL, "1b": ONE_B, "8b": EIGHT_B, "70b": SEVENTY_B}
STEPS = 6
"""Steps of `joint` that its time is told for; `steps: auto` takes 12 at most."""
HELD_OUT, MEASURED_ROWS, LABELS = 30, 10, 2
"""Rows that are held out of each task, rows of each task whose losses `features` measures, and label draws of `joint`:
defaults of the package."""
FIRST_TRIALS, LATER_TRIALS = 5, 3
"""Ridges that `joint` tries in its first step, and in each later one."""
H100 = {"float32": 67e12, "tf32": 495e12, "bfloat16": 989e12, "float64": 67e12}
"""Operations per second of an H100's data sheet, without sparsity."""
SHARES = (0.5, 0.2)
"""Shares of these rates that products may reach: the quick and the slow end of a prediction."""
EIGEN_SHARES = (0.06, 0.02)
"""The same of eigenproblems, which are mostly products of a matrix with a vector."""
COPIES = (50e9, 10e9)
"""Bytes per second from the page cache to the GPU, and back: pinned over PCIe 5, and pageable by one thread."""
EIGEN_FLOPS = 10.0
"""Operations of a symmetric eigenproblem of size n over n^3."""


@dataclass(frozen=True)
class Work:
    """What a phase has to do.

    Attributes:
        flops: operations of its matrix products.
        nbytes: bytes of checkpoints that it reads (and, in a merge, writes).
    """

    flops: float
    nbytes: float

    def seconds(self, rate: float, copying: float) -> float:
        """One after the other: nothing is hidden behind anything else."""
        return self.flops / rate + self.nbytes / copying


def _tokens(experts: int, rows: int, seed: int = 0) -> int:
    return sum(sum(instruction_lengths(rows, seed + task)) for task in range(experts))


def features(shape: Shape, experts: int, rows: int) -> Work:
    """`objective: features` at attention and MLP blocks: every row through every model, and some rows of each task
    through their expert once more; all checkpoints are read once."""
    per_task = [instruction_lengths(rows, task) for task in range(experts)]
    tokens = (experts + 1) * sum(map(sum, per_task)) + sum(sum(own[:MEASURED_ROWS]) for own in per_task)
    return Work(tokens * 2.0 * shape.multiplied(), (experts + 1) * shape.model_bytes())


def joint(shape: Shape, experts: int, rows: int, steps: int = STEPS, held_out: int = HELD_OUT) -> Work:
    """`objective: joint` without a direction, with `rows` rows of each task in every step.

    The first step's rows through every model, for `features`. In each step its rows through their expert, forward
    through the merge, forward again and back for each loss (the divergence and the labels), and the products with every
    task vector. The held-out rows through their expert, three starting points, and each trial.
    """
    mean = _tokens(experts, 100) / 100  # of a row of each task
    trials = FIRST_TRIALS + (steps - 1) * LATER_TRIALS
    measured = mean * ((held_out + 1) // 2)
    tokens = mean * rows * (experts + 1 + steps * (3 + 1 + LABELS + experts)) + measured * (4 + trials)
    return Work(tokens * 2.0 * shape.multiplied(), (2 + 3 * steps) * (experts + 1) * shape.model_bytes())


def merge(shape: Shape, experts: int) -> Work:
    """The merge with weights at hand: all checkpoints are read, one is written."""
    return Work(0.0, (experts + 2) * shape.model_bytes())


def eigenproblems(shape: Shape, experts: int) -> list[tuple[int, int]]:
    """(count, size) of the symmetric eigenproblems of the direction `swudi_a`."""
    return [(count, min(inputs, experts * outputs)) for count, inputs, outputs in shape.matrices()] + (
        [] if shape.tied else [(1, shape.hidden)]
    )


def direction(shape: Shape, experts: int) -> Work:
    """The eigenproblems of the direction alone."""
    flops = sum(count * EIGEN_FLOPS * float(size) ** 3 for count, size in eigenproblems(shape, experts))
    return Work(flops, (experts + 1) * shape.model_bytes())


def eigen_seconds(shape: Shape, experts: int, measured: dict[int, float]) -> float:
    """Seconds of the direction's eigenproblems, from the largest that was measured, by the cube of the size."""
    size, seconds = max(measured.items())
    return sum(count * seconds * (own / size) ** 3 for count, own in eigenproblems(shape, experts))


def extrapolated(short: Sequence[tuple[float, Work]], real: Work) -> dict[str, float | None]:
    """Seconds of the real run from those of short ones.

    Time is a sum of a part that grows as operations do and a part that grows as bytes do: so its ratio is between those
    two ratios. Two short runs of the same bytes tell the parts apart.

    Args:
        short: seconds and work of one or two short runs; the first has the fewest operations.
        real: work of the real run.

    Returns:
        low, high: limits; best: from two runs, None from one or if noise was larger than their difference.
    """
    seconds, work = short[0]
    ratios = real.flops / work.flops, real.nbytes / work.nbytes
    best = None
    if len(short) > 1:
        slope = (short[1][0] - seconds) / (short[1][1].flops - work.flops)
        rest = seconds - slope * work.flops
        if slope > 0 and rest > 0:
            best = slope * real.flops + rest * ratios[1]
    return {"low": seconds * min(ratios), "high": seconds * max(ratios), "best": best}


AIMS = {("8b", "features"): 180.0, ("8b", "joint"): 900.0}


def prediction(experts: int, rows: int) -> str:
    """Markdown: what an H100 is expected to take."""
    header = ["phase", "precision", "TFLOP", "GB", f"products at {SHARES[0]:.0%} to {SHARES[1]:.0%}: s",
              f"copies at {COPIES[0] / 1e9:.0f} to {COPIES[1] / 1e9:.0f} GB/s: s", "in all: s", "aim: s"]  # fmt: skip
    lines = []
    for name in ("1b", "8b", "70b"):
        shape = SHAPES[name]
        phases = [
            ("features", "float32", features(shape, experts, rows), SHARES),
            ("features", "tf32", features(shape, experts, rows), SHARES),
            ("joint", "tf32", joint(shape, experts, rows), SHARES),
            ("joint", "bfloat16", joint(shape, experts, rows), SHARES),
            ("direction", "float64", direction(shape, experts), EIGEN_SHARES),
            ("merge", "-", merge(shape, experts), SHARES),
        ]
        for phase, precision, work, shares in phases:
            rate = H100.get(precision, H100["float32"])
            products = [work.flops / (share * rate) for share in shares]
            copies = [work.nbytes / copying for copying in COPIES]
            aim = AIMS.get((name, phase))
            lines.append([
                f"{shape.title}: {phase}", precision, _number(work.flops / 1e12), _number(work.nbytes / 1e9),
                _range(products), _range(copies), _range([sum(pair) for pair in zip(products, copies, strict=True)]),
                "" if aim is None else f"{aim:.0f}",
            ])  # fmt: skip
    note = (
        f"Predicted, not measured: one H100, base and {experts} experts, {rows} rows per task of 40 to 300 tokens, "
        f"checkpoints in the page cache. `joint` has {STEPS} steps with {rows} rows per task each, {HELD_OUT} held-out "
        f"rows per task, and `direction: none`; `direction` is what `swudi_a` adds, with eigenproblems at "
        f"{EIGEN_SHARES[0]:.0%} to {EIGEN_SHARES[1]:.0%} of the rate. Rates by the data sheet: "
        + ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in H100.items())
        + " TFLOP/s. No work is hidden behind other work; checks, launches of kernels, solves and Python are left out."
    )
    return f"# What an H100 is expected to take\n\n{note}\n\n{table(header, lines)}"


def _range(values: Sequence[float]) -> str:
    quick, slow = values
    return f"{_number(quick)} to {_number(slow)}" if slow else "0"


def _number(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"
