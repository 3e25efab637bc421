"""How long a job takes: work over rates, without a clock that runs; and what is said, recorded and shown."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import PLAIN_JOINT, mergekit_yaml, slta
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_slta.files.merge_record import recorded, recorded_took
from mergekit_slta.files.output_folder import files_in
from mergekit_slta.job import forecast as forecasts
from mergekit_slta.job.preflight import prepare
from mergekit_slta.objectives.registry import estimate
from mergekit_slta.recipe.read import read_recipe
from mergekit_slta.runtime import rates
from mergekit_slta.runtime.clock import Clock, describe_phases, describe_seconds
from mergekit_slta.runtime.rates import EIGH, Phase, Rates, measure_rates

CPU = torch.device("cpu")


class Ticking:
    """A clock that goes on by a second whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1
        return self.now

    monotonic = perf_counter


def test_seconds_are_work_over_rates():
    """Each kind of work is divided by its own rate. A device with a queue prepares while it computes."""
    phase = Phase("steps", {"float32": 8.0, EIGH: 3.0}, touched_bytes=10.0, streamed_bytes=6.0, operations=4.0,
                  read_bytes=30, written_bytes=40)  # fmt: skip
    found = Rates({"float32": 2.0, EIGH: 1.0}, touched=5.0, streamed=3.0, operation=0.5, read=10.0)
    computing, preparing, moving = 4 + 3 + 2 + 2, 2, 3 + 1
    assert found.seconds(phase) == computing + preparing + moving
    queued = Rates(found.flops, found.touched, found.streamed, 10.0, found.read, is_queued=True)
    assert queued.seconds(phase) == 40 + moving


def test_rates_are_work_over_time(monkeypatch):
    """With a clock of one second per measurement, a rate is the amount of work itself."""
    monkeypatch.setattr(rates, "time", Ticking())
    pieces = [lambda: (700, torch.zeros(1)), lambda: (300, torch.zeros(1))]
    found = measure_rates(CPU, torch.float32, ["float32", "float64", EIGH], (4, 8, 16), pieces)
    assert found.flops == {"float32": 2 * 4 * 8 * 16, "float64": 2 * 4 * 8 * 16, EIGH: 10 * 8**3}
    assert (found.touched, found.operation, found.read) == (5 * 4 * 16 * 4, 0.01, 500)
    assert not found.is_queued
    assert measure_rates(CPU, torch.float32, [], (4, 8, 16), []).read == found.streamed / 2


def prepared(recipe: dict, **options):
    read = read_recipe(MergeConfiguration.model_validate(recipe))
    return prepare(read, MergeOptions(quiet=True, **options), plan_only=True)


