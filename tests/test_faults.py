"""Faults in every phase of a merge: a line says what, no model is left that is not whole, a second run ends well."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import mergekit.io.tensor_writer
import mergekit.merge
import pytest
import torch
from conftest import assert_refused, check_message, fork, mergekit_yaml, read, slta, tensors
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from mergekit.scripts import run_yaml
from transformers import AutoModelForCausalLM, PretrainedConfig

from mergekit_slta.files import output_folder as outfolder
from mergekit_slta.files import statistics_file as gram
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.host import method
from mergekit_slta.job import preflight
from mergekit_slta.job.preflight import prepare
from mergekit_slta.models.skeleton import Skeleton
from mergekit_slta.runtime import activations as tape
from mergekit_slta.runtime import resume as records
from mergekit_slta.runtime.interruption import interruptible

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
NO_MEMORY = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: not enough memory: you tried to allo"
)


def failing(function: Callable, error: BaseException | Callable[[], None], call: int = 1, only: str = "") -> Callable:
    """A function whose n-th call fails (of those that have `only` in an argument), or does something else before."""
    count = 0

    def wrapped(*args, **kwargs):
        nonlocal count
        count += not only or any(only in str(part) for part in args)
        if count == call and (not only or any(only in str(part) for part in args)):
            if isinstance(error, BaseException):
                raise error
            error()
        return function(*args, **kwargs)

    return wrapped


INTERRUPTED = "interrupted-run"
# where it strikes, what it does, which call of it, the code of the error, what the line names
FAULTS = {
    "disk full at a record": (records, "save_file", FULL, 2, "disk-full", "No space left on device"),
    "disk full at the statistics": (gram, "save_file", FULL, 1, "disk-full", "No space left on device"),
    "disk full at a shard": (mergekit.io.tensor_writer.safetensors.torch, "save_file", FULL, 1, "merge-failed",
                             "No space left on device"),
    "disk full at the config": (PretrainedConfig, "save_pretrained", FULL, 1, "merge-failed",
                                "No space left on device"),
    "disk full at the features": (tape, "mapped", FULL, 1, "disk-full", "use fewer rows"),
    "no memory in a block": (Skeleton, "block", NO_MEMORY, 5, "out-of-memory", "`max_seq_length`"),
    "no memory in a merge": (method, "merge_tensor", MemoryError(), 4, "merge-failed", "(MemoryError)"),
    "interrupted in a block": (Skeleton, "block", KeyboardInterrupt(), 5, INTERRUPTED, "1 finished part is kept"),
    "interrupted in a backward pass": (torch.autograd, "grad", KeyboardInterrupt(), 20, INTERRUPTED, "are kept"),
    "interrupted in a merge": (method, "merge_tensor", KeyboardInterrupt(), 4, INTERRUPTED, "the weights of the"),
    "interrupted at a shard": (
        mergekit.io.tensor_writer.safetensors.torch, "save_file", KeyboardInterrupt(), 1, INTERRUPTED,
        "the weights of the"),
    "an input/output error in a merge": (method, "merge_tensor", OSError(errno.EIO, os.strerror(errno.EIO)), 2,
                                         "merge-failed", "(OSError): [Errno 5] Input/output error"),
}  # fmt: skip
GRADIENTS = ("disk full at the features", "interrupted in a backward pass")


def assert_no_half_model(out: Path, before: dict | None) -> None:
    """OUT holds no model, or what was there before."""
    if before is None:
        assert not (out / "config.json").exists()
        assert not outfolder.weight_files(out) if out.is_dir() else True
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    else:
        found = tensors(out)
        assert found.keys() == before.keys()
        assert all(torch.equal(found[name], part) for name, part in before.items())


@pytest.fixture(scope="module")
def sound(plenty, tmp_path_factory):
    """(objective) -> (recipe, alphas, tensors) of a merge that nothing happens to."""
    known = {}

    def make(objective: str):
        if objective not in known:
            import yaml

            folder = tmp_path_factory.mktemp(objective)
            own = {"steps": 1} if objective == "joint" else {}
            recipe = plenty.recipe(objective=objective, num_samples=3, **own)
            (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
            result = mergekit_yaml(folder / "recipe.yml", folder / "out", "--quiet")
            assert result.exit_code == 0, result.output
            alphas = Alphas.load(folder / "out" / "slta_alphas.json").submodules
            known[objective] = folder / "recipe.yml", alphas, tensors(folder / "out")
        return known[objective]

    return make


def assert_runs_again(recipe: Path, out: Path, alphas, merged) -> None:
    result = mergekit_yaml(recipe, out, "--quiet")
    assert result.exit_code == 0, result.output
    assert Alphas.load(out / "slta_alphas.json").submodules == alphas
    found = tensors(out)
    assert all(torch.equal(found[name], part) for name, part in merged.items())
    left = [path.name for folder in (out, out.parent) for path in folder.iterdir() if path.name.startswith(".")]
    assert not left


def assert_interrupted(result, *values: object) -> None:
    """One line, and the exit code of a process that the signal has ended."""
    assert result.exit_code == 130
    (line,) = [line for line in result.output.splitlines() if line.startswith("Interrupted")]
    assert line == result.output.splitlines()[-1]
    check_message(line, "interrupted-run", *values)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_said_and_leaves_nothing_half_done(sound, tmp_path, monkeypatch, fault):
    place, name, error, call, code, value = FAULTS[fault]
    recipe, alphas, merged = sound("joint" if fault in GRADIENTS else "features")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(place, name, failing(getattr(place, name), error, call))
        result = mergekit_yaml(recipe, out, "--quiet")
    if code == INTERRUPTED:
        assert_interrupted(result, value)
    else:
        assert_refused(result, code, value, exit_code=2 if code == "disk-full" else 1)
    assert_no_half_model(out, None)
    assert_runs_again(recipe, out, alphas, merged)


@pytest.mark.parametrize(("settings", "call", "said"), [
    ({"granularity": "model"}, 1, "a calibration with `granularity: model` starts over"),
    ({}, 1, "nothing is finished yet"),
    ({"direction": "swudi_a"}, 1, "the finished part of the direction is kept"),
], ids=["model", "first block", "after the direction"])  # fmt: skip
def test_an_interruption_says_how_to_go_on(tiny, tmp_path, write_recipe, monkeypatch, settings, call, said):
    """What goes on, and what starts over: in the stock command and the project's own."""
    recipe = write_recipe(tiny.recipe(2, num_samples=2, **settings))
    for number, command in enumerate((mergekit_yaml, lambda *given: slta("merge", *given))):
        with monkeypatch.context() as patch:
            for name in ("block", "layer"):
                patch.setattr(Skeleton, name, failing(getattr(Skeleton, name), KeyboardInterrupt(), call))
            result = command(recipe, tmp_path / f"out{number}")
        assert_interrupted(result, said)
        assert_no_half_model(tmp_path / f"out{number}", None)


