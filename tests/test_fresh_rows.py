"""Steps of the joint objective with rows of their own: what is kept of earlier rows, and what they cost."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import assert_applied, assert_refused, mergekit_yaml, refused, slta
from test_architectures import job_of, specimen  # noqa: F401 - a fixture
from test_backward import assert_close, whole_model
from test_gradient_passes import answer_log_probabilities, divergence, merged_model, same, slopes_of

from mergekit_slta.calibration.calibrate import gather_statistics
from mergekit_slta.errors import DataError
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.linearity_file import Linearity
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.job.layout import layout_of
from mergekit_slta.objectives.costs import estimate_gradients as estimate
from mergekit_slta.runner import head_loss


def fresh(models, steps: int, **settings):
    """A joint job whose steps have rows of their own."""
    usual = {"fresh_rows": True, "num_samples": 3, "label_samples": 1}
    return same(models, steps=steps, **{**usual, **settings})


def test_every_step_has_rows_of_its_own(specimen, monkeypatch):  # noqa: F811
    """The last step's rows against autograd at the point; the first step's as that step found them, moved there."""
    monkeypatch.setattr(head_loss, "label_uniforms", lambda *_: None)  # the rows' own tokens
    models = specimen("qwen3")
    job, layout = fresh(models, 2), layout_of(fresh(models, 2))
    found = gather_statistics(job)
    assert found.row_step.tolist() == [1, 1, 1, 2, 2, 2] * 2
    assert found.row_task.tolist() == [0] * 6 + [1] * 6
    drawn = {job.recipe.label(task.model): rows.rows for task, rows in zip(job.recipe.tasks, job.rows, strict=True)}
    numbers = [row.number for name in layout.canonical for row in drawn[name]]
    groups = [job.examples(group) for group in (0, 1)]
    assert [
        example.row.number for task in (0, 1) for group in groups for example in group if example.task == task
    ] == numbers
    assert len(set(numbers[:6])) == len(set(numbers[6:])) == 6

    experts = [whole_model(path) for path in models.experts]
    base, merged = whole_model(models.base), merged_model(models, job, found.point)
    for row, example in zip((found.row_step == 2).nonzero().flatten().tolist(), groups[1], strict=True):
        felt = divergence(experts[example.task], merged, example)
        at_base = divergence(experts[example.task], base, example)
        assert found.divergences[row].tolist() == pytest.approx([at_base.item(), felt.item()], rel=1e-4, abs=1e-5)
        wanted = torch.tensor(list(example.row.ids[example.row.completion :]))
        loss = -answer_log_probabilities(merged, example).gather(1, wanted[:, None]).sum()
        both = [slopes_of(part, merged, models, job) for part in (felt, loss)]
        own = {key: gram[row] for key, gram in found.by_submodule.items()}
        assert_close(own, {key: torch.stack([part[key] for part in both]) for key in own})

    first = gather_statistics(fresh(models, 1))
    assert first.row_step is None  # nothing to tell apart
    old = found.row_step == 1
    for name, gram in first.by_submodule.items():
        torch.testing.assert_close(found.by_submodule[name][old][:, 1:], gram[:, 1:], rtol=0, atol=0)
    torch.testing.assert_close(found.divergences[old][:, 0], first.divergences[:, 0], rtol=0, atol=0)
    names = list(first.by_submodule)
    whole = torch.cat([first.by_submodule[name] for name in names], dim=-1)  # [R, 1 + S, K]
    way = torch.cat([found.point[name] - first.point[name] for name in names])
    curved = torch.einsum("rsk,rsl,l->rk", whole[:, 1:], whole[:, 1:], way)  # one draw
    expected = whole[:, 0] + curved
    torch.testing.assert_close(torch.cat([found.by_submodule[name][old][:, 0] for name in names], dim=-1), expected)
    told = first.divergences[:, 1] + whole[:, 0] @ way + (whole[:, 1] @ way).square() / 2
    torch.testing.assert_close(found.divergences[old][:, 1], told)


def test_fresh_rows_from_recipe_to_model(tiny, tmp_path, write_recipe):
    """By the stock command, which does so by default, with a weight for every matrix; the file lists every row, and
    the statistics hold them with their steps."""
    recipe = tiny.recipe_with_answers(objective="joint", steps=3, num_samples=2)
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out", "--quiet", card=True)
    assert result.exit_code == 0, result.output
    alphas = assert_applied(tiny, tmp_path / "out")
    assert alphas.calibration["fresh_rows"] is True
    assert alphas.granularity == "linear"
    assert "task, in 4 solves in turn, without training" in (tmp_path / "out" / "README.md").read_text()
    assert [len(task["rows"]) for task in alphas.calibration["tasks"]] == [6, 6, 6]
    statistics = Statistics.load(tmp_path / "out" / "slta_stats.safetensors")
    assert statistics.row_step.tolist() == [1, 1, 2, 2, 3, 3] * 3
    stats = tmp_path / "out" / "slta_stats.safetensors"
    for option in ((), ("--rows", "2")):
        result = slta("solve", stats, *option, "-o", tmp_path / "same.json")
        assert result.exit_code == 0, result.output
        assert Alphas.load(tmp_path / "same.json").submodules == alphas.submodules
        assert "2 rows for each step" in result.output
    for rows in ("1", "6"):
        result = slta("solve", stats, "--rows", rows, "-o", tmp_path / "other.json")
        assert_refused(result, "needs-calibration", "`steps: 3`", "`num_samples`")
    result = slta("linearity", write_recipe(recipe), "-o", tmp_path / "linearity.json", "--quiet")
    assert result.exit_code == 0, result.output
    assert [len(task["rows"]) for task in Linearity.load(tmp_path / "linearity.json").settings["tasks"]] == [2, 2, 2]
    recipe["parameters"] |= {"steps": 100}  # more than there are rows: no step is taken
    result = slta("linearity", write_recipe(recipe), "-o", tmp_path / "linearity.json", "--quiet")
    assert result.exit_code == 0, result.output
    assert "Already" in result.output
    result = slta("linearity", write_recipe(recipe), "--rows", "1", "-o", tmp_path / "one.json", "--quiet")
    assert result.exit_code == 0, result.output
    assert [len(task["rows"]) for task in Linearity.load(tmp_path / "one.json").settings["tasks"]] == [1, 1, 1]


def test_rows_of_their_own_are_split_evenly_where_there_are_too_few(specimen, caplog):  # noqa: F811
    """A dataset's rows in as many parts as there are steps; fewer rows than steps are refused."""
    models = specimen("qwen3")
    every = job_of(models, num_samples=1000)
    count = len(every.rows[0].rows)
    with caplog.at_level(logging.WARNING):
        job = same(models, fresh_rows=True, steps=3, num_samples=count)
    assert f"fewer than num_samples = {count} for each of 3 steps, {3 * count} in all: using all" in caplog.text
    sizes = [sum(example.task == 0 for example in job.examples(group)) for group in range(3)]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1
    with refused(DataError, "too-few-rows", f"has {count} rows for {count + 1} steps"):
        same(models, fresh_rows=True, steps=count + 1)


def test_where_there_is_one_step_rows_of_its_own_say_nothing(specimen):  # noqa: F811
    models = specimen("qwen3")
    labels = [same(models, steps=1, fresh_rows=each).identity for each in (False, True)]
    assert labels[0] == labels[1]
    assert fresh(models, 2).identity["fresh_rows"] == "True"


def test_costs_of_rows_of_their_own_are_counted(specimen):  # noqa: F811
    """As many passes as without, but each row in one step alone: forward through base and expert, and there."""
    models = specimen("qwen3")
    job = fresh(models, 3)
    costs = estimate(job)
    tokens = [sum(len(example.row.ids) for example in job.examples(group)) for group in range(3)]
    once = estimate(same(models, steps=0, label_samples=1, num_samples=9))
    expected = 4 * tokens[0] + sum(tokens[1:]) + (1 + 6) * sum(tokens)
    assert costs.flops / once.flops == pytest.approx(expected / (5 * sum(tokens)))
