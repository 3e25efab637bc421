"""`linearity`: streamed measures equal those of whole models in memory, and a killed run goes on."""

from __future__ import annotations

import copy
import functools
import json
import os
import time
from itertools import product

import numpy as np
import pytest
import torch
import yaml
from conftest import assert_refused, fork, own_command, refused, slta
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from reference import load, row_deltas

from mergekit_slta.analysis import analyse as analysis
from mergekit_slta.analysis.analyse import analyse
from mergekit_slta.errors import ModelError
from mergekit_slta.files.linearity_file import Linearity
from mergekit_slta.job.preflight import prepare
from mergekit_slta.recipe.read import read_recipe
from mergekit_slta.runtime.resume import ResumeStore

GRID = (0.2, 0.4, 0.6, 0.8, 1.0)


def job_of(recipe):
    return prepare(read_recipe(MergeConfiguration.model_validate(recipe)), MergeOptions(quiet=True))


@functools.lru_cache(maxsize=100)
def whole_models(models):
    return load(models.base), [load(path) for path in models.experts[:2]]


@functools.lru_cache(maxsize=100)
def interpolated(models, point):
    """theta_0 + sum_t c_t tau_t, a whole model."""
    base, experts = whole_models(models)
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            origin = base.get_parameter(name)
            for weight, expert in zip(point, experts, strict=True):
                parameter += weight * (expert.get_parameter(name) - origin)
    return model


def norm(values):
    return np.linalg.norm(values)


class Reference:
    """Every point's model in memory; changes of every submodule on one row."""

    def __init__(self, models, granularity):
        self.models = models
        self.base, _ = whole_models(models)
        self.granularity = granularity
        self.kept = {}

    def changes(self, ids, points):
        """name -> [points, size]."""
        found = []
        for point in points:
            key = (tuple(ids), point)
            if key not in self.kept:
                model = interpolated(self.models, point)
                if self.granularity == "model":
                    with torch.no_grad():
                        change = model(torch.tensor([ids])).logits - self.base(torch.tensor([ids])).logits
                    self.kept[key] = {"model": change.double().numpy().ravel()}
                else:
                    deltas = row_deltas(self.base, [model], ids, self.granularity)
                    self.kept[key] = {name: delta[0] for name, delta in deltas.items()}
            found.append(self.kept[key])
        return {name: np.stack([one[name] for one in found]) for name in found[0]}


@pytest.fixture(scope="module")
def measured(make_models, tmp_path_factory):
    """A tiny Qwen2 with two experts: its file, job and models."""
    models = make_models("qwen2")
    path = tmp_path_factory.mktemp("linearity") / "linearity.json"
    job = job_of(models.recipe(num_samples=2, max_seq_length=12))
    found, reused = analyse(job, path)
    assert not reused
    return models, job, path, found


@pytest.mark.parametrize("granularity", ["model", "layer", "attn_mlp"])
def test_measures_equal_those_of_models_in_memory(measured, granularity):
    """Scores, projection distances, cosines and disentanglement errors, to 1e-5 of a direct numpy computation."""
    models, job, _, found = measured
    reference = Reference(models, granularity)
    rows = [[list(row.ids) for row in drawn.rows] for drawn in job.rows]
    names = {
        "model": ["model"],
        "layer": ["model.layers.1", "head"],
        "attn_mlp": ["model.layers.1.self_attn", "model.layers.0.mlp"],
    }
    entries = {entry.name: entry for entry in found.submodules}
    units = [(1.0, 0.0), (0.0, 1.0)]
    mixed = list(product(GRID, GRID))
    for name in names[granularity]:
        entry = entries[name]
        projections, cosines, apart, bases = [], [], [[], []], []
        for task in range(2):
            scores = []
            for ids in rows[task]:
                path = [(c / 10, 0.0) if task == 0 else (0.0, c / 10) for c in range(11)]
                steps = reference.changes(ids, path)[name]
                whole = norm(steps[10])
                ratios = np.array([[norm(a - b) / whole for b in steps] for a in steps])
                gaps = np.abs(np.subtract.outer(np.arange(11), np.arange(11))) / 10
                scores.append(((ratios - gaps) ** 2).sum())
                single = reference.changes(ids, units)[name]
                merged = reference.changes(ids, mixed)[name]
                bases.append(single[0] @ single[1] / norm(single[0]) / norm(single[1]))
                combined = np.array(mixed) @ single
                inner = (merged * combined).sum(1)
                cosines.append(inner / np.linalg.norm(merged, axis=1) / np.linalg.norm(combined, axis=1))
                projections.append(inner / np.linalg.norm(combined, axis=1) ** 2)
                alone = [steps[round(point[task] * 10)] for point in mixed]
                apart[task].append([norm(m - a) / whole for m, a in zip(merged, alone, strict=True)])
            assert entry.non_linearity[task] == pytest.approx(np.mean(scores), rel=1e-4, abs=1e-5)
            assert entry.non_linearity_std[task] == pytest.approx(np.std(scores), rel=1e-3, abs=1e-5)
        expected = np.abs(1 - np.mean(projections, 0))
        np.testing.assert_allclose(entry.projection_distance.pairs[0], expected, atol=1e-5)
        np.testing.assert_allclose(entry.cosine.pairs[0], np.mean(cosines, 0), atol=1e-5)
        assert entry.cosine_base == pytest.approx(np.mean(bases), abs=1e-5)
        errors = np.mean([np.mean(part, 0) for part in apart], 0)
        np.testing.assert_allclose(entry.disentanglement[0], errors, atol=1e-5)