def test_an_interruption_before_the_calibration(tiny, tmp_path, write_recipe, monkeypatch):
    """Nothing is there yet but what was downloaded. `check` and Python's `check` have nothing that could go on."""
    recipe = tiny.recipe(2)
    monkeypatch.setattr(preflight, "load_tokenizer", failing(preflight.load_tokenizer, KeyboardInterrupt()))
    assert_interrupted(mergekit_yaml(write_recipe(recipe), tmp_path / "out"), "finished downloads are kept")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(preflight, "load_tokenizer", failing(preflight.load_tokenizer, KeyboardInterrupt()))
    assert_interrupted(slta("calibrate", write_recipe(recipe), "-o", tmp_path / "a.json"), "downloads are kept")
    monkeypatch.setattr(preflight, "load_tokenizer", failing(preflight.load_tokenizer, KeyboardInterrupt()))
    assert slta("check", write_recipe(recipe)).output.splitlines()[-1] == "Aborted!"
    with pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(preflight, "load_tokenizer", failing(preflight.load_tokenizer, KeyboardInterrupt()))
        prepare(read(recipe), MergeOptions(quiet=True))


def test_a_program_gets_its_own_interrupt(tiny, tmp_path, monkeypatch, capsys):
    """Who calls `run_merge` from Python gets the line and the KeyboardInterrupt; other merges are not touched."""
    monkeypatch.setattr(Skeleton, "block", failing(Skeleton.block, KeyboardInterrupt(), 5))
    configuration = MergeConfiguration.model_validate(tiny.recipe(2, num_samples=2))
    with pytest.raises(KeyboardInterrupt):
        mergekit.merge.run_merge(configuration, str(tmp_path / "out"), MergeOptions(quiet=True))
    assert capsys.readouterr().err.startswith("Interrupted: 1 finished part is kept; run the same command again")
    with pytest.raises(KeyboardInterrupt), interruptible(lambda: "outer"), interruptible(lambda: "inner"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "Interrupted: inner\n"


def test_a_shard_that_goes_missing_meanwhile(make_models, tmp_path, write_recipe, monkeypatch):
    """Somebody moves a model while it is read: its name is said; when it is back, the run goes on."""
    models = make_models("llama", num_experts=1)
    recipe = write_recipe(models.recipe())
    shard = sorted(models.experts[0].glob("*.safetensors"))[-1]
    away = tmp_path / "away"
    with monkeypatch.context() as patch:
        patch.setattr(Skeleton, "block", failing(Skeleton.block, lambda: shard.rename(away), 2))
        result = mergekit_yaml(recipe, tmp_path / "out", "--quiet")
    away.rename(shard)
    assert_refused(result, "merge-failed", shard.name, exit_code=1)
    assert_no_half_model(tmp_path / "out", None)
    assert mergekit_yaml(recipe, tmp_path / "out", "--quiet").exit_code == 0


def test_clocks_that_jump_change_nothing(sound, tmp_path, monkeypatch):
    """Backwards, forwards and to the same second: nothing but the progress bar looks at them."""
    recipe, alphas, merged = sound("features")
    readings = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: float(next(readings)))
    assert_runs_again(recipe, tmp_path / "out", alphas, merged)


