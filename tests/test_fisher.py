"""`objective: fisher` against whole models: outputs by hooks, their gradients by autograd, sums written out."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import mergekit_yaml, slta
from test_architectures import job_of, specimen  # noqa: F401 - a fixture
from test_gradients import row_loss, whole_model
from torch.func import functional_call
from zoo import ZOO

from mergekit_slta.alphas import Alphas
from mergekit_slta.calibration import gather_statistics
from mergekit_slta.costs import estimate
from mergekit_slta.gradients import Backward
from mergekit_slta.passes import examples_of


def outputs_and_gradients(model, modules: dict[str, torch.nn.Module], ids, first) -> dict[str, tuple]:
    """name -> (positional inputs, keyword inputs, d loss / d output) of modules in one forward and backward pass."""
    seen: dict[str, list] = {}

    def hook(name):
        def keep(_, args, kwargs, output):
            output = output[0] if isinstance(output, tuple) else output
            output.retain_grad()
            seen[name] = [args, kwargs, output]

        return keep

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    model.zero_grad()
    row_loss(model, ids, first).backward()
    for handle in handles:
        handle.remove()
    return {name: (args, kwargs, output.grad) for name, (args, kwargs, output) in seen.items()}


@pytest.mark.parametrize("name", ZOO)
def test_layers_equal_autograd(specimen, monkeypatch, name):  # noqa: F811
    """Layers, the embeddings and the logits: every model's output on expert a's inputs, under expert a's gradients."""
    monkeypatch.setattr(Backward, "_heights", lambda *_: None)
    models = specimen(name)
    job = job_of(models, granularity="layer", objective="fisher", label_samples=1)
    found = gather_statistics(job)
    assert found.form == "gram"
    every = [whole_model(path) for path in (models.base, *models.experts)]
    for model in every:
        model.config.use_cache = False
    paths = [submodule.name for submodule in job.submodules if submodule.layer is not None]
    for row, example in enumerate(examples_of(job)):
        expert = every[example.task + 1]
        layers = {path: expert.get_submodule(path) for path in paths}
        head = expert.get_output_embeddings()
        seen = outputs_and_gradients(expert, {**layers, "head": head}, example.ids, example.completion)
        for path in paths:
            args, kwargs, gradient = seen[path]
            made = []
            for model in every:
                output = functional_call(
                    expert.get_submodule(path), dict(model.get_submodule(path).named_parameters()), args, kwargs
                )
                made.append((output[0] if isinstance(output, tuple) else output).detach())
            felt = torch.stack([((output - made[0]) * gradient).sum(-1).flatten() for output in made[1:]]).double()
            torch.testing.assert_close(
                found.grams[path][row], felt @ felt.T, rtol=2e-4, atol=1e-5 * float((felt @ felt.T).max())
            )
        torch.testing.assert_close(found.grams["head"][row], head_gram(job, every, example, seen), rtol=2e-4, atol=1e-6)


def head_gram(job, every, example, seen) -> torch.Tensor:
    """[T, T] of the logits: every model's norm and projection on what has left expert a's last layer."""
    features = []
    last = every[example.task + 1].get_submodule(f"{job.skeleton.layers_path}.{job.skeleton.num_layers - 1}")
    handle = last.register_forward_hook(
        lambda _, __, output: features.append(output[0] if isinstance(output, tuple) else output)
    )
    every[example.task + 1](torch.tensor([list(example.ids)]), use_cache=False)
    handle.remove()
    asked = slice(example.completion - 1, len(example.ids) - 1)
    gradient = seen["head"][2].reshape(len(example.ids), -1)[asked]
    logits = []
    for model in every:
        handle = model.get_submodule(f"{job.skeleton.layers_path}.{job.skeleton.num_layers - 1}").register_forward_hook(
            lambda _, __, output: (features[0], *output[1:]) if isinstance(output, tuple) else features[0]
        )
        scaled = []
        inner = model.get_output_embeddings().register_forward_hook(
            lambda _, __, output, into=scaled: into.append(output)
        )
        model(torch.tensor([list(example.ids)]), use_cache=False)
        handle.remove()
        inner.remove()
        logits.append(scaled[0].reshape(len(example.ids), -1)[asked].detach())
    felt = torch.stack([((made - logits[0]) * gradient).sum(-1) for made in logits[1:]]).double()
    return felt @ felt.T


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt_neox", "phi3", "gpt2", "cohere_plain"])
def test_blocks_equal_autograd(specimen, monkeypatch, name):  # noqa: F811
    """Attention and MLP blocks, by probes that are added to the residual stream where a block's output stands."""
    if name not in ZOO:
        pytest.skip("not in the zoo")
    monkeypatch.setattr(Backward, "_heights", lambda *_: None)
    models = specimen(name)
    job = job_of(models, granularity="attn_mlp", objective="fisher", label_samples=1)
    found = gather_statistics(job)
    every = [whole_model(path) for path in (models.base, *models.experts)]
    arch, skeleton = job.skeleton.arch, job.skeleton
    for row, example in enumerate(examples_of(job)):
        expert = every[example.task + 1]
        for index in range(skeleton.num_layers):
            path = f"{skeleton.layers_path}.{index}"
            layer = expert.get_submodule(path)
            for branch in (arch.attention, arch.mlp):
                name_of = f"{path}.{branch}"
                owned = next(entry for entry in job.submodules if entry.name == name_of).tensors
                after = BEHIND.get(name, {}).get(branch, branch)
                gradient = branch_gradient(expert, layer.get_submodule(after), example)
                made = [branch_output(expert, f"{path}.{after}", model, owned, example, skeleton) for model in every]
                felt = torch.stack([((output - made[0]) * gradient).sum(-1).flatten() for output in made[1:]]).double()
                expected = felt @ felt.T
                torch.testing.assert_close(
                    found.grams[name_of][row], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
                )


