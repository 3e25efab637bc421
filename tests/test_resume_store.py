"""Unfinished work on disk: whole or absent, bound to its fingerprint, and never somebody else's."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from conftest import refused

from mergekit_slta.errors import OutputError
from mergekit_slta.runtime.activations import ActivationStore
from mergekit_slta.runtime.resume import ResumeStore


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
        assert again.finished == {"layer/1"}
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
        with refused(OutputError, "in-use", f"({os.getpid()})"), other:
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


@pytest.mark.parametrize("left", [[".resume.json.x1"], ["activations"], ["0" * 24 + ".safetensors"]])
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
    with refused(OutputError, "path-in-the-way", tmp_path / "work"):
        opened(tmp_path / "work", "a")
    (tmp_path / "link").symlink_to(tmp_path / "work")
    with refused(OutputError, "path-in-the-way", tmp_path / "link"):
        opened(tmp_path / "link", "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "elsewhere").symlink_to(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    for name in ("elsewhere", "file"):
        with refused(OutputError, "path-in-the-way", tmp_path / name):
            opened(tmp_path / name, "a")
    (tmp_path / "x.lock").symlink_to(tmp_path / "work" / "thesis.txt")
    with refused(OutputError, "cannot-write", tmp_path / "x.lock"):
        opened(tmp_path / "x", "a")
    assert (tmp_path / "work" / "thesis.txt").read_text() == "years"


def store(lengths, folder, depths: int = 2, dtype=torch.float32) -> ActivationStore:
    return ActivationStore(lengths, depths, 1, 4, dtype, folder)


@pytest.mark.parametrize("damage", ["missing file", "missing marker", "other size", "other layout"])
def test_activations_of_other_rows_start_over(tmp_path, damage):
    """A depth counts as stored only for the very rows it was written for."""
    activations = store([2, 3], tmp_path / "activations")
    for row, length in enumerate([2, 3]):
        activations.put_features(0, row, torch.ones(length, 4))
    activations.finish_depth()
    del activations
    lengths = [2, 3]
    if damage == "missing file":
        (tmp_path / "activations" / "activations.bin").unlink()
    elif damage == "missing marker":
        (tmp_path / "activations" / "activations.json").unlink()
    else:
        lengths = [2, 4] if damage == "other size" else [3, 2]
    assert store(lengths, tmp_path / "activations").depths_done == 0


@pytest.mark.parametrize("depths", [1, 2, 4])
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_hold_what_was_written(tmp_path, on_disk, dtype, depths):
    """Features are read at the depth they were stored at; on disk, a new object continues at the last finished one."""
    folder = tmp_path / "activations" if on_disk else None
    activations = store([2, 3], folder, depths, dtype)
    for depth in range(3):
        for row, length in enumerate([2, 3]):
            activations.put_features(depth, row, torch.full((length, 4), depth + length))
        activations.finish_depth()
        assert activations.features(depth, 1).tolist() == [[depth + 3.0] * 4] * 3
    if on_disk:
        again = store([2, 3], folder, depths, dtype)
        assert again.depths_done == 3
        assert again.features(2, 0).tolist() == [[4.0] * 4] * 2


@pytest.mark.parametrize("on_disk", [False, True])
def test_gradients_are_read_once_their_layer_is_finished(tmp_path, on_disk):
    """What a layer reads is not what it writes; `rewind` begins with the first layer again and keeps the features."""
    activations = store([2], tmp_path / "activations" if on_disk else None)
    activations.put_features(0, 0, torch.ones(2, 4))
    activations.put_gradients(0, torch.full((1, 2, 4), 1.0))
    activations.finish_layer()
    activations.put_gradients(0, torch.full((1, 2, 4), 2.0))
    assert activations.gradients(0).unique().tolist() == [1.0]
    activations.finish_layer()
    assert activations.gradients(0).unique().tolist() == [2.0]
    assert activations.layers_done == 2
    activations.rewind()
    assert activations.layers_done == 0
    assert activations.features(0, 0).unique().tolist() == [1.0]


def test_no_room_for_activations_is_said(tmp_path):
    """A folder that cannot be made, and the size that was asked for."""
    (tmp_path / "file").write_text("")
    with refused(OutputError, "cannot-write", "GiB of features", tmp_path / "file"):
        ActivationStore([10], 1, 0, 4, torch.float32, tmp_path / "file" / "streams")


def test_a_lock_that_its_holder_has_just_removed(tmp_path, monkeypatch):
    """A lock on a file that is gone by now locks nothing: the run is refused."""
    fcntl = pytest.importorskip("fcntl")
    flock = fcntl.flock

    def late(handle, operation):
        flock(handle, operation)
        (tmp_path / "work.lock").unlink()

    monkeypatch.setattr(fcntl, "flock", late)
    with refused(OutputError, "in-use"):
        opened(tmp_path / "work", "a")


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    """ResumeStore are kept all the same, with a warning."""
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level("WARNING"), opened(tmp_path / "work", "a") as records:
        records.put("one", {"x": torch.zeros(1)})
        assert records.finished == {"one"}
    assert "cannot be locked" in caplog.text
