"""`tolerance`: no more rows than it takes."""

from __future__ import annotations

import pytest
import torch
import yaml
from conftest import slta
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_slta.alphas import Alphas
from mergekit_slta.calibration import calibrate, gather_statistics, used_rows
from mergekit_slta.preflight import prepare
from mergekit_slta.recipe import read_recipe


def job_of(recipe):
    return prepare(read_recipe(MergeConfiguration.model_validate(recipe)), MergeOptions(quiet=True))


def test_generous_tolerance_takes_three_rows(tiny, options):
    """The file names the rows that were used, the first of those drawn, and equals a calibration with just these."""
    loose = calibrate(tiny.recipe(2, num_samples=10, tolerance=10.0), options)
    every = calibrate(tiny.recipe(2, num_samples=10), options)
    used = [task["rows"] for task in loose.calibration["tasks"]]
    assert [len(rows) for rows in used] == [3, 3]
    assert used == [task["rows"][:3] for task in every.calibration["tasks"]]
    statistics = gather_statistics(job_of(tiny.recipe(2, num_samples=10)))
    first = torch.tensor([0, 1, 2, 10, 11, 12])
    few = gather_statistics(job_of(tiny.recipe(2, num_samples=10, tolerance=10.0)))
    for name, grams in few.grams.items():
        torch.testing.assert_close(grams, statistics.grams[name][first], rtol=1e-4, atol=1e-8)


def test_tight_tolerance_takes_all(tiny, options):
    """Then nothing differs from a calibration without: same rows, same alphas but for rounding in other batches."""
    tight = calibrate(tiny.recipe(2, num_samples=10, tolerance=1e-12), options)
    every = calibrate(tiny.recipe(2, num_samples=10), options)
    assert [len(task["rows"]) for task in tight.calibration["tasks"]] == [10, 10]
    for one, other in zip(tight.submodules, every.submodules, strict=True):
        assert one.alpha == pytest.approx(other.alpha, abs=1e-5)


def test_the_largest_error_is_within(tiny, options):
    """It stops at the first of 3, 6, 12 rows where every standard error is small enough."""
    rows = [
        len(calibrate(tiny.recipe(2, num_samples=12, tolerance=tolerance), options).calibration["tasks"][0]["rows"])
        for tolerance in (1e9, 1e-1, 3e-2, 1e-12)
    ]
    assert rows == sorted(rows)
    assert rows[0] == 3
    assert rows[-1] == 12
    for tolerance in (1e-1, 3e-2):
        alphas = calibrate(tiny.recipe(2, num_samples=12, tolerance=tolerance), options)
        largest = max(max(entry.stderr) for entry in alphas.submodules)
        assert largest <= tolerance or len(alphas.calibration["tasks"][0]["rows"]) == 12


def test_reuse_and_solving_again(tiny, tmp_path):
    """A second run finds the file; another `ridge` solves from the same few rows; verifying uses them, too."""
    recipe = tiny.recipe(2, num_samples=8, tolerance=10.0)
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    target = tmp_path / "slta_alphas.json"
    assert slta("calibrate", path, "-o", target, "--quiet").exit_code == 0
    assert "Already" in slta("calibrate", path, "-o", target).output
    recipe["parameters"]["ridge"] = 0.1
    path.write_text(yaml.safe_dump(recipe))
    result = slta("calibrate", path, "-o", target, "--verify")
    assert result.exit_code == 0, result.output
    assert "Solving again" in result.output
    alphas = Alphas.load(target)
    assert [len(task["rows"]) for task in alphas.calibration["tasks"]] == [3, 3]
    assert alphas.submodules[0].residual_measured is not None
    assert slta("solve", tmp_path / "slta_stats.safetensors", "-o", tmp_path / "again.json").exit_code == 0
    again = Alphas.load(tmp_path / "again.json")
    assert [entry.alpha for entry in again.submodules] == [entry.alpha for entry in alphas.submodules]


def test_merged_inputs_need_all_rows(tiny, write_recipe):
    """Rows that come later cannot enter what was merged before."""
    result = slta("check", write_recipe(tiny.recipe(2, inputs="merged", tolerance=0.1)))
    assert result.exit_code == 2
    assert "drop one of the two" in result.output


def test_used_rows_are_the_first(tiny):
    """`used_rows` cuts a job to what its statistics hold."""
    job = job_of(tiny.recipe(2, num_samples=8, tolerance=10.0))
    cut = used_rows(job, gather_statistics(job))
    assert [drawn.rows for drawn in cut.rows] == [drawn.rows[:3] for drawn in job.rows]


def test_a_tolerance_that_is_not_met_is_said(tiny, options, caplog):
    """All rows, and a line with the error that is left and what to do."""
    calibrate(tiny.recipe(2, num_samples=4, tolerance=1e-12), options)
    assert "all 4 rows of each task leave a standard error of" in caplog.text
    assert "raise `num_samples`" in caplog.text


def test_solving_again_asks_for_more_rows_where_it_has_to(tiny, tmp_path):
    """Statistics of few rows serve another `ridge` only as far as that is known within the tolerance, too."""
    recipe = tiny.recipe(2, num_samples=12, tolerance=0.0)
    path, target = tmp_path / "recipe.yml", tmp_path / "slta_alphas.json"

    def errors(rows: int) -> float:
        probe = {**recipe, "parameters": {**recipe["parameters"], "num_samples": rows}}
        alphas = calibrate(probe, MergeOptions(quiet=True))
        return max(max(entry.stderr) for entry in alphas.submodules)

    tight = errors(3)
    recipe["parameters"] |= {"tolerance": tight * 1.01, "ridge": 100.0}  # a ridge that leaves nothing to vary
    path.write_text(yaml.safe_dump(recipe))
    assert slta("calibrate", path, "-o", target, "--quiet").exit_code == 0
    assert len(Alphas.load(target).calibration["tasks"][0]["rows"]) == 3
    recipe["parameters"] |= {"ridge": 0.0}
    recipe["models"][0]["parameters"]["importance"] = 50.0
    path.write_text(yaml.safe_dump(recipe))
    assert slta("calibrate", path, "-o", target, "--quiet").exit_code == 0
    alphas = Alphas.load(target)
    largest = max(max(entry.stderr) for entry in alphas.submodules)
    assert largest <= tight * 1.01 or len(alphas.calibration["tasks"][0]["rows"]) == 12
