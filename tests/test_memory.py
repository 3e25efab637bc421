"""Memory: flat in the number of layers, measured as anonymous memory in a process of its own."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from conftest import fork
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_slta.analysis.analyse import analyse
from mergekit_slta.calibration.calibrate import calibrate
from mergekit_slta.job.preflight import prepare
from mergekit_slta.recipe.read import read_recipe
from mergekit_slta.runtime.devices import trim_heap


def anonymous() -> int:
    """Bytes of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def record_calls(recipe: dict, target: str | None) -> None:
    """Print the peak of a calibration, or of a linearity analysis with a file to write."""
    peak, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.002):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    if target is None:
        calibrate(recipe, MergeOptions(quiet=True))
    else:
        job = prepare(read_recipe(MergeConfiguration.model_validate(recipe)), MergeOptions(quiet=True))
        analyse(job, Path(target))
    stop.set()
    thread.join()
    print(json.dumps(peak))


def peak_of(recipe: dict, folder: Path, target: str | None = None) -> int:
    done = fork(record_calls, recipe, target, cwd=folder).ended()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def hold_and_free() -> None:
    """Print the memory that is held after many small blocks are freed, before and after the heap is trimmed."""
    blocks = [torch.ones(2**14) for _ in range(3000)]  # 64 KiB each: below the size that the system gets back at once
    last = torch.ones(2**14)  # the end of the heap is in use
    blocks.clear()
    before = anonymous()
    trim_heap()
    print(json.dumps([before, anonymous(), len(last)]))


def test_freed_memory_is_given_back(tmp_path):
    done = fork(hold_and_free, cwd=tmp_path).ended()
    before, after, _ = json.loads(done.stdout)
    assert after < before - 100 * 2**20, (before, after, done.stderr)


def large(make_models, layers: int, num_experts: int):
    return make_models(
        "llama", num_experts=num_experts, num_layers=layers, hidden_size=384, intermediate_size=1024,
        dtype=torch.bfloat16, shard="40MB",
    )  # fmt: skip


on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")


pytestmark = [on_linux, pytest.mark.process]


@pytest.fixture(scope="module")
def peaks(make_models, tmp_path_factory) -> dict[int, int]:
    """Layers -> the peak of a calibration."""
    folder = tmp_path_factory.mktemp("peaks")
    return {layers: peak_of(large(make_models, layers, 1).recipe(num_samples=2), folder) for layers in (6, 24)}


def test_peak_does_not_grow_with_layers(peaks):
    """24 layers peak less than 10% above 6; held together, their weights alone would add a multiple of that."""
    weights = 18 * (2 * 384 * 384 + 2 * 384 * 192 + 3 * 384 * 1024) * 4 * 2  # 18 more layers, float32, 2 models
    assert weights > 0.4 * peaks[6]  # the claim could fail
    assert peaks[24] < 1.1 * peaks[6], peaks


def test_linearity_peaks_little_above_a_calibration(peaks, make_models, tmp_path):
    """24 layers: at most 1.5 times the anonymous memory."""
    analysis = peak_of(large(make_models, 24, 1).recipe(num_samples=2), tmp_path, "linearity.json")
    assert analysis < 1.5 * peaks[24], (analysis, peaks)
