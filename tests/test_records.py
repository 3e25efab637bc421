"""Unfinished work on disk: whole or absent, bound to its fingerprint, and never somebody else's."""

from __future__ import annotations

import os

import pytest
import torch

from mergekit_slta.errors import OutputError
from mergekit_slta.runtime.resume import ResumeStore
from mergekit_slta.streams import Streams


def opened(folder, fingerprint: str) -> ResumeStore:
    records = ResumeStore(folder, fingerprint)
    records.open()
    return records


def test_records_come_back(tmp_path):
    """What was put is there for the same fingerprint, in another process's object."""
    with opened(tmp_path / "work", "a") as records:
        assert not (tmp_path / "work").exists()
        records.put("layer/1", {"x": torch.arange(3.0, dtype=torch.float64)})
    with opened(tmp_path / "work", "a") as again:
        assert again.steps == {"layer/1"}
        assert again.get("layer/1")["x"].tolist() == [0.0, 1.0, 2.0]
        again.remove()
    assert not (tmp_path / "work").exists()


def test_other_fingerprints_start_afresh(tmp_path):
    """A changed recipe never picks up old records."""
    with opened(tmp_path / "work", "a") as records:
        records.put("layer/1", {"x": torch.zeros(1)})
    with opened(tmp_path / "work", "b") as records:
        assert records.finished == frozenset()
        assert not (tmp_path / "work").exists()


def test_nothing_is_touched_that_another_process_holds(tmp_path):
    """Neither by making the object nor by opening it, whatever it is for."""
    with opened(tmp_path / "work", "a") as records:
        records.put("layer/1", {"x": torch.zeros(1)})
        other = ResumeStore(tmp_path / "work", "b")
        with pytest.raises(OutputError, match=f"another process \\({os.getpid()}\\)"), other:
            other.open()
        other.remove()
        assert len(list((tmp_path / "work").glob("*.safetensors"))) == 1
    assert os.listdir(tmp_path) == ["work"]


def test_damaged_records_are_dropped(tmp_path):
    """A file that is cut short is no record."""
    with opened(tmp_path / "work", "a") as records:
        records.put("one", {"x": torch.zeros(100)})
        records.put("two", {"x": torch.zeros(100)})
    path = next((tmp_path / "work").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:50])
    with opened(tmp_path / "work", "a") as records:
        assert len(records.finished) == 1


@pytest.mark.parametrize("left", [[".records.json.x1"], ["streams"], ["0" * 24 + ".safetensors"]])
def test_killed_while_beginning_or_removing(tmp_path, left):
    """A folder of ours without its marker is swept away, not refused."""
    (tmp_path / "work").mkdir()
    for name in left:
        (tmp_path / "work" / name).write_text("")
    with opened(tmp_path / "work", "a") as records:
        assert records.finished == frozenset()
        records.put("one", {"x": torch.zeros(1)})


def test_other_peoples_files_are_left_alone(tmp_path):
    """A folder or a link that is not ours is refused; so is a link in the place of the lock."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    with pytest.raises(OutputError, match="in the way"):
        opened(tmp_path / "work", "a")
    (tmp_path / "link").symlink_to(tmp_path / "work")
    with pytest.raises(OutputError, match="in the way"):
        opened(tmp_path / "link", "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "elsewhere").symlink_to(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    for name in ("elsewhere", "file"):
        with pytest.raises(OutputError, match="in the way"):
            opened(tmp_path / name, "a")
    (tmp_path / "x.lock").symlink_to(tmp_path / "work" / "thesis.txt")
    with pytest.raises(OutputError, match="cannot write"):
        opened(tmp_path / "x", "a")
    assert (tmp_path / "work" / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize("damage", ["missing side", "other size", "other layout"])
def test_streams_that_lost_a_side_start_over(tmp_path, damage):
    """The depth counts only for the very features it was written for."""
    tokens = {0: 2, 1: 3}
    streams = Streams(tokens, 4, torch.float32, tmp_path / "streams")
    for key, count in tokens.items():
        streams.write(key, torch.ones(count, 4))
    streams.commit()
    del streams
    if damage == "missing side":
        (tmp_path / "streams" / "side1.bin").unlink()
    elif damage == "other size":
        tokens[1] = 4
    else:
        tokens = {0: 3, 1: 2}
    assert Streams(tokens, 4, torch.float32, tmp_path / "streams").depth == -1


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_hold_what_was_written(tmp_path, on_disk, dtype):
    """Reads give the last commit's features; on disk, a new object goes on at the depth of the last commit."""
    folder = tmp_path / "streams" if on_disk else None
    tokens = {(0, "a"): 2, (1, "b"): 3}
    streams = Streams(tokens, 4, dtype, folder)
    assert streams.depth == -1
    for depth in range(3):
        for key, count in tokens.items():
            streams.write(key, torch.full((count, 4), depth + count, dtype=dtype))
        streams.commit()
        assert streams.depth == depth
        assert streams.read((1, "b")).tolist() == [[depth + 3.0] * 4] * 3
    if on_disk:
        streams.write((0, "a"), torch.full((2, 4), 99, dtype=dtype))  # never committed
        again = Streams(tokens, 4, dtype, folder)
        assert again.depth == 2
        assert again.read((0, "a")).tolist() == [[4.0] * 4] * 2


def test_no_room_for_streams_is_said(tmp_path):
    """A folder that cannot be made, and the size that was asked for."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="GiB of features"):
        Streams({0: 10}, 4, torch.float32, tmp_path / "file" / "streams")
