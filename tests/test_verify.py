"""`--verify`: the residual that remains in merged submodules, against models in memory."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import yaml
from conftest import assert_refused, refused, slta
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from reference import load, row_deltas

from mergekit_slta.calibration.calibrate import gather_statistics, solve_job
from mergekit_slta.calibration.verify import TOLERANCE, verify
from mergekit_slta.errors import RunError
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.job.preflight import prepare
from mergekit_slta.maths.closed_form import measured_residual
from mergekit_slta.recipe.read import read_recipe


def job_of(recipe):
    return prepare(read_recipe(MergeConfiguration.model_validate(recipe)), MergeOptions(quiet=True))


def merged_model(base, experts, alphas):
    """The whole merged model, by explicit arithmetic."""
    model = copy.deepcopy(base)
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            pieces = alphas.pieces(name)
            assert pieces is not None or tied
            for weight, expert in zip(pieces[0].alpha, experts, strict=True):
                parameter += weight * (expert.get_parameter(name) - base.get_parameter(name))
    return model


def residuals(rows, errors, changes, balance=True):
    """sum_a E errors / c over sum_a E ||df_a||^2 / c; rows are (task, error, [T] squared changes)."""
    tasks = sorted(set(rows))
    remaining = whole = 0.0
    for task in tasks:
        own = [place for place, other in enumerate(rows) if other == task]
        scale = [np.mean(changes[place]) if balance else 1.0 for place in own]
        remaining += np.mean([errors[place] / c for place, c in zip(own, scale, strict=True)])
        whole += np.mean([changes[place][task] / c for place, c in zip(own, scale, strict=True)])
    return remaining / whole


@pytest.mark.parametrize("inputs", ["base", "merged"])
@pytest.mark.parametrize(("granularity", "tied"), [("layer", False), ("attn_mlp", False), ("attn_mlp", True)])
def test_measured_residual_equals_models_in_memory(make_models, granularity, tied, inputs):
    """||f(x; merged) - f(x; theta_a)||^2 at the inputs of the base, or of the merged model."""
    models = make_models("llama", tied=tied)
    job = job_of(models.recipe(granularity=granularity, inputs=inputs, num_samples=3))
    statistics = gather_statistics(job)
    alphas = verify(job, solve_job(job, statistics), statistics)
    base, experts = load(models.base), [load(path) for path in models.experts]
    merged = merged_model(base, experts, alphas)
    rows, errors = [], {}
    for task, drawn in enumerate(job.rows):
        for row in drawn.rows:
            ids = list(row.ids)
            rows.append(task)
            if inputs == "base":
                deltas = row_deltas(base, [merged, experts[task]], ids, granularity)
                apart = {name: delta[0] - delta[1] for name, delta in deltas.items()}
            else:
                apart = {
                    name: delta[0] for name, delta in row_deltas(merged, [experts[task]], ids, granularity).items()
                }
            for name, difference in apart.items():
                errors.setdefault(name, []).append((difference**2).sum())
    for entry in alphas.submodules:
        names = ["embed", "head"] if tied and entry.name == "embed" else [entry.name]
        parts = []
        for name in names:
            changes = statistics.by_submodule[name].diagonal(dim1=1, dim2=2).numpy()
            parts.append((errors[name], changes))
        if len(parts) == 1:
            expected = residuals(rows, *parts[0])
            assert entry.residual_measured == pytest.approx(expected, rel=1e-3, abs=1e-6)
        parted = abs(entry.residual_measured - entry.residual) > TOLERANCE
        assert ("nonlinear" in entry.flags) == parted


def test_single_matrices_are_exactly_linear(tiny):
    """Property 2: under `linear` what is measured is what was predicted."""
    job = job_of(tiny.recipe(2, granularity="linear", num_samples=2))
    statistics = gather_statistics(job)
    for entry in verify(job, solve_job(job, statistics), statistics).submodules:
        assert entry.residual_measured == pytest.approx(entry.residual, rel=1e-3, abs=1e-6), entry.name
        assert "nonlinear" not in entry.flags


@pytest.mark.parametrize("granularity", ["model", "head_mlp"])
def test_whole_models_and_heads_are_measured(tiny, granularity):
    """Every entry has its figure; a model of large differences is flagged, as the paper would have it."""
    job = job_of(tiny.recipe(2, granularity=granularity, num_samples=2))
    statistics = gather_statistics(job)
    alphas = verify(job, solve_job(job, statistics), statistics)
    assert all(entry.residual_measured is not None for entry in alphas.submodules)
    if granularity == "model":
        base, experts = load(tiny.base), [load(path) for path in tiny.experts[:2]]
        merged = merged_model(base, experts, alphas)
        rows, errors = [], []
        for task, drawn in enumerate(job.rows):
            for row in drawn.rows:
                ids = torch.tensor([list(row.ids)])
                with torch.no_grad():
                    errors.append(float(((merged(ids).logits - experts[task](ids).logits).double() ** 2).sum()))
                rows.append(task)
        expected = residuals(rows, errors, statistics.by_submodule["model"].diagonal(dim1=1, dim2=2).numpy())
        assert alphas.submodules[0].residual_measured == pytest.approx(expected, rel=1e-3)


def test_closed_case_of_the_measure():
    """Two tasks, one row each, weights of 1 and 3: (1 * 2 + 3 * 5) / (1 * 4 + 3 * 9) without balancing."""
    grams = torch.tensor([[[4.0, 1.0], [1.0, 7.0]], [[8.0, 2.0], [2.0, 9.0]]], dtype=torch.float64)
    errors = torch.tensor([2.0, 5.0], dtype=torch.float64)
    task = torch.tensor([0, 1])
    found = measured_residual([errors], [grams], task, importance=[1.0, 3.0], balance=False)
    assert found == pytest.approx(17 / 31)
    zero = measured_residual([errors], [grams * 0], task, importance=[1.0, 1.0], balance=True)
    assert zero == 0.0


def test_commands_verify(make_models, tmp_path):
    """`calibrate --verify` and `merge --verify` store it; without the flag nothing is measured; alphas stay the same;
    a file at hand is verified without solving again."""
    models = make_models("llama")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump(models.recipe(num_samples=2)))
    plain, file = tmp_path / "plain.json", tmp_path / "slta_alphas.json"
    assert slta("calibrate", recipe, "-o", plain, "--quiet").exit_code == 0
    assert slta("calibrate", recipe, "-o", file, "--quiet").exit_code == 0
    assert Alphas.load(file).submodules[0].residual_measured is None
    assert slta("calibrate", recipe, "-o", file, "--quiet", "--verify").exit_code == 0
    verified = Alphas.load(file)
    assert all(entry.residual_measured is not None for entry in verified.submodules)
    assert [entry.alpha for entry in verified.submodules] == [entry.alpha for entry in Alphas.load(plain).submodules]
    result = slta("merge", recipe, tmp_path / "out", "--quiet", "--verify")
    assert result.exit_code == 0, result.output
    merged = Alphas.load(tmp_path / "out" / "slta_alphas.json")
    assert [entry.residual_measured for entry in merged.submodules] == [
        entry.residual_measured for entry in verified.submodules
    ]


def test_rows_are_needed_to_verify(make_models, tmp_path):
    """Alphas from a file, and no data: one line says so."""
    models = make_models("llama")
    file = tmp_path / "alphas.json"
    recipe = models.recipe(num_samples=2)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    assert slta("calibrate", tmp_path / "recipe.yml", "-o", file, "--quiet").exit_code == 0
    for model in recipe["models"]:
        del model["parameters"]
    recipe["parameters"]["alphas"] = str(file)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    result = slta("merge", tmp_path / "recipe.yml", tmp_path / "out", "--quiet", "--verify")
    assert_refused(result, "missing-dataset")
    assert not (tmp_path / "out").exists()


def test_features_without_end_are_named(tiny):
    """A residual of NaN or Inf is an error that says where, not a file that cannot be written."""
    job = job_of(tiny.recipe(2, granularity="layer", num_samples=2))
    statistics = gather_statistics(job)
    alphas = solve_job(job, statistics)
    huge = [entry.model_copy(update={"alpha": (1e38, 1e38)}) for entry in alphas.submodules]
    with refused(RunError, "not-finite", "merged features"):
        verify(job, alphas.model_copy(update={"submodules": tuple(huge)}), statistics)
