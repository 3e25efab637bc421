"""Jobs in processes of their own: seconds by phase, peaks of anonymous memory, and ratios over paired repeats.

Scope: standard library only, and Linux only (memory is read from /proc). Anonymous memory is what a process holds; the
rest of the resident memory is pages of mapped checkpoint files, which the system takes back when it needs them. The
job marks its phases on the clock that all processes share, the parent takes the samples: nothing runs in the job
beside what is measured.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

JOBS = Path(__file__).resolve().parent / "jobs.py"
SAMPLE_SECONDS = 0.002
Sample = tuple[float, int, int]
"""(time.monotonic(), anonymous bytes, file-backed bytes)."""


class BenchmarkError(Exception):
    """A benchmark could not be run, or its outcome is wrong; one line."""


def resident(status: bytes) -> tuple[int, int]:
    """(anonymous, file-backed) resident bytes in the text of a /proc/PID/status."""

    def field_of(key: bytes) -> int:
        start = status.find(key)
        return int(status[start + len(key) :].split(None, 1)[0]) * 1024 if start >= 0 else 0

    return field_of(b"RssAnon:"), field_of(b"RssFile:")


@dataclass
class Clock:
    """The phases of a job, as it marks them itself; they may lie in each other."""

    phases: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase, and note the anonymous memory before and after it."""
        anonymous = [resident(Path("/proc/self/status").read_bytes())[0]]
        processor, begin = time.process_time(), time.monotonic()
        yield
        end = time.monotonic()
        processor = time.process_time() - processor
        anonymous.append(resident(Path("/proc/self/status").read_bytes())[0])
        self.phases[name] = {
            "begin": begin, "end": end, "seconds": end - begin, "cpu_seconds": processor,
            "anonymous_before": anonymous[0], "anonymous_after": anonymous[1],
        }  # fmt: skip


def run_job(
    job: str, *, folder: Path, threads: int, tree: Path | None = None, script: Path | None = None, **arguments: Any
) -> dict[str, Any]:
    """Run a job in a process of its own.

    Args:
        job: its name.
        folder: for temporary files, and for the caches of the libraries.
        threads: of the matrix products.
        tree: a source tree of the package that the job is to import, in the place of the installed one.
        script: the file that has the job, `jobs.py` by default.
        arguments: the job's own.

    Returns:
        `import_seconds`; `phases`: name -> seconds, cpu_seconds, anonymous_before, peak_anonymous, peak_file (bytes);
        `values`: what the job returned.

    Raises:
        BenchmarkError: the job failed (with the end of what it printed), or it imported the package from elsewhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        request = json.dumps({"job": job, "threads": threads, "arguments": arguments})
        target, log = Path(temporary) / "result.json", Path(temporary) / "log.txt"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, str(script or JOBS), request, str(target)],
                stdout=file, stderr=subprocess.STDOUT, env=environment(folder, threads, tree),
            )  # fmt: skip
            try:
                samples = _watch(process)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if process.returncode != 0:
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise BenchmarkError(f"the job {job} ended with exit code {process.returncode}: " + "\n".join(said[-15:]))
        result = json.loads(target.read_text(encoding="utf-8"))
    if tree is not None and Path(result["package"]).parent != tree:
        raise BenchmarkError(f"the job {job} imported {result['package']}, not the package in {tree}")
    for phase in result["phases"].values():
        add_peaks(phase, samples)
    return result


def environment(folder: Path, threads: int, tree: Path | None = None) -> dict[str, str]:
    """A job's environment: no network, caches in the work folder, so many threads, and the package of a tree."""
    paths = [str(tree)] if tree else []
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return {
        **os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(paths),
    }  # fmt: skip


def _watch(process: subprocess.Popen) -> list[Sample]:
    samples: list[Sample] = []
    with open(f"/proc/{process.pid}/status", "rb", buffering=0) as status:
        while process.poll() is None:
            status.seek(0)
            try:
                anonymous, file = resident(status.read())
            except ProcessLookupError:  # it has ended between the two lines
                break
            samples.append((time.monotonic(), anonymous, file))
            time.sleep(SAMPLE_SECONDS)
    process.wait()
    return samples


def add_peaks(phase: dict[str, float], samples: Sequence[Sample]) -> None:
    """Put the peaks of a phase in the place of its time marks."""
    begin, end = phase.pop("begin"), phase.pop("end")
    inside = [sample for sample in samples if begin <= sample[0] <= end]
    edges = [phase["anonymous_before"], phase.pop("anonymous_after")]
    phase["peak_anonymous"] = max([*edges, *(anonymous for _, anonymous, _ in inside)])
    phase["peak_file"] = max([0, *(file for _, _, file in inside)])


def above_imports(phases: dict[str, dict[str, float]], phase: str = "work") -> float:
    """Bytes of anonymous memory at the peak of a phase above those after the imports, where the first phase begins."""
    return phases[phase]["peak_anonymous"] - min(each["anonymous_before"] for each in phases.values())


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and greatest, and the values themselves."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": list(values)}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Of each round's pair, so that what slows a whole round down cancels; then their spread."""
    return spread([one / other for one, other in zip(ours, theirs, strict=True)])


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third; of one value, itself."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third