SIGNALS = {
    "SIGTERM in a block": ("SIGTERM", Skeleton, "block", 5, ""),
    "SIGKILL in a backward pass": ("SIGKILL", torch.autograd, "grad", 20, ""),
    "SIGKILL in a merge": ("SIGKILL", method, "merge_tensor", 4, ""),
    "SIGTERM while moving in": ("SIGTERM", os, "replace", 1, "model"),
}


def merge_struck_by(case: str, *arguments: str) -> None:
    """The stock command, that sends itself a signal at a certain moment."""
    name, place, function, call, only = SIGNALS[case]
    number = getattr(signal, name)
    setattr(place, function, failing(getattr(place, function), lambda: os.kill(os.getpid(), number), call, only))
    run_yaml.main(arguments)


@pytest.mark.process
@pytest.mark.parametrize("case", SIGNALS)
def test_a_signal_leaves_nothing_half_done(sound, tmp_path, case):
    """A process that a signal ends leaves a model that is whole, or none, and the next run ends well."""
    recipe, alphas, merged = sound("joint" if "backward" in case else "features")
    out = tmp_path / "out"
    result = fork(merge_struck_by, case, str(recipe), str(out), "--quiet", cwd=tmp_path).ended()
    assert result.returncode == -getattr(signal, SIGNALS[case][0]), result.stderr
    with contextlib.suppress(OSError, ValueError):
        AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
        found = tensors(out)  # it loads: then it is whole
        assert all(torch.equal(found[key], part) for key, part in merged.items())
    assert_runs_again(recipe, out, alphas, merged)


def merge_with_little_memory(*arguments: str) -> None:
    """The stock command in an address space that ends with the first block."""
    import resource

    def hungry() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, used + 2**20))
        torch.empty(2**24)

    Skeleton.block = failing(Skeleton.block, hungry)
    run_yaml.main(arguments)


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the address space is read from /proc")
def test_too_little_memory_is_said(tiny, tmp_path, write_recipe):
    """An address space that ends (`prlimit --as`, `ulimit -v`): one line with the knobs, or with the cause."""
    path = write_recipe(tiny.recipe())
    result = fork(merge_with_little_memory, str(path), str(tmp_path / "out"), "--quiet", cwd=tmp_path).ended()
    assert_refused(result, "out-of-memory", "`max_seq_length`", exit_code=1)
    assert not (tmp_path / "out").exists()