def test_disagreement_counts_tokens(measured):
    """Of the whole model: the share of tokens whose likeliest successor differs from the own expert's alone."""
    models, job, _, found = measured
    entry = next(entry for entry in found.submodules if entry.kind == "model")
    place = list(product(GRID, GRID)).index((0.6, 0.8))
    shares = []
    for task, alone in enumerate([(0.6, 0.0), (0.0, 0.8)]):
        merged = interpolated(models, (0.6, 0.8))
        single = interpolated(models, alone)
        own = []
        for row in job.rows[task].rows:
            ids = torch.tensor([list(row.ids)])
            with torch.no_grad():
                own.append((merged(ids).logits.argmax(-1) != single(ids).logits.argmax(-1)).double().mean().item())
        shares.append(np.mean(own))
    assert entry.disagreement[0][place] == pytest.approx(np.mean(shares), abs=1e-6)


def test_file_holds_every_submodule_and_level(measured):
    """Layers, blocks, heads, both ends and the whole model; levels are their means; a distance matrix at each."""
    *_, path, found = measured
    assert Linearity.load(path) == found
    kinds = {entry.kind for entry in found.submodules}
    assert kinds == {"embed", "layer", "attention", "attention_head", "mlp", "head", "model"}
    assert next(iter(found.levels)) == "model"
    layers = [entry for entry in found.submodules if entry.kind == "layer"]
    mean = np.mean([score for entry in layers for score in entry.non_linearity])
    assert found.levels["layer"].non_linearity.mean == pytest.approx(mean, rel=1e-5)
    assert np.array(layers[0].distances).shape == (2, 11, 11)
    embed = next(entry for entry in found.submodules if entry.kind == "embed")
    assert max(embed.non_linearity) < 1e-9  # a look-up is linear
    assert found.models == tuple(sorted(found.models))
    assert [len(task["rows"]) for task in found.settings["tasks"]] == [2, 2]


def test_order_of_the_recipe_does_not_matter(measured, tmp_path):
    """The same bytes for reversed models."""
    models, _, path, _ = measured
    recipe = models.recipe(num_samples=2, max_seq_length=12)
    recipe["models"].reverse()
    analyse(job_of(recipe), tmp_path / "other.json")
    assert (tmp_path / "other.json").read_bytes() == path.read_bytes()


def test_a_run_that_stops_goes_on(measured, tmp_path, monkeypatch):
    """Stopped at every step in turn, in the end the bytes are the same, and no step was measured twice."""
    models, _, path, _ = measured
    recipe = models.recipe(num_samples=2, max_seq_length=12)
    put, finished = ResumeStore.put, []

    def stopping(self, step, tensors):
        put(self, step, tensors)
        finished.append(step)
        if len(finished) % 3 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResumeStore, "put", stopping)
    target = tmp_path / "linearity.json"
    for _ in range(20):
        try:
            analyse(job_of(recipe), target)
            break
        except KeyboardInterrupt:
            assert not target.exists()
    assert target.read_bytes() == path.read_bytes()
    assert len(set(finished)) == len(finished) >= 9
    assert os.listdir(tmp_path) == ["linearity.json"]


def test_killed_in_the_whole_model(measured, tmp_path, monkeypatch):
    """What was finished before the whole model is kept; the whole model starts over and ends in the same bytes."""
    models, _, path, _ = measured
    recipe = models.recipe(num_samples=2, max_seq_length=12)
    announced = []
    announce = analysis.Progress.announce

    def stopping(self, name):
        announced.append(name)
        announce(self, name)
        if name == "model.layers.1" and "stopped" not in announced:  # in the whole model: else "layer/..."
            announced.append("stopped")
            raise KeyboardInterrupt

    monkeypatch.setattr(analysis.Progress, "announce", stopping)
    target = tmp_path / "linearity.json"
    with pytest.raises(KeyboardInterrupt):
        analyse(job_of(recipe), target)
    analyse(job_of(recipe), target)
    after = announced[announced.index("stopped") + 1 :]
    assert not any(name.startswith(("layer/", "head_mlp/")) for name in after)
    assert target.read_bytes() == path.read_bytes()


