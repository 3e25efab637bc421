"""Where models fit: free bytes of folders and RAM disks, and how many experts go there."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import BenchmarkError
from workload import Shape

NUM_EXPERTS, MIN_EXPERTS = 3, 2
SPARE = 1.02
"""Room that is asked for, over the bytes of the weights."""
SPARE_MEMORY = 16_000_000_000
"""Bytes of memory that models on a RAM disk must leave for the processes."""


@dataclass(frozen=True)
class Room:
    """Where the models of a shape fit.

    Attributes:
        folder: of the models.
        experts: how many.
        output: folder of the merge, None if it fits nowhere.
    """

    folder: Path
    experts: int
    output: Path | None


def find_room(
    shape: Shape, folders: Sequence[tuple[Path, float]], outputs: Sequence[tuple[Path, float]], experts: int | None
) -> Room:
    """Choose the folder that fits most experts; of several the first.

    Args:
        shape: of all models.
        folders: candidates for the models, and their free bytes.
        outputs: candidates for the merge, and their free bytes without the models.
        experts: as many are asked for; None for as many as fit, `NUM_EXPERTS` at most and `MIN_EXPERTS` at least.

    Raises:
        BenchmarkError: not enough room.
    """
    size = SPARE * shape.model_bytes()
    for number in [experts] if experts else range(NUM_EXPERTS, MIN_EXPERTS - 1, -1):
        for folder, free in folders:
            if (1 + number) * size <= free:
                taken = {folder: (1 + number) * size}
                fits = (place for place, left in outputs if size <= left - taken.get(place, 0.0))
                return Room(folder, number, next(fits, None))
    least = experts or MIN_EXPERTS
    there = ", ".join(f"{folder} has {free / 1e9:.1f} GB" for folder, free in folders)
    raise BenchmarkError(
        f"{shape.title}: the base and {least} experts need {(1 + least) * size / 1e9:.1f} GB, and the merge "
        f"{size / 1e9:.1f} GB more; {there}: name a folder with more room by --models, or ask for fewer --experts"
    )


def free_bytes(folder: Path, made: Path | None = None) -> float:
    """Bytes that fit in a folder, which need not exist; on a RAM disk as memory allows, too.

    Args:
        folder: the folder.
        made: what is in it already of the models that are to fit.
    """
    there = sum(file.stat().st_size for file in made.rglob("*.safetensors")) if made and made.exists() else 0
    while not folder.exists():
        folder = folder.parent
    free = float(shutil.disk_usage(folder).free + there)
    if not is_ram_disk(folder.resolve(), Path("/proc/mounts").read_text(encoding="utf-8")):
        return free
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min(free, max(0.0, available + there - SPARE_MEMORY))


def is_ram_disk(folder: Path, mounts: str) -> bool:
    """Whether a folder is on a tmpfs, by the text of /proc/mounts."""
    kinds = {}
    for line in mounts.splitlines():
        _, place, kind, *_ = line.split()
        if folder.is_relative_to(place):
            kinds[len(place)] = kind
    return bool(kinds) and kinds[max(kinds)] in ("tmpfs", "ramfs")
