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
calibrate(json.loads(sys.argv[1]), MergeOptions(quiet=True))
stop.set()
thread.join()
print(json.dumps({"start": start, "peak": peak}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_peak_does_not_grow_with_layers(make_models):
    """24 layers peak less than 10% above 6; held together, their weights alone would add a multiple of that."""
    peaks = {}
    for layers in (6, 24):
        models = make_models(
            "llama", num_experts=1, num_layers=layers, hidden_size=384, intermediate_size=1024, dtype=torch.bfloat16,
            shard="40MB",
        )  # fmt: skip
        recipe = models.recipe(num_samples=8)
        done = subprocess.run([sys.executable, "-c", PROBE, json.dumps(recipe)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks[layers] = json.loads(done.stdout)
    weights = 18 * (2 * 384 * 384 + 2 * 384 * 192 + 3 * 384 * 1024) * 4 * 2  # 18 more layers, float32, 2 models
    assert weights > 0.4 * peaks[6]["peak"]  # the claim could fail
    assert peaks[24]["peak"] < 1.1 * peaks[6]["peak"], peaks
