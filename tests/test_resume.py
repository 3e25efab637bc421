"""A calibration that is killed goes on where it was, and ends in the same bytes."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import yaml
from conftest import assert_refused, fork, mergekit_yaml, own_command, slta
from safetensors.torch import load_file

from mergekit_slta.models.skeleton import Skeleton
from mergekit_slta.runtime.resume import ResumeStore


def write(folder: Path, recipe: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yml"


def both(folder: Path) -> tuple[bytes, dict[str, list]]:
    """The alphas file's bytes, and every number of the statistics (whose header is written in any order)."""
    tensors = load_file(folder / "slta_stats.safetensors")
    return (folder / "slta_alphas.json").read_bytes(), {name: tensor.tolist() for name, tensor in tensors.items()}


SETTINGS = [
    {"granularity": "head_mlp"},
    {"granularity": "linear"},
    {"granularity": "model"},
    {"granularity": "layer", "inputs": "merged"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(str(value) for value in settings.values()))
def test_stopped_at_every_step(tiny, tmp_path, monkeypatch, settings):
    """Interrupted after each finished step in turn: no step is gathered twice, and the bytes are the same."""
    recipe = write(tmp_path / "a", tiny.recipe(2, num_samples=3, **settings))
    assert slta("calibrate", recipe, "-o", tmp_path / "a" / "slta_alphas.json", "--quiet").exit_code == 0
    put, finished = ResumeStore.put, []

    def stopping(self, step, tensors):
        put(self, step, tensors)
        finished.append(step)
        raise KeyboardInterrupt

    monkeypatch.setattr(ResumeStore, "put", stopping)
    target = tmp_path / "b" / "slta_alphas.json"
    recipe = write(tmp_path / "b", tiny.recipe(2, num_samples=3, **settings))
    for _ in range(80):
        result = slta("calibrate", recipe, "-o", target, "--quiet")
        if result.exit_code == 0:
            break
        assert not target.exists()
    assert both(tmp_path / "b") == both(tmp_path / "a")
    assert len(set(finished)) == len(finished)
    assert sorted(os.listdir(tmp_path / "b")) == ["recipe.yml", "slta_alphas.json", "slta_stats.safetensors"]


def test_stopped_half_way_through_a_model(tiny, tmp_path, monkeypatch):
    """`granularity: model` has one step: a run that is stopped in it is repeated, and ends in the same bytes."""
    recipe = write(tmp_path / "a", tiny.recipe(2, num_samples=3, granularity="model"))
    assert slta("calibrate", recipe, "-o", tmp_path / "a" / "slta_alphas.json", "--quiet").exit_code == 0
    layer, seen = Skeleton.layer, []

    def stopping(self, index, *arguments):
        seen.append(index)
        if seen[0] < index:
            raise KeyboardInterrupt
        return layer(self, index, *arguments)

    recipe = write(tmp_path / "b", tiny.recipe(2, num_samples=3, granularity="model"))
    target = tmp_path / "b" / "slta_alphas.json"
    with monkeypatch.context() as patch:
        patch.setattr(Skeleton, "layer", stopping)
        assert slta("calibrate", recipe, "-o", target, "--quiet").exit_code != 0
    assert seen[-1] == 1
    assert not target.exists()
    assert slta("calibrate", recipe, "-o", target, "--quiet").exit_code == 0
    assert both(tmp_path / "b") == both(tmp_path / "a")
    assert sorted(os.listdir(tmp_path / "b")) == ["recipe.yml", "slta_alphas.json", "slta_stats.safetensors"]


@pytest.mark.process
def test_killed_at_random(make_models, tmp_path):
    """SIGKILL at random moments of one calibration, again and again: the same bytes as undisturbed."""
    models = make_models("llama", num_layers=24, num_experts=2)
    recipe = write(tmp_path / "a", models.recipe(num_samples=8))
    assert slta("calibrate", recipe, "-o", tmp_path / "a" / "slta_alphas.json", "--quiet").exit_code == 0
    recipe = write(tmp_path / "b", models.recipe(num_samples=8))
    target = tmp_path / "b" / "slta_alphas.json"
    command = ["calibrate", str(recipe), "-o", str(target), "--quiet"]
    records = target.with_name(".slta_alphas.json.partial")
    rng = random.Random(0)
    counts = []
    for _ in range(3):
        forked = fork(own_command, *command, cwd=tmp_path)
        aim = len(list(records.glob("*.safetensors"))) + rng.randint(1, 14)
        while forked.process.is_alive() and len(list(records.glob("*.safetensors"))) < aim:
            time.sleep(0.001)
        forked.process.kill()
        forked.process.join()
        counts.append(len(list(records.glob("*.safetensors"))))
        if target.exists():
            break
    assert counts[0] > 0
    assert counts == sorted(counts)  # nothing that was finished is lost
    assert slta("calibrate", recipe, "-o", target, "--quiet").exit_code == 0
    assert both(tmp_path / "b") == both(tmp_path / "a")
    assert not records.exists()


def test_a_killed_merge_goes_on(tiny, tmp_path, monkeypatch):
    """Through the stock command: what was calibrated for OUT is taken up; OUT is the same as undisturbed."""
    recipe = write(tmp_path, tiny.recipe(2, num_samples=3))
    assert mergekit_yaml(recipe, tmp_path / "a", "--quiet").exit_code == 0
    put, finished = ResumeStore.put, []

    def stopping(self, step, tensors):
        put(self, step, tensors)
        finished.append(step)
        if len(finished) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResumeStore, "put", stopping)
    assert mergekit_yaml(recipe, tmp_path / "b", "--quiet").exit_code != 0
    assert os.listdir(tmp_path / "b") == [".slta_calibrating"]
    result = mergekit_yaml(recipe, tmp_path / "b")
    assert result.exit_code == 0, result.output
    assert "3 parts of the calibration are done" in result.output
    assert len(set(finished)) == len(finished)
    assert both(tmp_path / "b") == both(tmp_path / "a")
    assert not [name for name in os.listdir(tmp_path / "b") if name.startswith(".")]


