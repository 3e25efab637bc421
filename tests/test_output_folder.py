"""The output folder at every moment at which a merge can die."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest
from conftest import refused

import mergekit_slta.files.lock as lock_module
import mergekit_slta.files.output_folder as module
from mergekit_slta.errors import OutputError
from mergekit_slta.files.output_folder import check_output, check_writable, staged, weight_files

ONE = ("model.safetensors",)
TWO = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")


def merge(out: Path, content: str, names: tuple[str, ...]) -> None:
    """A stand-in for a merge: weights, a config and a card."""
    with staged(out) as folder:
        for name in (*names, "config.json", "README.md", "slta_alphas.json"):
            (folder / name).write_text(content)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    merge(folder, "first", TWO)
    return folder


def content(out: Path) -> dict[str, str]:
    names = [*weight_files(out), "README.md", "slta_alphas.json"]
    return {name: (out / name).read_text() for name in names if (out / name).exists()}


def whole(text: str, names: tuple[str, ...]) -> dict[str, str]:
    return dict.fromkeys((*names, "README.md", "slta_alphas.json"), text)


def test_replacement_leaves_no_mixture(out: Path):
    """Files of the earlier merge are gone after the later one; other files of the folder stay."""
    (out / "notes.txt").write_text("mine")
    merge(out, "second", ONE)
    assert content(out) == whole("second", ONE)
    assert (out / "notes.txt").read_text() == "mine"
    assert not list(out.glob(".slta*"))
    check_output(out, [])


def test_failure_changes_nothing(out: Path):
    """An error inside leaves OUT as it was, alphas and card included."""
    with pytest.raises(KeyboardInterrupt), staged(out) as folder:
        (folder / "model.safetensors").write_text("half")
        (folder / "README.md").write_text("half")
        raise KeyboardInterrupt
    assert content(out) == whole("first", TWO)
    assert not list(out.glob(".slta*"))
    check_output(out, [])


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it does anything."""


@contextlib.contextmanager
def dying_after(moment: int, monkeypatch):
    """Every change to the file system works `moment` times, and never again until the end of the block."""
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
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, dying(getattr(os, name)))
        patch.setattr(shutil, "rmtree", dying(shutil.rmtree))
        patch.setattr(module, "write_text_atomically", dying(module.write_text_atomically))
        with contextlib.suppress(Killed):
            yield


@pytest.mark.parametrize("names", [ONE, TWO], ids=["other files", "same files"])
@pytest.mark.parametrize("moment", range(26))
def test_killed_at_any_file_operation(out: Path, monkeypatch, moment: int, names: tuple[str, ...]):
    """Whatever operation is the last one: OUT has no config.json, or is one merge whole; after any number of further
    deaths the next run ends well."""
    with dying_after(moment, monkeypatch):
        merge(out, "second", names)
    if (out / "config.json").exists():
        state = (out / "config.json").read_text()
        expected = {"first": whole("first", TWO), "second": whole("second", names)}[state]
        assert content(out) == expected
    check_output(out, [])  # what a killed merge leaves is not mistaken for somebody's weights
    for again in range(8):
        with dying_after(again, monkeypatch):
            merge(out, "third", ONE)
    merge(out, "last", ONE)
    assert content(out) == whole("last", ONE)
    assert not list(out.glob(".slta*"))


@pytest.mark.parametrize("change", ["added", "edited", "same size", "no record"])
def test_weights_that_no_merge_recorded_are_refused(out: Path, change: str):
    """A file added or exchanged since, or a lost record: somebody may want these weights."""
    if change == "added":
        (out / "adapter_model.safetensors").write_text("mine")
    if change == "edited":
        (out / TWO[0]).write_text("fine-tuned further")
    if change == "same size":
        (out / TWO[0]).write_text("FIRST")
    if change == "no record":
        (out / "slta_merge.json").unlink()
    before = content(out)
    with refused(OutputError, "foreign-weights", out):
        check_output(out, [])
    assert content(out) == before


def test_weights_added_after_a_killed_merge_are_somebodys(out: Path, monkeypatch):
    """What lies in OUT beside an unfinished merge was put there by someone else."""
    with dying_after(4, monkeypatch):
        merge(out, "second", ONE)
    (out / "my_finetune.safetensors").write_text("precious")
    with refused(OutputError, "foreign-weights", "my_finetune.safetensors"):
        check_output(out, [])
    with refused(OutputError, "foreign-weights", "during the merge"):
        merge(out, "third", ONE)
    assert (out / "my_finetune.safetensors").read_text() == "precious"


def test_a_second_merge_is_refused_while_one_runs(out: Path, monkeypatch):
    """Checking, and merging, into a folder that is being merged into: refused, and nothing of it is touched."""
    monkeypatch.setattr(lock_module.time, "sleep", lambda _: None)
    with staged(out) as folder:
        (folder / "model.safetensors").write_text("second")
        for attempt in (lambda: check_output(out, []), lambda: merge(out, "third", ONE)):
            with refused(OutputError, "in-use", f"process {os.getpid()}", out):
                attempt()
        assert (folder / "model.safetensors").read_text() == "second"
    assert (out / "model.safetensors").read_text() == "second"


def test_output_that_is_a_file_or_not_writable(tmp_path: Path):
    """Named before anything is computed."""
    (tmp_path / "file").write_text("x")
    with refused(OutputError, "not-a-folder", tmp_path / "file"):
        check_output(tmp_path / "file", [])
    with refused(OutputError, "not-a-folder", tmp_path / "file" / "out"):
        check_output(tmp_path / "file" / "out", [])
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write anywhere")
    with refused(OutputError, "cannot-write", locked):
        check_output(locked / "out", [])


def test_other_spellings_of_the_folder(out: Path, monkeypatch):
    """`..` and `.` are folders like any other."""
    (out / "sub").mkdir()
    monkeypatch.chdir(out / "sub")
    merge(Path(".."), "second", ONE)
    assert content(out) == whole("second", ONE)
    monkeypatch.chdir(out)
    merge(Path("."), "third", ONE)
    assert content(out) == whole("third", ONE)


def test_other_files_of_an_earlier_merge_go_with_it(out: Path):
    """A chat template that the later merge does not write must not stay; one that was edited since does."""
    with staged(out) as folder:
        for name in (*ONE, "config.json", "chat_template.jinja", "generation_config.json"):
            (folder / name).write_text("second")
    (out / "generation_config.json").write_text("edited")
    merge(out, "third", ONE)
    assert not (out / "chat_template.jinja").exists()
    assert (out / "generation_config.json").read_text() == "edited"


def test_file_systems_without_locks(out: Path, monkeypatch, caplog):
    """Where flock is not implemented a merge runs unguarded, instead of never, and says so."""
    monkeypatch.setattr(lock_module.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(38, "not implemented")))
    with caplog.at_level("WARNING"):
        merge(out, "second", ONE)
    assert content(out) == whole("second", ONE)
    assert "cannot be locked" in caplog.text


def test_folders_where_files_belong(out: Path):
    """A folder of that name in OUT is said to be in the way, and stays."""
    (out / "README.md").unlink()
    (out / "README.md").mkdir()
    (out / "README.md" / "mine.txt").write_text("mine")
    with refused(OutputError, "not-a-plain-file", out / "README.md"):
        merge(out, "second", ONE)
    assert (out / "README.md" / "mine.txt").read_text() == "mine"


def test_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch):
    """A folder without the right to write is refused before the merge."""
    check_writable(tmp_path / "out")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with refused(OutputError, "cannot-write", tmp_path):
        check_writable(tmp_path / "out")
