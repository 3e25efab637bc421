"""The jobs of the GPU check, each in a process of its own: `gpu_jobs.py REQUEST RESULT`; `jobs.py` says more.

Scope: what is measured on a device, by what users do: `mergekit_slta.calibrate`, `mergekit-slta check`, and mergekit's
`run_merge`. A job's arguments and its values are JSON; `device` is "cuda" or "cpu".
"""

from __future__ import annotations

import re
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jobs
from jobs import PACKAGE, TRANSFORMERS, checked, profile_of
from measure import Clock
from workload import RandomBlock, from_mapping
from workload import make as make_models

MIN_SECONDS = 0.3
"""A rate is measured for at least so long."""
_SYNCHRONIZES = "synchronizing CUDA operation"


def make(clock: Clock, device: str, made: list[tuple[dict[str, Any], list[list[int]]]], writers: int) -> dict[str, Any]:
    """Checkpoints of one shape, and data files.

    Args:
        device: where the weights are made.
        made: workloads of the same models with data of their own, and their rows' lengths.
        writers: checkpoints that are written at a time.
    """
    tensor = RandomBlock(device)
    with clock.phase("work"):
        for mapping, lengths in made:
            make_models(from_mapping(mapping), lengths, tensor, writers)
    return {}


def probe(clock: Clock, device: str, models: str, size: int, copied: int, eigen: list[int]) -> dict[str, Any]:
    """The device's own rates, to compare with.

    Args:
        models: folder of the models.
        size: of the square matrices that are multiplied.
        copied: bytes of a copy.
        eigen: sizes of symmetric eigenproblems in float64.

    Returns:
        flops_per_second: "float32", "tf32", ... -> rate of matrix products; bytes_per_second: of copies; eigen_seconds:
        size -> seconds.
    """
    import torch

    rates = {}
    with clock.phase("work"):
        for name, dtype, precision in (
            ("float32", torch.float32, "highest"), ("tf32", torch.float32, "high"),
            ("bfloat16", torch.bfloat16, "highest"), ("float64", torch.float64, "highest"),
        ):  # fmt: skip
            if name == "tf32" and device == "cpu":
                continue
            if device == "cuda":
                torch.set_float32_matmul_precision(precision)
            left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            into = torch.empty_like(left)
            rates[name] = 2.0 * size**3 / _seconds(device, lambda a=left, b=right, c=into: torch.mm(a, b, out=c))
            del left, right, into
        symmetric = {n: torch.randn(n, n, device=device, dtype=torch.float64) for n in (64, *eigen)}
        solves = {n: _once(device, lambda a=a: torch.linalg.eigh(a @ a.T)) for n, a in symmetric.items()}
        copies = _copies(device, Path(models), copied)
    return {
        "flops_per_second": rates, "bytes_per_second": copies,
        "eigen_seconds": {n: solves[n] for n in eigen}, **_device(device),
    }  # fmt: skip


def _copies(device: str, folder: Path, size: int) -> dict[str, float]:
    """Bytes per second from memory and from a mapped file to the device, and back."""
    import torch
    from safetensors.torch import load_file, save_file

    host = torch.randint(0, 255, (size,), dtype=torch.uint8)
    there = torch.empty_like(host, device=device)
    found = {
        "memory to device": size / _seconds(device, lambda: there.copy_(host)),
        "device to memory": size / _seconds(device, lambda: host.copy_(there)),
    }
    if device != "cpu":
        pinned = host.pin_memory()
        found["pinned memory to device"] = size / _seconds(device, lambda: there.copy_(pinned, non_blocking=True))
        found["device to pinned memory"] = size / _seconds(device, lambda: pinned.copy_(there, non_blocking=True))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "probe.safetensors"
    try:
        found["memory to a file"] = size / _once("cpu", lambda: save_file({"bytes": host}, file))
        found["file to device"] = size / _seconds(device, lambda: there.copy_(load_file(file)["bytes"]))
    finally:
        file.unlink(missing_ok=True)
    return found


def _once(device: str, call: Callable[[], Any]) -> float:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _seconds(device: str, call: Callable[[], Any]) -> float:
    """Median of several calls, after two to warm up."""
    for _ in range(2):
        call()
    found: list[float] = []
    while len(found) < 3 or (sum(found) < MIN_SECONDS and len(found) < 100):
        found.append(_once(device, call))
    return statistics.median(found)


@contextmanager
def phases_noted() -> Iterator[list[tuple[str, float]]]:
    """Yield a list that gets each phase of a progress bar inside the context: "title (parts)", and its seconds."""
    from unittest.mock import patch

    from mergekit_slta.runtime.progress import Progress

    found: list[tuple[str, float]] = []
    begun: list[tuple[str, float]] = []
    begin, end = Progress.begin, Progress.__exit__

    def finish() -> None:
        while begun:
            title, since = begun.pop()
            found.append((title, time.monotonic() - since))

    def noted_begin(self: Progress, phase: str, total: int) -> None:
        finish()
        begun.append((f"{phase} ({total})", time.monotonic()))
        begin(self, phase, total)

    def noted_end(self: Progress, *error: Any) -> None:
        end(self, *error)
        finish()

    with patch.object(Progress, "begin", noted_begin), patch.object(Progress, "__exit__", noted_end):
        yield found


