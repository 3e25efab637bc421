"""The streamed backward pass against autograd over whole models in memory; labels; what a small step really does."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import assert_applied, assert_refused, mergekit_yaml, slta
from test_architectures import job_of, specimen  # noqa: F401 - a fixture
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from zoo import ZOO

from mergekit_slta.calibration.calibrate import gather_statistics, solve_job
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.models.submodules import partition
from mergekit_slta.objectives import gradient_passes as passes
from mergekit_slta.objectives.costs import estimate_gradients as estimate
from mergekit_slta.objectives.gradient_passes import gather_derivatives
from mergekit_slta.reporting.card import section
from mergekit_slta.reporting.terminal import describe_job
from mergekit_slta.runner import head_loss
from mergekit_slta.runner.directional import BLOCK_ELEMENTS
from mergekit_slta.runtime.distributed import ALONE
from mergekit_slta.runtime.resume import ResumeStore


def whole_model(path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def row_loss(model: torch.nn.Module, ids, first: int, labels=None) -> torch.Tensor:
    """Summed over the answer; own tokens unless labels are given."""
    logits = model(torch.tensor([list(ids)]), use_cache=False).logits[0]
    wanted = torch.tensor(list(ids[first:])) if labels is None else labels
    return cross_entropy(logits[first - 1 : -1].float(), wanted, reduction="sum")


def reference_slopes(models, job, labels=None) -> dict[str, torch.Tensor]:
    """submodule -> [rows, T], from whole gradients of whole models."""
    rename = job.skeleton.renamed
    every = [whole_model(path) for path in (models.base, *models.experts)]
    states = [dict(model.named_parameters()) for model in every]
    examples = job.examples()
    found = {submodule.name: torch.zeros(len(examples), len(every) - 1) for submodule in job.submodules}
    for row, example in enumerate(examples):
        model = every[example.task + 1]
        model.zero_grad()
        loss = row_loss(model, example.row.ids, example.row.completion, None if labels is None else labels[row])
        loss.backward()
        for submodule in job.submodules:
            for tensor in submodule.tensors:
                name = rename.get(tensor, tensor)
                gradient = states[example.task + 1][name].grad
                if gradient is None:
                    continue
                for expert in range(len(every) - 1):
                    product = gradient * (states[expert + 1][name] - states[0][name]).detach()
                    own = [part for part in submodule.slices if part.tensor == tensor]
                    parts = [product.narrow(part.axis, part.start, part.stop - part.start) for part in own] or [product]
                    found[submodule.name][row, expert] += sum(part.double().sum() for part in parts)
    return found


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of what a submodule's slopes are made of: their size over the rows."""
    for name, slopes in expected.items():
        scale = max(float(part.abs().max()) for part in expected.values())
        difference = (found[name].double() - slopes.double()).abs().max()
        assert difference <= 1e-5 * scale, (name, float(difference), scale)
        assert slopes.abs().max() > 0 or not found[name].any()


@pytest.mark.zoo
@pytest.mark.parametrize("granularity", ["attn_mlp", "linear"])
@pytest.mark.parametrize("name", ZOO)
def test_slopes_equal_autograd(specimen, name, granularity):  # noqa: F811
    models = specimen(name)
    job = job_of(models, granularity=granularity, objective="joint", label_samples=0, steps=0)
    found = gather_statistics(job)
    assert found.form == "slope"
    assert_close({key: slopes[:, 0] for key, slopes in found.by_submodule.items()}, reference_slopes(models, job))


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        ("qwen3", "model"),
        ("llama", "layer"),
        *((name, "head_mlp") for name in ("llama", "qwen3", "phi3", "gpt2", "gpt_neox")),
    ],
)
def test_other_granularities(specimen, monkeypatch, name, granularity):  # noqa: F811
    """In blocks that are smaller than the tensors, and that heads' slices begin and end within."""
    monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", 100)
    models = specimen(name)
    job = job_of(models, granularity=granularity, objective="joint", label_samples=0, steps=0)
    found = gather_statistics(job).by_submodule
    assert_close({key: slopes[:, 0] for key, slopes in found.items()}, reference_slopes(models, job))


