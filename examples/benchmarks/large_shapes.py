"""Time and memory of large models, as `check` predicts them on this machine, and what an H100 is expected to take.

`python examples/benchmarks/large_shapes.py WORKDIR [--threads N]` writes checkpoints that take no room on the disk
(sparse files with headers), asks for the costs of each recipe as `mergekit-slta check` does, and prints a table. Run it
while nothing else uses the machine: the rates are measured in about a second. No cell is measured by a merge.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from gpu_predict import COPIES, EIGHT_B, H100, ONE_B, SEVENTY_B, SHARES, STEPS, Work, features, joint
from mergekit.options import MergeOptions
from rendering import table
from run import machine
from workload import Shape, instruction_lengths, make, place

from mergekit_slta.job.forecast import forecast
from mergekit_slta.job.preflight import prepare
from mergekit_slta.objectives.registry import estimate
from mergekit_slta.recipe.load import as_config
from mergekit_slta.recipe.read import read_recipe

NUM_EXPERTS, NUM_ROWS, HELD_OUT = 3, 30, 30
OBJECTIVES: dict[str, dict[str, Any]] = {
    "features": {"num_samples": NUM_ROWS},
    "joint": {"objective": "joint", "granularity": "linear", "steps": STEPS, "num_samples": NUM_ROWS,
              "direction": "none"},
}  # fmt: skip
PREDICTED = {"features": (features, "float32"), "joint": (joint, "bfloat16")}


def line(folder: Path, shape: Shape, objective: str) -> list[str]:
    """Minutes and memory of one objective at one shape."""
    made = place(folder, shape, NUM_EXPERTS, "data")
    make(made, [instruction_lengths(STEPS * NUM_ROWS + HELD_OUT, task) for task in range(NUM_EXPERTS)], sparse=True)
    recipe = read_recipe(as_config(made.recipe(**OBJECTIVES[objective])))
    memory = {}
    for device in ("cuda", "cpu"):
        job = prepare(recipe, MergeOptions(quiet=True, device=device), for_merge=False, plan_only=True)
        costs = estimate(job)
        memory[device] = costs.peak_bytes
    seconds = forecast(job, costs.phases)
    assert seconds is not None
    work, kind = PREDICTED[objective]
    quick, slow = (
        Work.seconds(work(shape, NUM_EXPERTS, NUM_ROWS), share * H100[kind], copying)
        for share, copying in zip(SHARES, COPIES, strict=True)
    )
    calibrating = sum(value for name, value in seconds.items() if name != "merge")
    return [
        f"{shape.title}, {objective}", _time(calibrating), _time(seconds["merge"]), _gigabytes(memory["cpu"]),
        f"{_time(quick)} to {_time(slow)}", _gigabytes(memory["cuda"]), _gigabytes(costs.scratch_bytes),
    ]  # fmt: skip


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, metavar="WORKDIR")
    parser.add_argument("--threads", type=int, default=1, help="of torch  [default: 1]")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)  # models without weights are all equal
    about = machine()
    print(
        f"Predicted, not measured: base and {NUM_EXPERTS} experts in bfloat16, {NUM_ROWS} rows per task of 40 to 300 "
        f"tokens. `joint` has {STEPS} steps with {NUM_ROWS} rows per task each, and `direction: none`. On this CPU "
        f"({about['CPU']}, {options.threads} threads, torch {about['torch']}) by `check`, with checkpoints in the page "
        f"cache; on an H100 by `gpu_predict.py`, products at {SHARES[0]:.0%} to {SHARES[1]:.0%} of its rate. Memory is "
        "that of the process without the libraries.\n"
    )
    header = [
        "",
        "calibration, CPU",
        "merge, CPU",
        "memory, CPU",
        "calibration, H100",
        "memory, GPU",
        "scratch on disk",
    ]
    shapes = (ONE_B, EIGHT_B, SEVENTY_B)
    print(table(header, [line(options.workdir, shape, name) for shape in shapes for name in OBJECTIVES]))


if __name__ == "__main__":
    main()
