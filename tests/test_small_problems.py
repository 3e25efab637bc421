"""Trained experts of examples/small_problems: `joint` against `features` on fresh rows; shared rows, weak experts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PLAIN_JOINT
from example_scripts import EXAMPLES, importable

from mergekit_slta.calibration.calibrate import calibrate
from mergekit_slta.maths.ridges import SMALLEST_RIDGE

UPDATES, BASE_UPDATES, ROWS = 80, 200, 160
"""Training updates and calibration rows: fewer than in the example."""
NUMBERS = {"plain": 0, "weak": 33, "shared": 42}
"""Problems with the same base."""
SMALL_STEPS = {**PLAIN_JOINT, "num_samples": 16, "steps": 3}

pytestmark = pytest.mark.example


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    """The example's modules, with less training."""
    with importable(EXAMPLES / "small_problems"), pytest.MonkeyPatch.context() as patch:
        import problems
        import run

        train = problems.train
        patch.setattr(
            problems, "train", lambda model, rows, updates, rate: train(model, rows, min(updates, BASE_UPDATES), rate)
        )
        patch.setitem(run.METHODS, "features", {"objective": "features", "num_samples": 16})
        patch.setitem(run.METHODS, "joint", SMALL_STEPS)
        yield SimpleNamespace(problems=problems, run=run)


@pytest.fixture(scope="module")
def made(example, tmp_path_factory):
    """Make a problem by its kind: (problem, folder)."""
    folder = tmp_path_factory.mktemp("problems")
    kept: dict[str, tuple[object, Path]] = {}

    def make(kind: str):
        if kind not in kept:
            given = example.problems.problem(NUMBERS[kind])
            given = dataclasses.replace(given, updates=(UPDATES,) * len(given.tasks), num_rows=ROWS, tied=False)
            assert given.kind == kind
            example.problems.make(given, folder / kind)
            kept[kind] = given, folder / kind
        return kept[kind]

    return make


@pytest.mark.parametrize("kind", NUMBERS)
def test_joint_is_not_worse_than_features_on_fresh_rows(example, made, kind):
    """The mean divergence of 200 fresh rows of each task, paired, by no more than two standard errors."""
    found = example.run.run_problem(*made(kind), ["features", "joint"])
    joint = found["methods"]["joint"]
    difference, error = joint["difference"]
    assert 0 < error < 0.1
    assert difference < 2 * error
    assert joint["merge"].startswith("step ")
    assert found["methods"]["features"]["difference"] == [0.0, 0.0]


def shares(alphas) -> list[float]:
    return [task.share.mean for task in alphas.evaluation.tasks]


@pytest.mark.parametrize(("steps", "names"), [(0, 2), (2, 1), (2, 2)])
def test_two_experts_on_one_file(made, example, steps, names):
    """Or on the same rows in another order, under another name: flagged, and the weights stay where they make sense."""
    given, folder = made("plain")
    recipe = example.problems.recipe(given, folder, objective="joint", num_samples=18, steps=steps)
    lines = [(folder / f"rows{task}.jsonl").read_text().splitlines()[:15] for task in (0, 1)]
    mixed = [line for pair in zip(*lines, strict=True) for line in pair]
    for number, entry in enumerate(recipe["models"]):
        path = folder / f"mixed{number % names}.jsonl"
        path.write_text("\n".join(mixed[:: 1 - 2 * (number % names)]) + "\n")
        entry["parameters"]["dataset"] = str(path)
    alphas = calibrate(recipe)
    tasks = alphas.calibration["tasks"]
    assert all("shared_rows" in task["flags"] for task in tasks)
    assert all(-1 < value < 2.5 for entry in alphas.submodules for value in entry.alpha)
    assert max(shares(alphas)) < 1
    if steps == 0:
        assert alphas.calibration["ridge_used"] > SMALLEST_RIDGE


@pytest.mark.parametrize("steps", [0, 2])
def test_a_weak_expert_does_not_take_over(made, example, steps, caplog):
    """Adding an expert with 1% of a real change is said, and hardly harms the other tasks."""
    given, folder = made("plain")
    recipe = example.problems.recipe(given, folder, **PLAIN_JOINT, num_samples=16, steps=steps)
    without = calibrate(recipe)
    weak, weak_folder = made("weak")
    (place,) = weak.weak
    recipe["models"].append(example.problems.recipe(weak, weak_folder)["models"][place])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        alphas = calibrate(recipe)
    tasks = alphas.evaluation.tasks
    assert ["weak_expert" in task.flags for task in tasks] == [False, False, True]
    (line,) = [message for message in caplog.messages if "hardly differs from the base" in message]
    assert str(weak_folder / f"expert{place}") in line
    before, after = shares(without), shares(alphas)[:2]
    assert sum(after) < sum(before) + 0.1
    assert max(after) < 1