def test_drawn_labels_follow_the_experts_distribution(specimen, monkeypatch):  # noqa: F811
    """Slopes of drawn labels are those of exactly these labels; over many draws their frequencies are the model's."""
    models = specimen("llama")
    job = job_of(models, granularity="attn_mlp", objective="joint", label_samples=3, steps=0)
    drawn: list[torch.Tensor] = []
    original = head_loss.sample_labels

    def spy(probs, uniforms):
        drawn.append(original(probs, uniforms))
        return drawn[-1]

    monkeypatch.setattr(head_loss, "sample_labels", spy)
    monkeypatch.setattr(head_loss, "LOGIT_GRADIENTS", 320 * 5)  # five positions at a time
    found = gather_statistics(job).by_submodule
    labels: list[list[torch.Tensor]] = []  # row -> draw -> tokens
    for example in job.examples():
        parts = -(-(len(example.row.ids) - example.row.completion) // 5)
        pieces = [[drawn.pop(0) for _ in range(3)] for _ in range(parts)]
        labels.append([torch.cat([piece[draw] for piece in pieces]) for draw in range(3)])
    for draw in range(3):
        expected = reference_slopes(models, job, [row[draw] for row in labels])
        assert_close({key: slopes[:, draw] for key, slopes in found.items()}, expected)
    monkeypatch.undo()
    again = gather_statistics(job).by_submodule
    assert_close(again, found)

    chances = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).repeat(20000, 1)
    tokens = original(chances, torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    frequencies = torch.bincount(tokens, minlength=4) / len(tokens)
    assert torch.allclose(frequencies, chances[0], atol=0.02)
    assert frequencies[3] == 0


def test_small_steps_change_the_loss_as_predicted(specimen):  # noqa: F811
    """d loss along any mixture of the experts' changes of single submodules is what the slopes say."""
    models = specimen("qwen3")
    job = job_of(models, granularity="attn_mlp", objective="joint", label_samples=0, steps=0)
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
                logits = moved(torch.tensor([list(example.row.ids)]), use_cache=False).logits[0]
                wanted = torch.tensor(list(example.row.ids[example.row.completion :]))
                losses.append(float(cross_entropy(logits[example.row.completion - 1 : -1], wanted, reduction="sum")))
        assert (losses[0] - losses[1]) / 1e-3 == pytest.approx(predicted, rel=5e-3, abs=2e-3)


def stop_after(job, folder: Path, number: int) -> None:
    """A calibration that ends when it has put one new record more than `number`."""

    class Stopped(Exception):  # noqa: N818 - no error
        pass

    class Stopping(ResumeStore):
        def put(self, key, tensors):
            if key not in self.finished:  # what was put last is put again: it was not seen to be whole
                kept.append(key)
            super().put(key, tensors)
            if len(kept) > number:
                raise Stopped

    kept: list[str] = []
    with Stopping(folder, "same") as records:
        records.open()
        with contextlib.suppress(Stopped):
            gather_statistics(job, records)


def test_a_damaged_record_is_computed_again(specimen, tmp_path):  # noqa: F811
    """Its step and all others behind the forward pass; the features are still there."""
    job = job_of(specimen("qwen3"), granularity="attn_mlp", objective="joint", steps=0)
    whole = gather_statistics(job).by_submodule
    stop_after(job, tmp_path / ".partial", 2)
    damaged = sorted((tmp_path / ".partial").glob("*.safetensors"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with ResumeStore(tmp_path / ".partial", "same") as records:
        records.open()
        assert len(records.finished) == 2
        found = gather_statistics(job, records).by_submodule
    assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_costs_are_counted(specimen):  # noqa: F811
    """The operations are those of the linear maps."""
    job = job_of(specimen("qwen3"), objective="joint", label_samples=3, steps=0)
    costs = estimate(job)
    skeleton = job.skeleton
    sizes = {name: math.prod(shape) for name, shape in skeleton.shapes.items()}
    inner = sum(size for name, size in sizes.items() if name.startswith(skeleton.layers_path + "."))
    passes = 1 + 1 + 3 * 2 + 1  # forward, forward again, each of three labels backward, forward through the base
    assert costs.flops == job.num_tokens * 2 * (inner + sizes[skeleton.head_weight]) * passes
    told = describe_job(job, costs)
    assert f"keeps       {costs.scratch_bytes / 2**10:.3g} KiB of features" in told
    assert "None" not in told


def test_alphas_of_one_job_solve_all_together(specimen, tmp_path):  # noqa: F811
    """From a recipe to a file: every submodule has weights, the ridge that was chosen is there, seeds matter."""
    job = job_of(specimen("llama"), objective="joint", steps=0, num_samples=6, max_seq_length=24)
    alphas = solve_job(job, gather_statistics(job))
    names = [entry.name for entry in partition(job.plan.tensors, job.skeleton.anatomy, job.recipe.settings.granularity)]
    assert [entry.name for entry in alphas.submodules] == names
    assert alphas.calibration["ridge"] is None
    assert alphas.calibration["ridge_used"] > 0
    alphas.save(tmp_path / "alphas.json")
    assert json.loads((tmp_path / "alphas.json").read_text())["calibration"]["label_samples"] == 2


class Share:
    """One of two processes, without the other: what it adds up is looked at instead."""

    is_first = False
    size = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def share(self, sizes):
        return [place for place in range(len(sizes)) if place % 2 == self.rank]

    def all_reduce_(self, tensor) -> None:
        pass


def test_processes_share_the_rows(specimen):  # noqa: F811
    """Two halves add up to the whole: labels and slopes of a row do not depend on who computes it."""
    job = job_of(specimen("llama"), objective="joint", steps=0)
    whole = gather_derivatives(job, resume=None, ranks=ALONE).by_submodule
    halves = [gather_derivatives(job, resume=None, ranks=Share(rank)).by_submodule for rank in (0, 1)]
    for name, slopes in whole.items():
        torch.testing.assert_close(halves[0][name] + halves[1][name], slopes, rtol=1e-10, atol=1e-10)


def test_features_go_to_a_temporary_file_beyond_a_bound(specimen, monkeypatch):  # noqa: F811
    """With nothing to keep unfinished work in, memory still ends at a bound; nothing is left behind."""
    job = job_of(specimen("llama"), objective="joint", steps=0)
    whole = gather_statistics(job).by_submodule
    made: list[str] = []
    original = passes.TemporaryDirectory

    def spy(**arguments):
        made.append(original(**arguments))
        return made[-1]

    monkeypatch.setattr(passes, "ACTIVATIONS_IN_MEMORY", 0)
    monkeypatch.setattr(passes, "TemporaryDirectory", spy)
    found = gather_statistics(job).by_submodule
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert len(made) == 2  # through the experts, and of the first rows through the base
    assert not any(Path(folder.name).exists() for folder in made)


def test_from_recipe_to_model_by_the_stock_command(tiny, tmp_path, write_recipe):
    """mergekit-yaml, then `solve` on what it left: the ridge it chose by itself gives the same weights, and an expert
    less those of a recipe without it."""
    recipe = tiny.recipe_with_answers(objective="joint", steps=0)
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
    path = write_recipe(tiny.recipe(objective="joint", steps=0))
    result = slta("calibrate", path, "--verify", "-o", tmp_path / "alphas.json", "--quiet")
    assert_refused(result, "conflicting-keys", "--verify")
    assert not (tmp_path / "alphas.json").exists()
