"""The demo, with next to no training: every step of it runs."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from click.testing import CliRunner
from conftest import assert_refused, refused, slta

from mergekit_slta.cli import main as cli
from mergekit_slta.demo.run import merge_by_command, prepare_folder
from mergekit_slta.errors import OutputError, RunError


@pytest.mark.process
def test_demo_runs_end_to_end(tmp_path):
    """Trains, merges with the stock command, measures, draws; a second run overwrites the first."""
    state = torch.get_rng_state()
    result = CliRunner().invoke(cli.main, ["demo", str(tmp_path / "demo"), "--quick"])
    assert result.exit_code == 0, result.output
    assert torch.equal(torch.get_rng_state(), state)
    for row in ("base", "expert: math", "plain average", "each expert on its own task", "task arithmetic", "features"):
        assert row in result.output
    scores = json.loads((tmp_path / "demo" / "results.json").read_text())["scores"]
    assert all(0 <= part["exact"] <= 1 and part["loss"] > 0 for row in scores.values() for part in row.values())
    for name in ("alphas.png", "recipe.yml", "merged/slta_alphas.json", "models/base/model.safetensors.index.json"):
        assert (tmp_path / "demo" / name).stat().st_size > 0


def test_demo_overwrites_nothing_else(tmp_path):
    """A folder that is not the demo's is refused in one line."""
    (tmp_path / "thesis.tex").write_text("precious")
    result = slta("demo", tmp_path, "--quick")
    assert_refused(result, "foreign-file", tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_tasks_do_not_leak_into_the_test_rows(tmp_path):
    """No test question is among the training rows."""
    import random

    from mergekit_slta.demo import tasks

    for split in tasks.write_splits(tmp_path, random.Random(0), 300, 100).values():
        assert not {example.question for example in split.train} & {example.question for example in split.test}


@pytest.mark.parametrize("seed", [0, 1])
def test_task_answers_are_right(seed):
    """Arithmetic adds up and sorted words are sorted."""
    import random

    from mergekit_slta.demo import tasks

    rng = random.Random(seed)
    by_name = {task.name: task for task in tasks.TASKS}
    for _ in range(50):
        sum_ = by_name["math"].draw(rng)
        left, right = (int(part) for part in sum_.question.removesuffix("=").split("+"))
        assert int(sum_.answer) == left + right
        word = by_name["words"].draw(rng)
        assert word.answer.split() == sorted(word.question.removeprefix("Sort:").split())


def test_demo_folders(tmp_path):
    """A file in the place of the folder is refused."""
    (tmp_path / "file").write_text("x")
    with refused(OutputError, "not-a-folder", tmp_path / "file"):
        prepare_folder(tmp_path / "file")


def test_a_demo_whose_merge_fails(tmp_path, monkeypatch):
    """The exit code of mergekit-yaml and the end of what it said."""
    script = tmp_path / "mergekit-yaml"
    script.write_text("#!/bin/sh\necho no such method >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with refused(RunError, "merge-failed", "exit code 3", "no such method", tmp_path):
        merge_by_command(tmp_path, lambda _: None)