JOBS = {
    "features": ({}, ["features", "merge"]),
    "features, measured": ({"evaluate": True, "num_samples": 12}, ["features", "measuring", "merge"]),
    "joint": ({**PLAIN_JOINT, "num_samples": 4, "steps": 2}, ["features", "steps", "measuring", "merge"]),
    "joint at the experts": ({**PLAIN_JOINT, "num_samples": 3, "steps": 0}, ["steps", "measuring", "merge"]),
    "with a direction": (
        {**PLAIN_JOINT, "num_samples": 4, "steps": 1, "direction": "swudi_a"},
        ["direction", "features", "steps", "measuring", "merge"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_phases_add_up_to_the_costs(specimen, with_rows, write_recipe, name):
    """All products, all bytes, and all of a closed form belong to a phase. Losses are computed for answers alone, and
    share products among them, so the projection's products may be fewer; attention's scores come on top."""
    settings, names = JOBS[name]
    job = prepared(with_rows(specimen("qwen3")).recipe(2, **settings))
    costs = estimate(job)
    assert [phase.name for phase in costs.phases] == names
    calibration, merge = costs.phases[:-1], costs.phases[-1]
    read = sum(phase.read_bytes for phase in calibration if phase.name != "direction")
    assert read == pytest.approx(costs.read_bytes, abs=len(calibration))
    assert merge.written_bytes == costs.written_bytes
    products = sum(phase.product_flops for phase in calibration)
    assert 0.7 * costs.flops < products < 1.2 * costs.flops
    wide = sum(flops for phase in calibration for kind, flops in phase.flops.items() if kind in (EIGH, "float64"))
    assert wide == pytest.approx(costs.combine_flops)


def test_check_prints_json(tiny, write_recipe, monkeypatch):
    """Numbers alone, of every phase; the text names the same seconds."""
    monkeypatch.setattr(forecasts, "rates_of", lambda *_: Rates({"float32": 1e9}, 1e9, 1e9, 1e-6, 1e9))
    path = write_recipe(tiny.recipe(2))
    result = slta("check", path, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [phase["name"] for phase in found["phases"]] == ["features", "merge"]
    assert found["seconds"] == pytest.approx(sum(phase["seconds"] for phase in found["phases"]))
    numbers = {"flops", "combine_flops", "read_bytes", "written_bytes", "scratch_bytes", "peak_bytes", "library_bytes",
               "largest_bytes", "download_bytes", "submodules"}  # fmt: skip
    assert all(isinstance(found[key], (int, float)) for key in numbers)
    assert {*found["phases"][0]} == {"name", "flops", "touched_bytes", "streamed_bytes", "operations", "read_bytes",
                                     "written_bytes", "seconds"}  # fmt: skip
    assert [expert["rows"] for expert in found["experts"]] == [len(rows.rows) for rows in prepared(tiny.recipe(2)).rows]
    text = slta("check", path).stdout
    assert f"takes       about {describe_seconds(found['seconds'])}" in text
    for phase in found["phases"]:
        (line,) = (line for line in text.splitlines() if line.startswith(phase["name"]))
        assert describe_seconds(phase["seconds"]) in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_here_is_not_measured(tiny, write_recipe):
    """The plan is printed, and why it names no time; in JSON the time is null."""
    path = write_recipe(tiny.recipe(2))
    result = slta("check", path, "--cuda")
    assert result.exit_code == 0, result.output
    assert (
        "takes       a time that is not known: it needs a trial on cuda, which cannot be used here now" in result.stdout
    )
    found = json.loads(slta("check", path, "--cuda", "--json").stdout)
    assert found["seconds"] is None
    assert {phase["seconds"] for phase in found["phases"]} == {None}
    assert not found["device_is_here"]


def test_a_device_without_room_is_not_refused(tiny, write_recipe, monkeypatch, caplog):
    """Another process may use it now: `check` names no time, and warns."""

    def fail(*_, **__):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(forecasts, "measure_rates", fail)
    result = slta("check", write_recipe(tiny.recipe(2)))
    assert result.exit_code == 0, result.output
    assert "takes       a time that is not known" in result.stdout
    assert "cpu could not be tried" in caplog.text


def test_pieces_are_read_from_the_checkpoints(tiny):
    """The pieces that are read are bytes of the models' files; a machine that has none of these reads nothing."""
    job = prepared(tiny.recipe(2))
    pieces = [each() for each in forecasts._pieces(job)]
    assert pieces
    assert all(count == placed.numel() * 4 and placed.dtype == torch.float32 for count, placed in pieces)


def test_a_merge_records_what_it_took(tiny, write_recipe, tmp_path):
    """In the record, which names no hash of itself, and in the card; the alphas file stays the same in every run."""
    path, out = write_recipe(tiny.recipe(2)), tmp_path / "out"
    assert mergekit_yaml(path, out, "--quiet", card=True).exit_code == 0
    took = recorded_took(out)
    assert took is not None
    assert list(took.seconds) == ["features", "merge"]
    assert (took.device, took.threads, took.device_bytes) == ("cpu", torch.get_num_threads(), None)
    assert {*recorded(out)} == {*files_in(out)} - {"slta_merge.json"}
    card = (out / "README.md").read_text()
    assert f"The merge took {describe_phases(took.seconds)} (on `cpu`" in card
    assert "seconds" not in (out / "slta_alphas.json").read_text()
    assert mergekit_yaml(path, out, "--quiet", card=True).exit_code == 0  # the alphas are there
    again = recorded_took(out)
    assert again is not None
    assert list(again.seconds) == ["merge"]


@pytest.mark.parametrize(
    "took", [None, 3, {}, {"seconds": {}}, {"seconds": {"merge": "long"}, "device": "cpu", "threads": 1},
             {"seconds": {"merge": float("inf")}, "device": "cpu", "threads": 1}, {"seconds": {"merge": 1.0}}],
    ids=str,
)  # fmt: skip
def test_a_strange_record_says_nothing(tmp_path, took):
    content = {"format": "mergekit-slta/merge", "version": 1, "files": {}, "took": took}
    (tmp_path / "slta_merge.json").write_text(json.dumps(content))
    assert recorded_took(tmp_path) is None


def test_a_clock_adds_up_phases(monkeypatch):
    """A phase that is entered twice, or left by an error, counts each time."""
    monkeypatch.setattr("mergekit_slta.runtime.clock.time", Ticking())
    clock = Clock()
    with clock.phase("steps"):
        pass
    with pytest.raises(ZeroDivisionError), clock.phase("steps"):
        _ = 1 / 0
    with clock.phase("merge"):
        pass
    assert clock.seconds == {"steps": 2, "merge": 1}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (4.26, "4.3 s"), (42.0, "42 s"), (99.6, "1.7 min"), (1500, "25 min"), (9000, "2.5 h")],
)
def test_times_have_two_digits(seconds, text):
    assert describe_seconds(seconds) == text
