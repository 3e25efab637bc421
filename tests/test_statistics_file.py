"""Statistics: added up right, saved whole, and refused when damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_slta.errors import AlphasError, OutputError
from mergekit_slta.files.statistics_file import Statistics


def sample() -> Statistics:
    statistics = Statistics(torch.tensor([0, 0, 1]), 2, metadata={"fingerprint": "abc"})
    statistics.add("head", [2, 0], torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)), [2, 3])
    return statistics


def test_parts_add_up():
    """The head arrives in parts of the vocabulary: their Gram matrices are summed."""
    deltas = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    whole = Statistics(torch.tensor([0, 1]), 2)
    whole.add("head", [1, 0], deltas, [2, 3])
    parts = Statistics(torch.tensor([0, 1]), 2)
    for part in deltas.split(3, dim=2):
        parts.add("head", [1, 0], part, [2, 3])
    torch.testing.assert_close(parts.by_submodule["head"], whole.by_submodule["head"], rtol=1e-12, atol=1e-12)


def test_save_and_load_round_trip(tmp_path: Path):
    """What is saved comes back to the bit."""
    statistics = sample()
    statistics.save(tmp_path / "stats.safetensors")
    loaded = Statistics.load(tmp_path / "stats.safetensors")
    assert loaded.num_models == 2
    assert loaded.metadata == {"fingerprint": "abc"}
    assert torch.equal(loaded.row_task, statistics.row_task)
    assert torch.equal(loaded.by_submodule["head"], statistics.by_submodule["head"])


DAMAGES = {
    "missing": "missing-file", "text": "unreadable-file", "truncated": "unreadable-file",
    "foreign": "wrong-file-type", "shape": "damaged-file", "nan": "damaged-file", "task": "damaged-file",
    "not square": "damaged-file",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_statistics_are_refused(tmp_path: Path, damage: str):
    """A missing, foreign, truncated or inconsistent file is an AlphasError, whatever is wrong with it."""
    path = tmp_path / "stats.safetensors"
    statistics = sample()
    if damage == "shape":
        statistics.by_submodule["other"] = torch.zeros(3, 3, 3, dtype=torch.float64)
    if damage == "not square":
        statistics.by_submodule = {"head": torch.zeros(len(statistics.row_task), 3, 2, dtype=torch.float64)}
    if damage == "nan":
        statistics.by_submodule["head"][0, 0, 0] = float("nan")
    if damage == "task":
        statistics.row_task[0] = 7
    statistics.save(path)
    if damage == "missing":
        path.unlink()
    if damage == "text":
        path.write_text("not a safetensors file")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    if damage == "foreign":
        save_file({"a": torch.zeros(1)}, path)
    with refused(AlphasError, DAMAGES[damage], path):
        Statistics.load(path)


def test_failed_save_leaves_the_old_file(tmp_path: Path):
    """Where the folder cannot be written to, the error says so and nothing changes."""
    (tmp_path / "file").write_text("in the way")
    with refused(OutputError, "cannot-write", tmp_path / "file"):
        sample().save(tmp_path / "file" / "stats.safetensors")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("changes", [{"format": "other"}, {"version": "1"}, {"version": "3"}])
def test_statistics_of_another_version(tmp_path, changes):
    """A file of another format or version is refused, with what to do."""
    sound = Statistics(torch.zeros(1, dtype=torch.int64), 1, {"m": torch.ones(1, 1, 1, dtype=torch.float64)})
    path = tmp_path / "slta_stats.safetensors"
    sound.save(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file(load_file(path), path, metadata={**header, **changes})
    with refused(AlphasError, "wrong-file-type" if "format" in changes else "other-file-version", path):
        Statistics.load(path)
