"""The streamed backward pass against autograd over whole models in memory; labels; what a small step really does."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from conftest import PLAIN_JOINT, assert_applied, assert_refused, mergekit_yaml, slta
from test_architectures import job_of
from whole_models import assert_close, expert_slopes, loss, whole_model
from zoo import TYPICAL

from mergekit_slta.calibration.calibrate import gather_statistics, solve_job
from mergekit_slta.data.rows import Example, Row
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.models.submodules import partition
from mergekit_slta.objectives import gradient_passes
from mergekit_slta.reporting.card import section
from mergekit_slta.runner import head_loss
from mergekit_slta.runner.directional import BLOCK_ELEMENTS
from mergekit_slta.runner.head_loss import label_uniforms


def at_experts(models, **settings):
    """A joint job with one solve from derivatives at the experts."""
    return job_of(models, **PLAIN_JOINT, **{"granularity": "attn_mlp", "label_samples": 0, "steps": 0, **settings})


@pytest.mark.zoo
@pytest.mark.parametrize("granularity", ["attn_mlp", "linear"])
@pytest.mark.parametrize("name", TYPICAL)
def test_slopes_equal_autograd(specimen, name, granularity):
    models = specimen(name)
    job = at_experts(models, granularity=granularity)
    found = gather_statistics(job)
    assert found.form == "slope"
    assert_close({key: slopes[:, 0] for key, slopes in found.by_submodule.items()}, expert_slopes(models, job))


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        ("qwen3", "model"),
        ("llama", "layer"),
        *((name, "head_mlp") for name in ("llama", "qwen3", "phi3", "gpt2", "gpt_neox")),
    ],
)
def test_other_granularities(specimen, monkeypatch, name, granularity):
    """In blocks that are smaller than the tensors, and that heads' slices begin and end within."""
    monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", 100)
    models = specimen(name)
    job = at_experts(models, granularity=granularity)
    found = gather_statistics(job).by_submodule
    assert_close({key: slopes[:, 0] for key, slopes in found.items()}, expert_slopes(models, job))