@contextmanager
def _on(device: str) -> Iterator[dict[str, Any]]:
    """Yield a mapping that gets the peaks of memory inside the context."""
    import torch

    if device == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {}
    yield found
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found["peak_resident"] = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024
    found |= _device(device)
    if device == "cuda":
        found["peak_device"] = torch.cuda.max_memory_allocated()
        found["peak_device_reserved"] = torch.cuda.max_memory_reserved()
        pinned = getattr(torch.cuda, "host_memory_stats", dict)()  # torch >= 2.8
        found["peak_pinned"] = pinned.get("allocated_bytes.peak")


def _device(device: str) -> dict[str, Any]:
    import torch

    return {"device": torch.cuda.get_device_name() if device == "cuda" else "CPU"}


def _calibrated(recipe: dict[str, Any], device: str, *, quiet: bool = True) -> Any:
    from mergekit.options import MergeOptions

    import mergekit_slta

    return mergekit_slta.calibrate(recipe, MergeOptions(device=device, quiet=quiet))


def calibrate(
    clock: Clock, recipe: dict[str, Any], device: str, real: dict[str, Any] | None = None, save: str | None = None,
    profiled: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A calibration; the alphas in `save`, if asked for.

    Args:
        real: the recipe that this one stands for.
        profiled: under cProfile.

    Returns:
        predicted, real: what `check` predicts of the two; bars: each phase and its seconds; peaks of memory.
    """
    found: dict[str, Any] = {"predicted": checked(clock, recipe, "--device", device)}
    if real is not None:
        found["real"] = checked(clock, real, "--device", device, phase="check of the real one")
    kept: list[Any] = []
    with _on(device) as peaks, clock.phase("work"), phases_noted() as bars:
        if profiled:
            found["profile"] = profile_of(lambda: kept.append(_calibrated(recipe, device, quiet=False)))
        else:
            kept.append(_calibrated(recipe, device, quiet=False))
    if save:
        kept[0].save(save)
    return {**found, **peaks, "bars": bars}


def compare(clock: Clock, recipes: Mapping[str, dict[str, Any]], device: str) -> dict[str, Any]:
    """Calibrations in turn, each a phase.

    Returns:
        alphas: the recipe's name -> submodule -> its weights; peaks of memory.
    """
    alphas = {}
    with _on(device) as peaks:
        for name, recipe in recipes.items():
            with clock.phase(name):
                found = _calibrated(recipe, device)
            alphas[name] = {entry.name: list(entry.alpha) for entry in found.submodules}
    return {"alphas": alphas, **peaks}


def merge(clock: Clock, recipe: dict[str, Any], out: str, device: str) -> dict[str, Any]:
    """mergekit's `run_merge` with `--cuda`; returns peaks of memory."""
    with _on(device) as peaks:
        jobs.merge(clock, recipe, out, device)
    return peaks


def synchronizations(clock: Clock, recipes: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Count how often calibrations on a GPU wait for it: "file:line function" of the package -> times."""
    import torch

    _calibrated(next(iter(recipes.values())), "cuda")  # what is loaded once does not count
    counted = {}
    for name, recipe in recipes.items():
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with clock.phase(name), counted_synchronizations() as found:
                _calibrated(recipe, "cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counted[name] = dict(found)
    return {"counted": counted, **_device("cuda")}


@contextmanager
def counted_synchronizations(package: str = "mergekit_slta") -> Iterator[Counter[str]]:
    """Count torch's warnings of synchronizations inside the context, by the innermost line of the package."""
    counts: Counter[str] = Counter()

    def count(message: Warning | str, *_: Any, **__: Any) -> None:
        if _SYNCHRONIZES not in str(message):
            return
        frame: Any = sys._getframe(1)
        while frame is not None and package not in Path(frame.f_code.co_filename).parts:
            frame = frame.f_back
        if frame is None:
            counts["elsewhere"] += 1
        else:
            path = Path(frame.f_code.co_filename)
            counts[f"{path.parent.name}/{path.name}:{frame.f_lineno} {frame.f_code.co_name}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        yield counts


JOBS: jobs.Jobs = {
    "make": (make, TRANSFORMERS),
    "probe": (probe, ("torch",)),
    "calibrate": (calibrate, PACKAGE),
    "compare": (compare, PACKAGE),
    "merge": (merge, PACKAGE),
    "synchronizations": (synchronizations, PACKAGE),
}
"""Name -> the job, and what is imported before it."""

if __name__ == "__main__":
    jobs.main(JOBS)
