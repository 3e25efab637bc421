"""The scripts of examples/, run in this process, where the imports are paid."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
BENCHMARKS = EXAMPLES / "benchmarks"
BENCHMARK_MARKS = [
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc"),
    pytest.mark.example,
]


@contextmanager
def importable(*folders: Path) -> Iterator[None]:
    """Let the scripts of folders be imported by their bare names. Modules that other examples' scripts have imported by
    the same names are given back in the end."""
    names = {path.stem for folder in folders for path in folder.glob("*.py")}
    before, path = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}, list(sys.path)
    sys.path[:0] = map(str, folders)
    try:
        yield
    finally:
        sys.path[:] = path
        for name in names & sys.modules.keys():
            del sys.modules[name]
        sys.modules.update(before)


def run_here(jobs: Mapping[str, tuple[Callable, ...]], job: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What a benchmark's job gives, without a process of its own."""
    import measure

    clock = measure.Clock()
    values = json.loads(json.dumps(jobs[job][0](clock, **json.loads(json.dumps(arguments)))))
    for phase in clock.phases.values():
        measure.add_peaks(phase, [])
    return {"import_seconds": 1.0, "phases": clock.phases, "values": values}
