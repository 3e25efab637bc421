"""Several processes: the same alphas as one, and no hang when one of them dies."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import WORDS, Forked, assert_refused, fork, own_command, refused, slta
from hypothesis import given
from hypothesis import strategies as st
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_slta.calibration.reuse import help_calibrate
from mergekit_slta.data.batches import BATCH_TOKENS, plan_batches, plan_packs
from mergekit_slta.errors import RunError
from mergekit_slta.job.preflight import prepare
from mergekit_slta.maths.ridges import FIRST_RIDGES
from mergekit_slta.recipe.read import read_recipe
from mergekit_slta.runtime import distributed
from mergekit_slta.runtime.distributed import Ranks, joined, own_device

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def start_together(folder: Path, count: int, *arguments: str) -> list[Forked]:
    """As many processes as torchrun would start, in its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = ["calibrate", "recipe.yml", *arguments]
    return [
        fork(own_command, *command, cwd=folder, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(count)
    ]


def started_together(folder: Path, count: int, *arguments: str) -> tuple[list[int], str]:
    """Exit codes and output of such processes."""
    ended = [process.ended() for process in start_together(folder, count, *arguments)]
    return [each.returncode for each in ended], "".join(each.stdout + each.stderr for each in ended)


def launched(folder: Path, count: int, *arguments: str) -> tuple[list[int], str]:
    """The same by torchrun itself."""
    command = [*TORCHRUN, str(count), "-m", "mergekit_slta", "calibrate", "recipe.yml", *arguments]
    ended = subprocess.run(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=120,
    )  # fmt: skip
    return [ended.returncode], ended.stdout


def alphas_of(path: Path) -> list[list[float]]:
    return [entry["alpha"] for entry in json.loads(path.read_text())["submodules"]]


@pytest.mark.process
@pytest.mark.parametrize(
    ("start", "count", "settings"),
    [
        (launched, 2, {"granularity": "attn_mlp"}),
        (started_together, 3, {"granularity": "layer", "inputs": "merged"}),
        (started_together, 2, {"objective": "joint", "steps": 1}),
    ],
)
def test_processes_equal_one(make_models, tmp_path, start, count, settings):
    """To 1e-10, at one thread each; only the first process writes and speaks."""
    recipe = make_models("llama", num_experts=2).recipe(num_samples=8, max_seq_length=240, **settings)
    num_rows = 16 if "objective" in settings else 8  # some are held out
    for number, model in enumerate(recipe["models"]):  # rows enough for every process to have several packs
        path = tmp_path / f"long{number}.jsonl"
        rng = random.Random(number)
        rows = [{"text": " ".join(rng.choices(WORDS, k=170 + 10 * row))} for row in range(num_rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        model["parameters"]["dataset"] = str(path)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    one = slta("calibrate", tmp_path / "recipe.yml", "-o", tmp_path / "one" / "slta_alphas.json", "--quiet")
    assert one.exit_code == 0, one.output
    codes, output = start(tmp_path, count, "-o", "many/slta_alphas.json")
    assert not any(codes), output
    assert output.count("Written:") == 1
    calibration = json.loads((tmp_path / "one" / "slta_alphas.json").read_text())["calibration"]
    tokens = sum(task["tokens"] for task in calibration["tasks"])
    assert tokens > count * BATCH_TOKENS
    first = alphas_of(tmp_path / "one" / "slta_alphas.json")
    for mine, theirs in zip(first, alphas_of(tmp_path / "many" / "slta_alphas.json"), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-10)
    one_file, many = (json.loads((tmp_path / name / "slta_alphas.json").read_text()) for name in ("one", "many"))
    if "objective" in settings:
        trials = [[trial["weighted"] for trial in file["evaluation"]["trials"]] for file in (one_file, many)]
        assert len(trials[0]) == len(FIRST_RIDGES)
        assert trials[0] == pytest.approx(trials[1], rel=1e-5)
    shared = many["calibration"]
    for task, other in zip(calibration["tasks"], shared["tasks"], strict=True):
        losses = [task["loss_base"], task["loss_expert"]]
        assert losses == pytest.approx([other["loss_base"], other["loss_expert"]], abs=1e-10)


@pytest.mark.process
def test_a_dead_process_ends_the_job(make_models, tmp_path):
    """SIGKILL to one of two: within 30 s the other one ends with exit code 1, and says what has happened."""
    models = make_models("llama", num_experts=2, num_layers=24)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(models.recipe(num_samples=12, max_seq_length=200)))
    first, second = start_together(tmp_path, 2, "-o", "slta_alphas.json", "--quiet")
    records = tmp_path / ".slta_alphas.json.partial"
    while first.process.is_alive() and len(list(records.glob("*.safetensors"))) < 2:
        time.sleep(0.005)
    second.process.kill()
    begin = time.monotonic()
    left = first.ended()
    assert time.monotonic() - begin < 30
    assert second.ended().returncode == -signal.SIGKILL
    assert_refused(left, "lost-process", "process 0 of 2", exit_code=1)
    assert not (tmp_path / "slta_alphas.json").exists()
    again = slta("calibrate", tmp_path / "recipe.yml", "-o", tmp_path / "slta_alphas.json")
    assert again.exit_code == 0, again.output
    assert "Resuming" in again.output


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 7))
def test_every_piece_has_one_taker(weights, size):
    """Shares are disjoint and cover all; none is heavier than the mean by more than the largest piece."""
    shares = [Ranks(rank, size).share(weights) for rank in range(size)]
    assert sorted(place for share in shares for place in share) == list(range(len(weights)))
    loads = [sum(weights[place] for place in share) for share in shares]
    assert max(loads) <= sum(weights) / size + max(weights)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=30), st.integers(0, 600))