@pytest.mark.process
def test_sigkill_loses_nothing(measured, tmp_path):
    """A process of its own, killed as soon as it has a few records: the second run ends in the same bytes."""
    models, _, path, _ = measured
    recipe = models.recipe(num_samples=2, max_seq_length=12)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    command = ["linearity", "recipe.yml", "-o", "linearity.json", "--quiet"]
    forked = fork(own_command, *command, cwd=tmp_path)
    records = tmp_path / ".linearity.json.partial"
    while forked.process.is_alive() and len(list(records.glob("*.safetensors"))) < 3:
        time.sleep(0.002)
    forked.process.kill()
    forked.process.join()
    assert records.is_dir()
    done = slta("linearity", tmp_path / "recipe.yml", "-o", tmp_path / "linearity.json", "--quiet")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "linearity.json").read_bytes() == path.read_bytes()
    assert not records.exists()


def test_finished_is_not_repeated_and_others_are_not_reused(measured, tmp_path):
    """`Already` for the same job; another recipe is measured anew, and other files are not overwritten."""
    models, *_ = measured
    recipe = models.recipe(num_samples=1, max_seq_length=8, granularity="model")
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    target = tmp_path / "linearity.json"
    first = slta("linearity", tmp_path / "recipe.yml", "-o", target)
    assert first.exit_code == 0, first.output
    assert "non-linearity score" in first.output
    before = target.stat().st_mtime_ns
    again = slta("linearity", tmp_path / "recipe.yml", "-o", target)
    assert "Already" in again.output
    assert target.stat().st_mtime_ns == before
    recipe["parameters"]["max_seq_length"] = 7
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    changed = slta("linearity", tmp_path / "recipe.yml", "-o", target, "--quiet")
    assert "Written" in changed.output
    assert target.stat().st_mtime_ns != before
    other = tmp_path / "notes.json"
    other.write_text(json.dumps({"mine": 1}))
    assert_refused(slta("linearity", tmp_path / "recipe.yml", "-o", other), "foreign-file", other)
    assert json.loads(other.read_text()) == {"mine": 1}
    none = slta("linearity", tmp_path / "recipe.yml", "-o", tmp_path / "x.json", "--rows", "0")
    assert_refused(none, "invalid-value", "--rows is 0")


def test_two_at_once_are_refused(measured, tmp_path):
    """They would share the features between two layers; nor does it run under torchrun."""
    models, *_ = measured
    recipe = models.recipe(num_samples=1, max_seq_length=8)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    other = ResumeStore(tmp_path / ".linearity.json.partial", "another run")
    with other:
        other.open()
        result = slta("linearity", tmp_path / "recipe.yml", "-o", tmp_path / "linearity.json", "--quiet")
    assert_refused(result, "in-use", f"({os.getpid()})")


@pytest.mark.parametrize("command", [["linearity", "recipe.yml"], ["merge", "recipe.yml", "out"]])
def test_one_process_commands_say_so(monkeypatch, command):
    """Several processes that all write the same files would spoil them."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    result = slta(*command)
    assert_refused(result, "one-process-only", command[0], exit_code=1)


WITHOUT_SUBMODULE = "tensor x belongs to no submodule that is known here; please report the model"


def test_heads_that_cannot_be_told_apart(make_models, tmp_path, monkeypatch, caplog):
    """The analysis leaves them out, and says so; where layers cannot be told apart the refusal stands."""
    partition = analysis.partition
    without = ["head_mlp"]

    def refuse(names, anatomy, level, tied):
        if level in without:
            raise ModelError(WITHOUT_SUBMODULE, code="unknown-tensor")
        return partition(names, anatomy, level, tied=tied)

    monkeypatch.setattr(analysis, "partition", refuse)
    job = job_of(make_models("qwen2").recipe(num_samples=1, max_seq_length=8))
    with caplog.at_level("WARNING"):
        found, _ = analyse(job, tmp_path / "linearity.json")
    assert {entry.kind for entry in found.submodules} == {"embed", "layer", "attention", "mlp", "head", "model"}
    assert "attention heads cannot be told apart" in caplog.text
    without.append("layer")
    with refused(ModelError, "unknown-tensor"):
        analyse(job, tmp_path / "other.json")
