"""Run the stock `mergekit-yaml recipe.yml merged` in WORKDIR and say what it took.

Anonymous memory is what the process holds; the rest of the resident memory is pages of mapped checkpoint files, which
the system takes back when it needs them. Linux only (read from /proc).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

STEP_SECONDS = 0.02


def watch(command: list[str], folder: Path) -> dict[str, float]:
    """Wall seconds, and peaks in MiB of resident and of anonymous memory, of a command that must succeed."""
    peaks = {"VmRSS": 0, "RssAnon": 0}
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder)
    while process.poll() is None:
        try:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                key, _, value = line.partition(":")
                if key in peaks:
                    peaks[key] = max(peaks[key], int(value.split()[0]))
        except (FileNotFoundError, ProcessLookupError):
            break
        time.sleep(STEP_SECONDS)
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return {
        "seconds": round(time.perf_counter() - begin, 1),
        "peak_resident_mib": round(peaks["VmRSS"] / 1024),
        "peak_anonymous_mib": round(peaks["RssAnon"] / 1024),
    }


def main() -> None:
    """Measure a merge from nothing, and one that reuses the alphas; write WORKDIR/measured.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    folder = parser.parse_args().workdir
    shutil.rmtree(folder / "merged", ignore_errors=True)
    script = Path(sys.executable).parent / "mergekit-yaml"
    command = [str(script), "recipe.yml", "merged", "--quiet"]
    measured = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "calibrate_and_merge": watch(command, folder),
        "merge_with_the_same_alphas": watch(command, folder),
    }
    text = json.dumps(measured, indent=2)
    (folder / "measured.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