@pytest.mark.parametrize("name", ["cohere_plain", "falcon_7b"])
def test_shared_norms_equal_autograd(specimen, monkeypatch, name):  # noqa: F811
    """A norm that feeds both blocks is a submodule of its own."""
    monkeypatch.setattr(Backward, "_heights", lambda *_: None)
    models = specimen(name)
    job = job_of(models, granularity="attn_mlp", objective="fisher", label_samples=1)
    found = gather_statistics(job)
    every = [whole_model(path) for path in (models.base, *models.experts)]
    rename = job.skeleton.renamed
    norms = [entry.name for entry in job.submodules if entry.kind == "norm"]
    paths = {path: rename.get(f"{path}.weight", f"{path}.weight").removesuffix(".weight") for path in norms}
    assert paths
    for row, example in enumerate(examples_of(job)):
        expert = every[example.task + 1]
        modules = {path: expert.get_submodule(theirs) for path, theirs in paths.items()}
        seen = outputs_and_gradients(expert, modules, example.ids, example.completion)
        for path, theirs in paths.items():
            args, _, gradient = seen[path]
            made = [model.get_submodule(theirs)(*args).detach() for model in every]
            felt = torch.stack([((output - made[0]) * gradient).sum(-1).flatten() for output in made[1:]]).double()
            expected = felt @ felt.T
            torch.testing.assert_close(
                found.grams[path][row], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
            )


BEHIND = {"gemma2": {"self_attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}}
"""Norms behind a branch: what is added to the residual stream is theirs."""


def branch_gradient(model, after, example) -> torch.Tensor:
    """d loss / d what a branch adds to the residual stream, by a probe on the output of the module `after`."""
    probe = []

    def add(_, __, output):
        given = output[0] if isinstance(output, tuple) else output
        extra = torch.zeros_like(given, requires_grad=True)
        probe.append(extra)
        return (given + extra, *output[1:]) if isinstance(output, tuple) else given + extra

    handle = after.register_forward_hook(add)
    model.zero_grad()
    row_loss(model, example.ids, example.completion).backward()
    handle.remove()
    return probe[0].grad


def branch_output(expert, path, model, owned, example, skeleton) -> torch.Tensor:
    """What the branch adds in expert a's forward pass, with the tensors of the block taken from `model`."""
    rename = skeleton.renamed
    theirs = dict(model.named_parameters())
    changed = {rename.get(name, name): theirs[rename.get(name, name)] for name in owned}
    made = []
    handle = expert.get_submodule(path).register_forward_hook(
        lambda _, __, output: made.append((output[0] if isinstance(output, tuple) else output).detach())
    )
    functional_call(expert, changed, (torch.tensor([list(example.ids)]),), {"use_cache": False})
    handle.remove()
    return made[0]


def test_from_recipe_to_model_by_the_stock_command(tiny, tmp_path, write_recipe):
    """All that follows a calibration works as for features: solve again, leave an expert out, figures."""
    recipe = tiny.recipe_with_answers(objective="fisher")
    assert mergekit_yaml(write_recipe(recipe), tmp_path / "out", "--quiet").exit_code == 0
    alphas = Alphas.load(tmp_path / "out" / "slta_alphas.json")
    assert alphas.calibration["objective"] == "fisher"
    assert alphas.calibration["ridge"] == 0.0
    statistics = tmp_path / "out" / "slta_stats.safetensors"
    assert slta("solve", statistics, "--ridge", "0.1", "--no-balance", "-o", tmp_path / "other.json").exit_code == 0
    assert Alphas.load(tmp_path / "other.json").submodules != alphas.submodules
    assert slta("solve", statistics, "--without", "expert2", "-o", tmp_path / "fewer.json").exit_code == 0
    recipe["models"].pop(1)
    assert slta("calibrate", write_recipe(recipe), "-o", tmp_path / "fresh.json", "--quiet").exit_code == 0
    fewer, fresh = json.loads((tmp_path / "fewer.json").read_text()), json.loads((tmp_path / "fresh.json").read_text())
    for entry, other in zip(fewer["submodules"], fresh["submodules"], strict=True):
        assert entry["alpha"] == pytest.approx(other["alpha"], rel=1e-4, abs=1e-6)
    assert slta("export", tmp_path / "out" / "slta_alphas.json", "-o", tmp_path / "stock.yml").exit_code == 0
    assert slta("report", statistics, "-o", tmp_path / "figures").exit_code == 0
    result = slta("calibrate", write_recipe(recipe), "--verify", "-o", tmp_path / "verified.json", "--quiet")
    assert result.exit_code == 2
    assert "drop --verify" in result.output


def test_draws_average_and_costs_are_counted(specimen, monkeypatch):  # noqa: F811
    """The same labels drawn three times give what they give once; their number is in the price."""
    models = specimen("llama")
    with monkeypatch.context() as patch:
        patch.setattr(Backward, "_heights", lambda *_: None)
        once, often = (gather_statistics(job_of(models, objective="fisher", label_samples=count)) for count in (1, 3))
    for name, gram in once.grams.items():
        torch.testing.assert_close(often.grams[name], gram, rtol=1e-6, atol=1e-12)
    job = job_of(models, objective="fisher", label_samples=3)
    dear, cheap = estimate(job), estimate(job_of(models, objective="joint", label_samples=3, steps=0))
    assert dear.flops / cheap.flops == pytest.approx((8 + 3) / 8)
