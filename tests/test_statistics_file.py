"""Statistics: added up right, saved whole, and refused when damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_slta.errors import AlphasError, OutputError
from mergekit_slta.files.evaluation import SearchRecord
from mergekit_slta.files.statistics_file import Statistics


def sample() -> Statistics:
    statistics = Statistics(torch.tensor([0, 0, 1]), 2, metadata={"fingerprint": "abc"})
    statistics.add("head", [2, 0], torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)), [2, 3])
    return statistics


def test_parts_add_up():
    """The head arrives in parts of the vocabulary: their Gram matrices are summed."""
    deltas = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    whole = Statistics(torch.tensor([0, 1]), 2)
    whole.add("head", [1, 0], deltas, [2, 3])
    parts = Statistics(torch.tensor([0, 1]), 2)
    for part in deltas.split(3, dim=2):
        parts.add("head", [1, 0], part, [2, 3])
    torch.testing.assert_close(parts.by_submodule["head"], whole.by_submodule["head"], rtol=1e-12, atol=1e-12)


DAMAGES = {
    "missing": "missing-file", "text": "unreadable-file", "truncated": "unreadable-file",
    "foreign": "wrong-file-type", "shape": "damaged-file", "nan": "damaged-file", "task": "damaged-file",
    "not square": "damaged-file",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_statistics_are_refused(tmp_path: Path, damage: str):
    """A missing, foreign, truncated or inconsistent file is an AlphasError, whatever is wrong with it."""
    path = tmp_path / "stats.safetensors"
    statistics = sample()
    if damage == "shape":
        statistics.by_submodule["other"] = torch.zeros(3, 3, 3, dtype=torch.float64)
    if damage == "not square":
        statistics.by_submodule = {"head": torch.zeros(len(statistics.row_task), 3, 2, dtype=torch.float64)}
    if damage == "nan":
        statistics.by_submodule["head"][0, 0, 0] = float("nan")
    if damage == "task":
        statistics.row_task[0] = 7
    statistics.save(path)
    if damage == "missing":
        path.unlink()
    if damage == "text":
        path.write_text("not a safetensors file")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    if damage == "foreign":
        save_file({"a": torch.zeros(1)}, path)
    with refused(AlphasError, DAMAGES[damage], path):
        Statistics.load(path)


def test_failed_save_leaves_the_old_file(tmp_path: Path):
    """Where the folder cannot be written to, the error says so and nothing changes."""
    (tmp_path / "file").write_text("in the way")
    with refused(OutputError, "cannot-write", tmp_path / "file"):
        sample().save(tmp_path / "file" / "stats.safetensors")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("changes", [{"format": "other"}, {"version": "2"}, {"version": "4"}])
def test_statistics_of_another_version(tmp_path, changes):
    """A file of another format or version is refused, with what to do."""
    sound = Statistics(torch.zeros(1, dtype=torch.int64), 1, {"m": torch.ones(1, 1, 1, dtype=torch.float64)})
    path = tmp_path / "slta_stats.safetensors"
    sound.save(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file(load_file(path), path, metadata={**header, **changes})
    with refused(AlphasError, "wrong-file-type" if "format" in changes else "other-file-version", path):
        Statistics.load(path)


def random(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def slopes() -> Statistics:
    """Derivatives of two submodules for 3 rows, 2 label samples and 2 experts."""
    parts = {name: random(3, 2, 2) for name in ("embed", "head")}
    group = torch.tensor([0, 1, 0])
    return Statistics(torch.tensor([0, 1, 1]), 2, parts, form="slope", row_group=group, losses=random(3, 2))


def points(rows: int = 4) -> Statistics:
    """3 measured models of two submodules and 2 experts."""
    parts = {name: random(3, 2) for name in ("embed", "head")}
    task = torch.arange(rows) % 2
    return Statistics(task, 2, parts, {"points": "[]"}, "point", random(rows, 3), losses=random(rows, 4))


@pytest.mark.parametrize("make", [sample, slopes, points, lambda: points(0)])
def test_every_form_comes_back_to_the_bit(tmp_path: Path, make):
    """Also measured models without rows to measure them on."""
    statistics = make()
    statistics.save(tmp_path / "stats.safetensors")
    loaded = Statistics.load(tmp_path / "stats.safetensors")
    assert (loaded.form, loaded.num_models, loaded.metadata) == (statistics.form, 2, statistics.metadata)
    assert loaded.by_submodule.keys() == statistics.by_submodule.keys()
    assert all(torch.equal(part, loaded.by_submodule[name]) for name, part in statistics.by_submodule.items())
    for field in ("row_task", "divergences", "row_group", "losses"):
        given, found = getattr(statistics, field), getattr(loaded, field)
        assert (given is None and found is None) or torch.equal(given, found)


def test_the_same_statistics_give_the_same_bytes(tmp_path: Path):
    """safetensors alone writes the metadata in an order that changes; names are of any script."""
    statistics = replace(sample(), metadata={"one": 'Ω "é"\n\t\x1f\x7f', "other": "2"})
    for number in range(12):
        statistics.save(tmp_path / f"{number}.safetensors")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert Statistics.load(tmp_path / "0.safetensors").metadata == statistics.metadata


def test_losses_of_base_and_expert_are_the_first_and_the_last():
    losses = points().losses
    assert torch.equal(points().losses_of_base_and_expert, torch.stack([losses[:, 0], losses[:, 3]], dim=1))
    assert torch.equal(slopes().losses_of_base_and_expert, slopes().losses)
    assert sample().losses_of_base_and_expert is None


def test_selected_rows_keep_what_belongs_to_them():
    statistics = slopes()
    for rows in (torch.tensor([2, 0]), torch.tensor([True, False, True])):
        some = statistics.select(rows)
        assert all(torch.equal(part, statistics.by_submodule[name][rows]) for name, part in some.by_submodule.items())
        for field in ("row_task", "row_group", "losses"):
            assert torch.equal(getattr(some, field), getattr(statistics, field)[rows])


NAN = float("nan")
UNFIT = {
    "no divergences": (points, {"divergences": None}),
    "a model without divergences": (points, {"divergences": random(4, 2)}),
    "a row without divergences": (points, {"divergences": random(3, 3)}),
    "divergences of another kind": (points, {"divergences": random(4, 3).float()}),
    "divergences that are no numbers": (points, {"divergences": random(4, 3) * NAN}),
    "losses of too few models": (points, {"losses": random(4, 3)}),
    "losses of another kind": (points, {"losses": random(4, 4).float()}),
    "groups of measured models": (points, {"row_group": torch.zeros(4, dtype=torch.int64)}),
    "alphas of other shapes": (points, {"by_submodule": {"embed": random(3, 2), "head": random(2, 2)}}),
    "alphas that are no numbers": (points, {"by_submodule": {"embed": random(3, 2) * NAN}}),
    "alphas of each row": (points, {"by_submodule": {"embed": random(4, 3, 2)}}),
    "a task that is not there": (points, {"row_task": torch.tensor([0, 1, 2, 0])}),
    "another form": (points, {"form": "slope"}),
    "divergences of derivatives": (slopes, {"divergences": random(3, 1)}),
    "groups of other rows": (slopes, {"row_group": torch.zeros(2, dtype=torch.int64)}),
    "groups that are no numbers": (slopes, {"row_group": random(3)}),
    "losses of other rows": (slopes, {"losses": random(2, 2)}),
    "groups of Gram matrices": (sample, {"row_group": torch.zeros(3, dtype=torch.int64)}),
    "an unknown form": (sample, {"form": "step"}),
}


@pytest.mark.parametrize("damage", UNFIT)
def test_parts_that_do_not_fit_together_are_refused(tmp_path: Path, damage: str):
    """One line, not a wrong solve."""
    make, changes = UNFIT[damage]
    statistics = make()
    for field, value in changes.items():
        setattr(statistics, field, value)
    statistics.save(tmp_path / "stats.safetensors")
    with refused(AlphasError, "damaged-file", tmp_path / "stats.safetensors"):
        Statistics.load(tmp_path / "stats.safetensors")


@pytest.mark.parametrize(
    ("record", "fits"),
    [
        ({"points": [{"name": "base"}, {"name": "average"}, {"name": "step 1", "ridge": 0.3}]}, True),
        ({"points": [{"name": "base"}] * 3, "optimism": [0.1, 0.2], "unchanged": {"embed": [1]}}, True),
        ({"points": [{"name": "base"}] * 2}, False),
        ({"points": [{"name": "base"}] * 3, "optimism": [0.1]}, False),
        ({"points": [{"name": "base"}] * 3, "trials": [{"name": "step 1"}]}, False),
        ({}, False),
        (None, False),
    ],
)
def test_measured_models_have_a_record(record, fits):
    """Names of as many models as there are; anything else is refused."""
    statistics = points()
    statistics.metadata = {} if record is None else {"search": json.dumps(record)}
    if fits:
        assert [point.name for point in SearchRecord.of(statistics).points] == [
            each["name"] for each in record["points"]
        ]
        return
    with refused(AlphasError, "damaged-file"):
        SearchRecord.of(statistics)