def test_drawn_labels_follow_the_experts_distribution(specimen, monkeypatch):
    """Slopes of drawn labels are those of exactly these labels, whatever the number of positions in memory."""
    models = specimen("llama")
    job = at_experts(models, label_samples=3)
    drawn: list[torch.Tensor] = []
    original = head_loss.sample_labels

    def spy(probs, uniforms):
        drawn.append(original(probs, uniforms))
        return drawn[-1]

    monkeypatch.setattr(head_loss, "sample_labels", spy)
    monkeypatch.setattr(head_loss, "LOGIT_GRADIENTS", 320 * 5)  # five positions at a time
    monkeypatch.setattr(gradient_passes, "GRADIENT_TOKENS", 0)  # of one row
    found = gather_statistics(job).by_submodule
    labels: list[list[torch.Tensor]] = []  # row -> draw -> tokens
    for example in job.examples():
        parts = -(-(len(example.row.ids) - example.row.completion) // 5)
        labels.append(list(torch.cat([drawn.pop(0) for _ in range(parts)], dim=1)))
    for draw in range(3):
        expected = expert_slopes(models, job, [row[draw] for row in labels])
        assert_close({key: slopes[:, draw] for key, slopes in found.items()}, expected)
    monkeypatch.setattr(head_loss, "LOGIT_GRADIENTS", 2**24)
    again = gather_statistics(job).by_submodule
    assert_close(again, found)


def test_labels_follow_their_probabilities():
    """Over many draws their frequencies are the model's."""
    chances = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).repeat(20000, 1)
    uniforms = torch.rand((1, 20000), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = head_loss.sample_labels(chances, uniforms)[0]
    frequencies = torch.bincount(tokens, minlength=4) / len(tokens)
    assert torch.allclose(frequencies, chances[0], atol=0.02)
    assert frequencies[3] == 0


def test_labels_depend_on_the_seed_and_the_tokens_only():
    """Not on the row's number or on its expert, which may be another one without the expert before it; equal rows have
    labels of their own."""
    row = Row(3, "text", (5, 6, 7, 8), completion=2)
    numbers = label_uniforms(Example(row, 1), 2, 42)
    assert numbers.shape == (2, 2)
    assert numbers.dtype == torch.float64
    assert torch.equal(label_uniforms(Example(Row(9, "other", row.ids, 2), 0), 2, 42), numbers)
    for other in (
        label_uniforms(Example(row, 1, repeat=1), 2, 42),
        label_uniforms(Example(row, 1), 2, 43),
        label_uniforms(Example(Row(3, "text", (5, 6, 7, 9), 2), 1), 2, 42),
    ):
        assert not torch.isclose(other, numbers).any()
    assert label_uniforms(Example(row, 1), 0, 42) is None


def test_rows_with_equal_tokens_are_one_group(specimen, tmp_path):
    """Of one task or of several, whatever their numbers; each has labels of its own."""
    models = specimen("llama")
    lines = models.datasets[0].read_text().splitlines()[:3]
    datasets = tuple(tmp_path / name for name in ("one.jsonl", "other.jsonl"))
    for path, rows in zip(datasets, ([*lines, lines[0]], lines[::-1]), strict=True):
        path.write_text("\n".join(rows) + "\n")
    job = at_experts(dataclasses.replace(models, datasets=datasets), num_samples=4, label_samples=1)
    examples = job.examples()
    groups = gather_statistics(job).row_group.tolist()
    assert len(examples) == 7
    for one, group in zip(examples, groups, strict=True):
        for other, same in zip(examples, groups, strict=True):
            assert (one.row.ids == other.row.ids) == (group == same)
    assert sorted(example.repeat for example in examples) == [0, 0, 0, 1, 1, 1, 2]


def test_small_steps_change_the_loss_as_predicted(specimen):
    """d loss along any mixture of the experts' changes of single submodules is what the slopes say."""
    models = specimen("qwen3")
    job = at_experts(models)
    slopes = gather_statistics(job).by_submodule
    examples = job.examples()
    generator = torch.Generator().manual_seed(3)
    step = {name: torch.randn(2, generator=generator, dtype=torch.float64) for name in slopes}
    every = [whole_model(path).double() for path in (models.base, *models.experts)]
    states = [dict(model.named_parameters()) for model in every]
    for row, example in enumerate(examples):
        predicted = sum(float(slopes[name][row, 0] @ step[name]) for name in slopes)
        losses = []
        for size in (5e-4, -5e-4):  # norms round to float32
            moved = whole_model(models.experts[example.task]).double()
            parameters = dict(moved.named_parameters())
            with torch.no_grad():
                for submodule in job.submodules:
                    for tensor in submodule.tensors:
                        for expert in range(2):
                            change = states[expert + 1][tensor] - states[0][tensor]
                            parameters[tensor].add_(change * size * float(step[submodule.name][expert]))
                losses.append(float(loss(moved, example)))
        assert (losses[0] - losses[1]) / 1e-3 == pytest.approx(predicted, rel=5e-3, abs=2e-3)


def test_alphas_of_one_job_solve_all_together(specimen, tmp_path):
    """From a recipe to a file: every submodule has weights, the ridge that was chosen is there, seeds matter."""
    job = job_of(specimen("llama"), **PLAIN_JOINT, steps=0, num_samples=6, max_seq_length=24)
    alphas = solve_job(job, gather_statistics(job))
    names = [entry.name for entry in partition(job.plan.tensors, job.skeleton.anatomy, job.recipe.settings.granularity)]
    assert [entry.name for entry in alphas.submodules] == names
    assert alphas.calibration["ridge"] is None
    assert alphas.calibration["ridge_used"] > 0
    alphas.save(tmp_path / "alphas.json")
    assert json.loads((tmp_path / "alphas.json").read_text())["calibration"]["label_samples"] == 2


def test_from_recipe_to_model_by_the_stock_command(tiny, tmp_path, write_recipe):
    """mergekit-yaml, then `solve` on what it left: the ridge it chose by itself gives the same weights, and an expert
    less those of a recipe without it."""
    recipe = tiny.recipe_with_answers(**PLAIN_JOINT, steps=0)
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    alphas = assert_applied(tiny, tmp_path / "out")
    statistics = tmp_path / "out" / "slta_stats.safetensors"
    used = alphas.calibration["ridge_used"]
    assert "None" not in section(alphas, [])
    assert f"{used:.3g}, chosen by leaving out rows" in section(alphas, [])
    result = slta("solve", statistics, "-o", tmp_path / "again.json")
    assert f"ridge {used:.3g}, chosen by leaving out rows" in result.output
    assert "None" not in result.output
    assert slta("solve", statistics, "--ridge", used, "-o", tmp_path / "same.json").exit_code == 0
    same = Alphas.load(tmp_path / "same.json")
    for entry, other in zip(alphas.submodules, same.submodules, strict=True):
        assert entry.alpha == pytest.approx(other.alpha, rel=1e-9)
    assert slta("solve", statistics, "--without", "expert2", "-o", tmp_path / "fewer.json").exit_code == 0
    recipe["models"].pop(1)
    assert slta("calibrate", write_recipe(recipe), "-o", tmp_path / "fresh.json", "--quiet").exit_code == 0
    fewer, fresh = Alphas.load(tmp_path / "fewer.json"), Alphas.load(tmp_path / "fresh.json")
    assert fewer.of_merge().provenance == fresh.provenance
    for entry, other in zip(fewer.submodules, fresh.submodules, strict=True):
        assert entry.alpha == pytest.approx(other.alpha, rel=1e-5, abs=1e-7)


def test_measured_residuals_are_refused(tiny, tmp_path, write_recipe):
    path = write_recipe(tiny.recipe(**PLAIN_JOINT, steps=0))
    result = slta("calibrate", path, "--verify", "-o", tmp_path / "alphas.json", "--quiet")
    assert_refused(result, "conflicting-keys", "--verify")
    assert not (tmp_path / "alphas.json").exists()
