"""The GPU check: `features`, `joint` and the merge of random 1B and 8B Llama shapes on a GPU, in short parts.

    python examples/benchmarks/gpu.py WORKDIR [--device cuda] [--shapes small 1b 8b] [--experts N] [--models DIR]
                                              [--rows N] [--budget SECONDS]
    python examples/benchmarks/gpu.py WORKDIR --device cpu --quick --threads 1
    python examples/benchmarks/gpu.py --predict

Each part is a few processes, and leaves WORKDIR/parts/NAME.json as soon as it is done; a part that is there is not run
again. WORKDIR/gpu.md and gpu.json have all of them. No network is needed. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_parts import Check, Part, parts
from gpu_predict import prediction
from gpu_room import NUM_EXPERTS
from gpu_tables import document
from measure import BenchmarkError
from run import kept, log, machine, write_json, write_text

SHAPES = ("small", "1b", "8b")
RAM_DISK = Path("/dev/shm/mergekit-slta-gpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are not there yet and expected to fit; write the tables. Returns the exit code."""
    options = _options(arguments)
    if options.predict:
        print(prediction(options.experts or NUM_EXPERTS, options.rows))
        return 0
    folder = options.workdir.absolute()
    settings = {
        key: getattr(options, key) for key in ("device", "quick", "rows", "experts", "direction", "threads", "profiled")
    }
    candidates = [options.models.absolute()] if options.models else [RAM_DISK, folder]
    check = Check(folder, candidates, log=log, **settings)
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    begin, failed, left_out = time.monotonic(), False, {}
    chosen = [part for part in parts(options.shapes) if not options.only or part.name in options.only]
    found = _earlier(folder / "parts", settings, {part.name for part in chosen})
    try:
        for number, part in enumerate(chosen):
            path = folder / "parts" / f"{part.name}.json"
            try:
                own = None if options.again else kept(path, settings)
                if own is None:
                    left = options.budget - (time.monotonic() - begin)
                    own = _run(check, part, left)
                    write_json(path, {"settings": settings, "machine": machine(), "found": own})
                found[part.name] = own
            except _TooLongError as error:
                left_out[part.name] = str(error)
                log(f"{part.name}: left out: {error}")
            except BenchmarkError as error:
                left_out[part.name], failed = f"failed: {str(error).splitlines()[-1]}", True
                log(f"error: {part.name}: {error}")
                if part.name == "probe":  # there is no such device
                    return 1
            later = {each.shape for each in chosen[number + 1 :]}
            if part.shape and part.shape not in later and not options.keep:
                check.forget(part.shape)
            _write_results(folder, settings, found, left_out, check)
    finally:
        if not options.keep:
            for name in [*check.rooms]:
                check.forget(name)
            with suppress(OSError):  # not made, or not empty
                RAM_DISK.rmdir()
    print((folder / "gpu.md").read_text(encoding="utf-8"))
    return 1 if failed else 0


def _earlier(folder: Path, settings: dict[str, Any], chosen: set[str]) -> dict[str, Any]:
    """What earlier runs with these settings have found of the parts that are not asked for now."""
    found = {}
    for part in parts(SHAPES):
        path = folder / f"{part.name}.json"
        if part.name not in chosen and path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["settings"] == settings:
                found[part.name] = content["found"]
    return found


class _TooLongError(Exception):
    """A part is not expected to fit; the message is why."""


def _run(check: Check, part: Part, left: float) -> dict[str, Any]:
    expected = part.expected_seconds(check)
    if expected > left:
        raise _TooLongError(f"about {expected:.0f} s expected at most, {max(0.0, left):.0f} s left of --budget")
    log(f"{part.name} ... ({expected:.0f} s at most expected)")
    begin = time.monotonic()
    found = part.run(check, part.shape or "")
    seconds = time.monotonic() - begin
    log(f"{part.name}: {seconds:.0f} s in all")
    return {**found, "part_seconds": seconds}


def _write_results(
    folder: Path, settings: dict[str, Any], found: dict[str, Any], left_out: dict[str, str], check: Check
) -> None:
    device = next((part["device"] for part in found.values() if "device" in part), None)
    about = {**machine(), "GPU": device if check.device == "cuda" else None, **settings}
    shapes = {name: check.shape(name) for name in SHAPES}
    found = {part.name: found[part.name] for part in parts(SHAPES) if part.name in found}
    write_json(folder / "gpu.json", {"machine": machine(), "settings": settings, "parts": found, "left_out": left_out})
    write_text(folder / "gpu.md", document(about, found, left_out, shapes))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, nargs="?", metavar="WORKDIR")
    parser.add_argument("--predict", action="store_true", help="print the arithmetic for an H100, and measure nothing")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="[default: cuda]")
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=SHAPES, metavar="SHAPE",
        help="small (CPU against GPU), 1b, 8b  [default: all]",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="PART", help="some of the parts, by their files' names")
    parser.add_argument("--experts", type=int, help="experts  [default: 3, or 2 where 3 do not fit]")
    parser.add_argument(
        "--models", type=Path, metavar="DIR", help="folder of the models  [default: /dev/shm, or WORKDIR]"
    )
    parser.add_argument("--rows", type=int, help="rows per task of `features`  [default: 30; 4 with --quick]")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS",
                        help="start no part that is not expected to end before")  # fmt: skip
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of every job  [default: all]")
    parser.add_argument("--direction", choices=["none", "swudi_a"], default="none", help="of `joint`  [default: none]")
    parser.add_argument("--profile", action="store_true", dest="profiled", help="run calibrations under cProfile")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it runs, no more")
    parser.add_argument("--keep", action="store_true", help="keep the models")
    parser.add_argument("--again", action="store_true", help="run what is there already once more")
    options = parser.parse_args(arguments)
    options.rows = options.rows or (4 if options.quick else 30)
    if options.workdir is None and not options.predict:
        parser.error("WORKDIR is missing")
    if options.experts is not None and options.experts < 1:
        parser.error("--experts is 1 or more")
    if options.rows < 1 or options.threads < 1:
        parser.error("--rows and --threads are 1 or more")
    if names := set(options.only or ()) - {part.name for part in parts(options.shapes)}:
        parser.error(f"no such part: {', '.join(sorted(names))}")
    return options


if __name__ == "__main__":
    sys.exit(main())
