"""The output folder at every moment at which a merge can die."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from mergekit_slta.errors import OutputError
from mergekit_slta.outfolder import check_output, recover, replacing_weights, weight_files


def merge(out: Path, content: str, names: tuple[str, ...]) -> None:
    """A stand-in for a merge: writes weights."""
    out.mkdir(exist_ok=True)
    with replacing_weights(out):
        for name in names:
            (out / name).write_text(content)


ONE = ("model.safetensors",)
TWO = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    merge(folder, "first", TWO)
    return folder


def content(out: Path) -> dict[str, str]:
    return {name: (out / name).read_text() for name in weight_files(out)}


def test_replacement_leaves_no_mixture(out: Path):
    """Files of the earlier merge are gone after the later one."""
    merge(out, "second", ONE)
    assert content(out) == dict.fromkeys(ONE, "second")
    check_output(out, [])


def test_failure_restores(out: Path):
    """An error inside puts everything back."""
    with pytest.raises(KeyboardInterrupt), replacing_weights(out):
        (out / "model.safetensors").write_text("half")
        raise KeyboardInterrupt
    assert content(out) == dict.fromkeys(TWO, "first")
    check_output(out, [])


def test_failure_in_an_empty_folder_leaves_nothing(tmp_path: Path):
    """No weights, no record."""
    folder = tmp_path / "new"
    folder.mkdir()
    with pytest.raises(RuntimeError), replacing_weights(folder):
        (folder / "model-1.safetensors").write_text("half")
        raise RuntimeError
    assert os.listdir(folder) == []


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


@pytest.mark.parametrize("moment", range(12))
def test_killed_at_any_file_operation(out: Path, monkeypatch, moment: int):
    """Whatever operation is the last one, the next start finds the earlier merge whole, or the new one whole."""
    import shutil

    import mergekit_slta.outfolder as module

    count = 0

    def dying(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > moment:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", dying(os.replace))
        patch.setattr(module.shutil, "copy2", dying(shutil.copy2))
        patch.setattr(module.shutil, "rmtree", dying(shutil.rmtree))
        patch.setattr(module, "write_text_atomically", dying(module.write_text_atomically))
        with contextlib.suppress(Killed):
            merge(out, "second", ONE)
    recover(out)
    check_output(out, [])
    assert content(out) in (dict.fromkeys(TWO, "first"), dict.fromkeys(ONE, "second"))
    assert not (out / ".slta_previous").exists()
    merge(out, "third", ONE)
    assert content(out) == dict.fromkeys(ONE, "third")


def test_killed_while_merging_is_undone(out: Path):
    """A process that dies inside mergekit's own writing: its partial shards go, the earlier merge comes back."""
    manager = replacing_weights(out)
    manager.__enter__()
    (out / "model-1.safetensors").write_text("half")
    recover(out)
    assert content(out) == dict.fromkeys(TWO, "first")
    del manager


@pytest.mark.parametrize("change", ["added", "edited", "no record"])
def test_weights_that_no_merge_recorded_are_refused(out: Path, change: str):
    """A file added or exchanged since, or a lost record: somebody may want these weights."""
    if change == "added":
        (out / "adapter_model.safetensors").write_text("mine")
    if change == "edited":
        (out / TWO[0]).write_text("fine-tuned further")
    if change == "no record":
        (out / "slta_merge.json").unlink()
    before = content(out)
    with pytest.raises(OutputError, match="weights of another origin"):
        check_output(out, [])
    assert content(out) == before


def test_output_that_is_a_file_or_not_writable(tmp_path: Path):
    """Named before anything is computed."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "file", [])
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(OutputError, match="cannot write to"):
        check_output(locked / "out", [])
