"""Run the benchmarks: ratios side by side, measured in one run, written to WORKDIR/results.json and results.md.

    python examples/benchmarks/run.py WORKDIR [--only NAME ...] [--quick] [--threads N] [--repeat N] [--other PATH]

What each benchmark found is kept in WORKDIR/NAME.json, and a benchmark that is there is not run again (but with
--again). The models are made on the way and kept in WORKDIR/models; no network is needed. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import BENCHMARKS, Bench, revision
from measure import BenchmarkError
from rendering import document, section


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for and not there yet; print and write the tables. Returns the exit code."""
    options = _options(arguments)
    if not Path("/proc/self/status").exists():
        print("error: memory is read from /proc, which this system does not have", file=sys.stderr)
        return 2
    options.workdir.mkdir(parents=True, exist_ok=True)
    settings = {
        "threads": options.threads,
        "repeat": options.repeat or (1 if options.quick else 3),
        "quick": options.quick,
        "large": not options.no_large,
    }
    other = options.other and options.other.resolve()
    bench = Bench(options.workdir.absolute(), log=log, other=other, **settings)
    try:
        for name in options.only or BENCHMARKS:
            if name == "versions" and other is None and not options.only:
                continue
            own = {**settings, "other": revision(other)} if name == "versions" and other else settings
            found = None if options.again else kept(options.workdir / f"{name}.json", own)
            if found is None:
                log(f"{name} ...")
                found = BENCHMARKS[name](bench)
                write_json(options.workdir / f"{name}.json", {"settings": own, "machine": machine(), "found": found})
            print(section(name, found), flush=True)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        _write_results(options.workdir, settings)
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, metavar="WORKDIR")
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="tiny shapes and one round: shows that it runs, no more")
    parser.add_argument("--threads", type=int, default=1, help="threads of every job  [default: 1]")
    parser.add_argument("--repeat", type=int, help="rounds  [default: 3]")
    parser.add_argument("--no-large", action="store_true", help="without the 1.1B models (9 GB of disk)")
    parser.add_argument(
        "--other", type=Path, metavar="PATH", help="source tree of another version of the package, for `versions`"
    )
    parser.add_argument("--again", action="store_true", help="run what is there already once more")
    options = parser.parse_args(arguments)
    if options.threads < 1 or (options.repeat is not None and options.repeat < 1):
        parser.error("--threads and --repeat are 1 or more")
    if options.other is not None and not (options.other / "mergekit_slta" / "__init__.py").is_file():
        parser.error(f"--other {options.other} holds no package mergekit_slta")
    if options.only and "versions" in options.only and options.other is None:
        parser.error("versions needs --other PATH")
    return options


def machine() -> dict[str, Any]:
    """What was measured, and on what."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    versions = {}
    for package in ("mergekit-slta", "mergekit", "transformers", "torch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"CPU": model, "cores": os.cpu_count(), "GiB": round(gib), "Python": platform.python_version(), **versions}


def kept(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run has found.

    Raises:
        BenchmarkError: it ran with other settings.
    """
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    other = {key: value for key, value in content["settings"].items() if settings.get(key) != value}
    if other:
        raise BenchmarkError(
            f"{path.name} was measured with other settings ({other}): add --again, or take another WORKDIR"
        )
    log(f"{path.stem}: there already")
    return content["found"]


def _write_results(folder: Path, settings: dict[str, Any]) -> None:
    """Everything found with these settings, as one file and as tables."""
    found, machines = {}, []
    for name in BENCHMARKS:
        path = folder / f"{name}.json"
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if settings.items() <= content["settings"].items():
                found[name] = content["found"]
                machines.append(content["machine"])
    if found:
        about = machines[-1]
        write_json(folder / "results.json", {"machine": about, "settings": settings, "benchmarks": found})
        write_text(folder / "results.md", document(about, settings, found))


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
