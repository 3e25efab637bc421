"""Memory: flat in the number of layers, measured as anonymous memory in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROBE = """
import json, sys, threading
from mergekit_slta import calibrate
from mergekit.options import MergeOptions
import transformers.models.llama.modeling_llama, datasets, torch
torch.set_num_threads(1)
peak, stop = 0, threading.Event()

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def watch():
    global peak
    while not stop.wait(0.002):
        peak = max(peak, anonymous())

start = anonymous()
thread = threading.Thread(target=watch)
thread.start()
if len(sys.argv) > 2:
    from mergekit.config import MergeConfiguration
    from mergekit_slta.analysis.analyse import analyse
    from mergekit_slta.job.preflight import prepare
    from mergekit_slta.recipe.read import read_recipe
    from pathlib import Path
    recipe = read_recipe(MergeConfiguration.model_validate(json.loads(sys.argv[1])))
    analyse(prepare(recipe, MergeOptions(quiet=True)), Path(sys.argv[2]))
else:
    calibrate(json.loads(sys.argv[1]), MergeOptions(quiet=True))
stop.set()
thread.join()
print(json.dumps({"start": start, "peak": peak}))
"""


def peak_of(recipe: dict, *arguments: str) -> dict[str, int]:
    """Anonymous bytes of a calibration (or, with a file to write, of a linearity analysis)."""
    command = [sys.executable, "-c", PROBE, json.dumps(recipe), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def large(make_models, layers: int, num_experts: int):
    return make_models(
        "llama", num_experts=num_experts, num_layers=layers, hidden_size=384, intermediate_size=1024,
        dtype=torch.bfloat16, shard="40MB",
    )  # fmt: skip


on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")


@on_linux
def test_peak_does_not_grow_with_layers(make_models):
    """24 layers peak less than 10% above 6; held together, their weights alone would add a multiple of that."""
    peaks = {}
    for layers in (6, 24):
        peaks[layers] = peak_of(large(make_models, layers, 1).recipe(num_samples=8))
    weights = 18 * (2 * 384 * 384 + 2 * 384 * 192 + 3 * 384 * 1024) * 4 * 2  # 18 more layers, float32, 2 models
    assert weights > 0.4 * peaks[6]["peak"]  # the claim could fail
    assert peaks[24]["peak"] < 1.1 * peaks[6]["peak"], peaks


@on_linux
def test_linearity_peaks_little_above_a_calibration(make_models, tmp_path):
    """24 layers: at most 1.5 times the anonymous memory."""
    recipe = large(make_models, 24, 1).recipe(num_samples=2)
    calibration = peak_of(recipe)
    analysis = peak_of(recipe, str(tmp_path / "linearity.json"))
    assert analysis["peak"] < 1.5 * calibration["peak"], (calibration, analysis)
