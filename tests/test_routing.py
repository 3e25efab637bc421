"""The tokens that a merged model with experts sends to others than the experts' own models do."""

from __future__ import annotations

import pytest
import torch
from conftest import mergekit_yaml, read
from transformers import AutoModelForCausalLM

from mergekit_slta import Alphas
from mergekit_slta.calibration.calibrate import gather_statistics, solve_job
from mergekit_slta.calibration.routing import is_routing_wanted
from mergekit_slta.job.preflight import prepare

pytestmark = pytest.mark.zoo
ROUTERS = {"mixtral": "mlp.gate", "qwen2_moe": "mlp.gate", "qwen3_moe": "mlp.gate"}


def chosen(path, rows, router, count):
    """The sets of experts of every token, layer by layer: the largest logits of the router."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found = []
    for layer in model.model.layers:
        module = layer.get_submodule(router)
        module.register_forward_hook(
            lambda own, inputs, _: found.append((inputs[0].flatten(0, -2) @ own.weight.T).topk(count).indices)
        )
    for ids in rows:
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]), use_cache=False)
    return [set(row.tolist()) for part in found for row in part]


@pytest.mark.parametrize("name", ROUTERS)
def test_rerouted_tokens_are_counted(specimen, write_recipe, tmp_path, options, name):
    """The share in the alphas file and the card is that of whole models; the router has weights of its own."""
    models = specimen(name)
    recipe = models.recipe(num_samples=4, max_seq_length=12, granularity="linear")
    out = tmp_path / "out"
    result = mergekit_yaml(write_recipe(recipe), out, "--quiet", card=True)
    assert result.exit_code == 0, result.output
    alphas = Alphas.load(out / "slta_alphas.json")
    assert f"model.layers.0.{ROUTERS[name]}" in {entry.name for entry in alphas.submodules if entry.kind == "linear"}
    job = prepare(read(recipe), options)
    shares = []
    for place, (task, drawn) in enumerate(zip(alphas.calibration["tasks"], job.rows, strict=True)):
        rows = [list(row.ids) for row in drawn.rows]
        merged = chosen(out, rows, ROUTERS[name], 2)
        expert = chosen(models.experts[place], rows, ROUTERS[name], 2)
        shares.append(sum(one != other for one, other in zip(merged, expert, strict=True)) / len(merged))
        assert task["rerouted"] == pytest.approx(shares[-1])
        assert f"{shares[-1]:.1%}" in (out / "README.md").read_text()
    assert 0 < max(shares) < 0.5


def test_models_without_experts_are_not_measured(job):
    alphas = solve_job(job, gather_statistics(job))
    assert not is_routing_wanted(job, alphas)
