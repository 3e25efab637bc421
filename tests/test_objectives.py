"""An objective is one row and one file: a new one merges without a change anywhere else."""

from __future__ import annotations

import ast
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import assert_refused, mergekit_yaml, slta, tensors

import mergekit_slta
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.maths.closed_form import Solution
from mergekit_slta.objectives.costs import estimate_features
from mergekit_slta.objectives.registry import Objective, Solved
from mergekit_slta.objectives.solving import make_entry
from mergekit_slta.recipe.objectives import OBJECTIVES, ObjectiveRow, ObjectiveSettings, register_objective

PACKAGE = Path(mergekit_slta.__file__).parent
SHARE = 0.25


class FixedSettings(ObjectiveSettings):
    """One key of its own: the weight of every expert in every submodule."""

    fixed_weight: float = SHARE


def gather(job, resume, ranks):
    """No rows are needed: an empty matrix for every submodule."""
    row_task = torch.tensor([example.task for example in job.examples()])
    shape = (len(row_task), len(job.experts), len(job.experts))
    matrices = {submodule.name: torch.zeros(shape, dtype=torch.float64) for submodule in job.submodules}
    return Statistics(row_task, len(job.experts), matrices)


def solve(statistics, layout):
    """The same weight everywhere."""
    weight = layout.settings["fixed_weight"]
    count = len(layout.models)
    solution = Solution((weight,) * count, None, 1.0, count, 0.0, (False,) * count, ())
    return Solved(tuple(make_entry(layout, submodule, solution) for submodule in layout.submodules))


@pytest.fixture
def fixed(monkeypatch):
    """The objective `fixed`, known for one test."""
    module = types.ModuleType("fixed_objective")
    module.OBJECTIVE = Objective(gather, solve, estimate_features)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(OBJECTIVES, "fixed", None)
    register_objective(
        ObjectiveRow("fixed", module.__name__, FixedSettings, ("layer", "attn_mlp"), {"granularity": "layer"})
    )


@pytest.mark.parametrize(("settings", "weight"), [({}, SHARE), ({"fixed_weight": 0.5}, 0.5)])
def test_a_registered_objective_merges(fixed, tiny, write_recipe, tmp_path, settings, weight):
    """A stock merge uses the new objective's default granularity, its own key, and its weights."""
    recipe = write_recipe(tiny.recipe(objective="fixed", **settings))
    result = mergekit_yaml(recipe, tmp_path / "out", "--quiet", card=True)
    assert result.exit_code == 0, result.output
    alphas = Alphas.load(tmp_path / "out" / "slta_alphas.json")
    assert alphas.granularity == "layer"
    base, *experts = [tensors(path) for path in (tiny.base, *tiny.experts)]
    for name, tensor in tensors(tmp_path / "out").items():
        expected = base[name] + sum(weight * (expert[name] - base[name]) for expert in experts)
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    assert "fixed" in (tmp_path / "out" / "README.md").read_text()


def test_what_a_registered_objective_does_not_have_is_refused(fixed, tiny, write_recipe, tmp_path):
    """Its granularities hold, and its keys are no other objective's."""
    for settings, code, value in (
        ({"objective": "fixed", "granularity": "linear"}, "conflicting-keys", "layer, attn_mlp"),
        ({"objective": "fixed", "steps": 2}, "key-of-another-objective", "`objective: joint`"),
        ({"fixed_weight": 0.5}, "key-of-another-objective", "`objective: fixed`"),
    ):
        assert_refused(slta("check", write_recipe(tiny.recipe(**settings))), code, value)
    result = slta("merge", write_recipe(tiny.recipe(objective="fixed")), tmp_path / "out", "--verify", "--quiet")
    assert_refused(result, "conflicting-keys", "--verify")


def test_no_other_file_names_an_objective():
    """An objective's name stands in its row and in its own files, and once as the default of the recipe's key."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).as_posix()
        if own.startswith("objectives/") or own == "recipe/objectives.py":
            continue
        names = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        found += [own for name in names if isinstance(name, str) and name in OBJECTIVES]
    assert found == ["recipe/settings.py"]
