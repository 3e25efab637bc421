"""Alphas against the in-memory reference, and the runner against the model's own forward."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from conftest import refused
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from reference import reference_alphas
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_slta.calibration.calibrate import calibrate, gather_statistics, solve_job
from mergekit_slta.checkpoints.tensors import Checkpoints
from mergekit_slta.errors import ModelError, RunError
from mergekit_slta.job.preflight import prepare
from mergekit_slta.recipe.read import read_recipe


def job_of(recipe: dict, options: MergeOptions):
    return prepare(read_recipe(MergeConfiguration.model_validate(recipe)), options)


def token_rows(job) -> list[list[list[int]]]:
    return [[list(row.ids) for row in drawn.rows] for drawn in job.rows]


CASES = [
    ("llama", "attn_mlp", False, True, 3, torch.float32),
    ("llama", "layer", False, False, 4, torch.float32),
    ("mistral", "attn_mlp", True, False, 3, torch.bfloat16),
    ("qwen2", "layer", False, False, 2, torch.bfloat16),
]


@pytest.mark.parametrize(("family", "granularity", "balance", "tied", "experts", "dtype"), CASES)
def test_alphas_equal_the_reference(make_models, options, family, granularity, balance, tied, experts, dtype):
    """Streaming calibration gives the alphas of Eq. 10-14 and 33-34 on models held in memory, to 1e-4."""
    models = make_models(family, num_experts=experts, tied=tied, dtype=dtype)
    job = job_of(models.recipe(granularity=granularity, balance=balance), options)
    alphas = solve_job(job, gather_statistics(job))
    expected = reference_alphas(
        models.base, list(models.experts), token_rows(job), granularity, balance=balance, tied=tied
    )
    assert {entry.name for entry in alphas.submodules} == set(expected)
    for entry in alphas.submodules:
        np.testing.assert_allclose(entry.alpha, expected[entry.name], atol=1e-4, err_msg=entry.name)


def test_rows_have_unequal_lengths_and_are_cut(tiny, options):
    """The reference cases mean something: rows differ in length and some are cut to max_seq_length."""
    lengths = [len(row) for rows in token_rows(job_of(tiny.recipe(), options)) for row in rows]
    assert len(set(lengths)) > 3
    assert max(lengths) == 24
    assert sum(length == 24 for length in lengths) > 1


def test_importance_weighs_a_task(tiny, options):
    """`importance` multiplies a task's share in the objective, as in Eq. 13 with weights w_a."""
    recipe = tiny.recipe(2)
    recipe["models"][0]["parameters"]["importance"] = 5.0
    job = job_of(recipe, options)
    expected = reference_alphas(
        tiny.base, list(tiny.experts[:2]), token_rows(job), "attn_mlp", balance=True, tied=False, importance=[5.0, 1.0]
    )
    for entry in solve_job(job, gather_statistics(job)).submodules:
        np.testing.assert_allclose(entry.alpha, expected[entry.name], atol=1e-4)


def test_norms_belong_to_the_block_they_feed(tiny, options):
    """Llama's input_layernorm goes with attention, post_attention_layernorm with the MLP."""
    owner = {tensor: sub.name for sub in job_of(tiny.recipe(), options).submodules for tensor in sub.tensors}
    assert owner["model.layers.1.input_layernorm.weight"] == "model.layers.1.self_attn"
    assert owner["model.layers.1.post_attention_layernorm.weight"] == "model.layers.1.mlp"
    assert owner["model.norm.weight"] == "head"
    assert owner["model.embed_tokens.weight"] == "embed"


def test_order_of_models_does_not_move_a_digit(tiny, options):
    """Models are ordered canonically before a solve: reversing the recipe permutes the alphas, bit by bit."""
    forward = calibrate(tiny.recipe(), options)
    recipe = tiny.recipe()
    recipe["models"].reverse()
    backward = calibrate(recipe, options)
    assert backward.models == tuple(reversed(forward.models))
    for one, other in zip(forward.submodules, backward.submodules, strict=True):
        assert one.alpha == tuple(reversed(other.alpha))
        assert one.stderr == tuple(reversed(other.stderr))


def test_global_random_state_is_untouched(tiny, options):
    """Calibration draws from generators of its own."""
    random.seed(7)
    torch.manual_seed(7)
    np.random.seed(7)
    before = (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy())
    calibrate(tiny.recipe(2), options)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert (np.random.get_state()[1] == before[2]).all()


