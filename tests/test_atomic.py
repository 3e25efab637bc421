"""Files are written whole, with the permissions of any new file, from any thread."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from mergekit_slta.files.atomic import write_atomically, write_text_atomically


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="no umask")
def test_files_get_the_permissions_that_the_umask_leaves(tmp_path, umask, monkeypatch):
    """Also where the writer puts a file of its own in the place; the umask is never touched."""
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("the umask belongs to all threads"))

    def replacing(path):
        path.unlink()
        path.touch(0o600)

    write_text_atomically(tmp_path / "plain", "x")
    write_atomically(tmp_path / "replaced", replacing)
    monkeypatch.undo()
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "replaced")} == {0o666 & ~umask}


def test_writers_of_one_file_leave_one_of_their_texts(tmp_path):
    """No mixture, and no temporary file."""
    texts = [str(number) * 10_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_text_atomically(tmp_path / "file", text), texts))
    assert (tmp_path / "file").read_text() in texts
    assert os.listdir(tmp_path) == ["file"]