def test_a_changed_recipe_starts_anew(tiny, tmp_path, monkeypatch):
    """ResumeStore of other rows are not taken up."""
    recipe = write(tmp_path, tiny.recipe(2, num_samples=3))
    put = ResumeStore.put

    def stopping(self, step, tensors):
        put(self, step, tensors)
        raise KeyboardInterrupt

    monkeypatch.setattr(ResumeStore, "put", stopping)
    target = tmp_path / "slta_alphas.json"
    assert slta("calibrate", recipe, "-o", target, "--quiet").exit_code != 0
    monkeypatch.setattr(ResumeStore, "put", put)
    recipe = write(tmp_path, tiny.recipe(2, num_samples=4))
    result = slta("calibrate", recipe, "-o", target)
    assert result.exit_code == 0, result.output
    assert "earlier run" not in result.output


def test_two_at_once_are_told_apart(tiny, tmp_path):
    """While another process holds the records, a run is refused with that one's number."""
    fcntl = pytest.importorskip("fcntl")
    recipe = write(tmp_path, tiny.recipe(2, num_samples=3))
    with open(tmp_path / ".slta_alphas.json.partial.lock", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("4242")
        file.flush()
        result = slta("calibrate", recipe, "-o", tmp_path / "slta_alphas.json", "--quiet")
    assert_refused(result, "in-use", "(4242)")


def test_solving_again_is_refused_while_another_run_writes_the_file(tiny, tmp_path):
    """The alphas file has one writer at a time, whether it calibrates or solves saved statistics."""
    fcntl = pytest.importorskip("fcntl")
    target = tmp_path / "slta_alphas.json"
    assert slta("calibrate", write(tmp_path, tiny.recipe(2, num_samples=3)), "-o", target, "--quiet").exit_code == 0
    before = target.read_bytes()
    recipe = write(tmp_path, tiny.recipe(2, num_samples=3, ridge=0.5))
    with open(tmp_path / ".slta_alphas.json.partial.lock", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = slta("calibrate", recipe, "-o", target, "--quiet")
    assert_refused(result, "in-use", tmp_path)
    assert target.read_bytes() == before


def test_alphas_that_another_run_has_just_finished_are_used(tiny, tmp_path, monkeypatch):
    """A file that appears between the first look and the lock is not computed, and not overwritten."""
    recipe = write(tmp_path, tiny.recipe(2, num_samples=3))
    assert slta("calibrate", recipe, "-o", tmp_path / "a" / "slta_alphas.json", "--quiet").exit_code == 0
    lock = ResumeStore.lock

    def late(self):
        lock(self)
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / "slta_alphas.json").write_bytes((tmp_path / "a" / "slta_alphas.json").read_bytes())

    monkeypatch.setattr(ResumeStore, "lock", late)
    result = slta("calibrate", recipe, "-o", tmp_path / "b" / "slta_alphas.json")
    assert result.exit_code == 0, result.output
    assert "Reusing the alphas" in result.output