def test_expert_that_equals_the_base_is_unchanged(tiny, options):
    """An expert equal to the base gets alpha 0 everywhere and is marked, and moves nobody else's alpha."""
    import shutil

    copy = tiny.folder / "copy_of_base"
    if not copy.exists():
        shutil.copytree(tiny.base, copy)
    recipe = tiny.recipe(1)
    recipe["models"].append({"model": str(copy), "parameters": {"dataset": str(tiny.datasets[1])}})
    alphas = calibrate(recipe, options)
    for entry in alphas.submodules:
        assert entry.alpha[1] == 0.0
        assert entry.unchanged == (str(copy),)
        assert "unchanged" in entry.flags


def test_duplicated_experts_share_by_minimum_norm(tiny, options):
    """Two copies of one expert lose rank: equal alphas that add up to 1, and a flag."""
    import shutil

    copy = tiny.folder / "copy_of_expert1"
    if not copy.exists():
        shutil.copytree(tiny.experts[0], copy)
    recipe = tiny.recipe(1)
    recipe["models"].append({"model": str(copy), "parameters": {"dataset": str(tiny.datasets[0])}})
    for entry in calibrate(recipe, options).submodules:
        assert entry.alpha == pytest.approx((0.5, 0.5), abs=1e-6)
        assert entry.rank == 1
        assert "rank_deficient" in entry.flags


def test_nan_in_an_expert_is_named(tiny, options, tmp_path):
    """A NaN in one tensor of one expert stops the run with the tensor's and the expert's names."""
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(tiny.experts[1])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = float("nan")
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(tiny.base).save_pretrained(broken)
    recipe = tiny.recipe(2)
    recipe["models"][1]["model"] = str(broken)
    with refused(ModelError, "not-finite-weights", "model.layers.1.mlp.up_proj.weight", broken):
        calibrate(recipe, options)


def test_overflowing_features_are_named(make_models, options):
    """Features beyond float16's range stop the run and name the remedy."""
    models = make_models("llama")
    recipe = models.recipe(compute_dtype="float16")
    model = AutoModelForCausalLM.from_pretrained(models.base)
    huge = models.folder / "huge"
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e4)
        model.model.layers[0].self_attn.o_proj.weight.mul_(3e5)
    model.save_pretrained(huge)
    AutoTokenizer.from_pretrained(models.base).save_pretrained(huge)
    recipe["base_model"] = str(huge)
    with refused(ModelError, "not-finite-weights"):
        calibrate(recipe, options)


def test_one_step_of_each_model_is_alive_at_a_time(tiny, options, monkeypatch):
    """When a step's tensors are loaded, those of the step before are gone."""
    import weakref

    alive: list[weakref.ref] = []
    steps: list[list[str]] = []
    load = Checkpoints.load

    def watching(self, names, models=None):
        if names and [*names] not in steps[-1:]:  # the base's tensors and the experts' come in two calls
            assert not [ref() for ref in alive if ref() is not None]
            steps.append([*names])
        weights = load(self, names, models)
        alive.extend(weakref.ref(tensor) for own in weights for tensor in own.values())
        return weights

    # float64 makes every loaded tensor a copy of its own, none a view of the mapped file
    job = job_of(tiny.recipe(2, granularity="layer", compute_dtype="float64"), options)
    monkeypatch.setattr(Checkpoints, "load", watching)
    gather_statistics(job)
    assert len(alive) > 30
    assert len(steps) >= 3


@pytest.mark.parametrize("who", ["base", "expert"])
def test_features_that_overflow_are_named(tiny, options, tmp_path, who):
    """Weights that are finite in float16 and features that are not: the submodule, and the expert, are named."""
    source = tiny.base if who == "base" else tiny.experts[1]
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.norm.weight.fill_(6e4)
    model.save_pretrained(tmp_path / "large")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "large")
    recipe = tiny.recipe(2, compute_dtype="float16")
    if who == "base":
        recipe["base_model"] = str(tmp_path / "large")
    else:
        recipe["models"][1]["model"] = str(tmp_path / "large")
    named = ["the features behind head"] if who == "base" else [tmp_path / "large", "behind head"]
    with refused(RunError, "not-finite", *named):
        calibrate(recipe, options)