def test_packs_hold_every_batch_in_order(lengths, limit):
    """Consecutive, complete, of one label, and within the limit unless a batch alone exceeds it."""
    batches = plan_batches([[0] * length for length in lengths], max_tokens=256)
    groups = [batch.rows[0] % 2 for batch in batches]
    packs = plan_packs(batches, limit, groups)
    assert [number for pack in packs for number in pack] == list(range(len(batches)))
    for pack in packs:
        assert len({groups[number] for number in pack}) == 1
        assert len(pack) == 1 or sum(sum(batches[number].lengths) for number in pack) <= limit


def test_each_process_has_its_accelerator(monkeypatch):
    """`cuda` becomes `cuda:LOCAL_RANK` in a launched process; a number that was given stays, and so does the CPU."""
    assert own_device("cuda") == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert own_device("cuda") == "cuda:2"
    assert own_device("cuda:0") == "cuda:0"
    assert own_device("cpu") == "cpu"
    assert own_device(None) is None


def test_processes_that_see_other_files_are_refused(tiny):
    """Matrices of other rows or models would add up to nonsense."""
    job = prepare(read_recipe(MergeConfiguration.model_validate(tiny.recipe(2))), MergeOptions(quiet=True))
    with refused(RunError, "processes-differ", "process 1 "):
        help_calibrate(job, Ranks(1, 2), "another fingerprint")


def test_a_process_whose_partner_is_gone(monkeypatch):
    """It names itself and how many there are, and what to do."""

    def fail(*_, **__):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(distributed.dist, "broadcast_object_list", fail)
    with refused(RunError, "lost-process", "process 1 of 2", "Connection closed by peer"):
        Ranks(1, 2).broadcast("something")


def test_processes_that_cannot_join(monkeypatch):
    """A process that torchrun has not told where the others are is refused."""
    for key, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    for key in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    with refused(RunError, "cannot-join-processes"), joined():
        pass


@pytest.mark.parametrize("rank", [0, 1])
def test_logging_is_as_before_once_the_processes_part(monkeypatch, rank):
    """Only the first process logs while they work together; the root logger's level comes back, after an error too."""
    monkeypatch.setattr(distributed, "is_launched", lambda: True)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    root = logging.getLogger()
    before = root.level
    with pytest.raises(KeyError), distributed.joined():
        assert root.level == (logging.ERROR if rank else before)
        raise KeyError
    assert root.level == before
