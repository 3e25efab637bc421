"""Estimated costs against counted ones: passes, readings of the checkpoints, and activations on disk."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from conftest import PLAIN_JOINT
from test_architectures import job_of

from mergekit_slta.calibration.calibrate import gather_statistics, solve_job
from mergekit_slta.calibration.evaluate import evaluate
from mergekit_slta.checkpoints.plan import total_bytes
from mergekit_slta.checkpoints.tensors import Checkpoints
from mergekit_slta.data import batches
from mergekit_slta.job.job import Job
from mergekit_slta.objectives import costs, joint_search
from mergekit_slta.objectives.costs import estimate_features, estimate_gradients
from mergekit_slta.reporting.plan import describe_job
from mergekit_slta.runner import backward
from mergekit_slta.runner.backward import BackwardPass
from mergekit_slta.runner.directional import DirectionalDerivatives
from mergekit_slta.runtime.resume import ResumeStore
from mergekit_slta.runtime.screen import plain


class Counted:
    """What a calibration and its evaluation do with the first layer's last matrix.

    Attributes:
        passes: tokens that pass it, forward, backward to its inputs, or through an expert's task vector.
        readings: how often it is read, all models together counting as one.
        scratch: largest number of bytes of activations on disk.
    """

    def __init__(self, job, monkeypatch, folder, evaluated=True) -> None:
        self.passes, self.readings, self.scratch = 0, 0.0, 0
        module, name = job.skeleton.layers[0].mlp.down_proj, f"{job.skeleton.layers_path}.0.mlp.down_proj.weight"
        counts = {"forward": True, "backward": False, "read": True}

        def forward(_, inputs) -> None:
            if counts["forward"]:
                self.passes += inputs[0].shape[:-1].numel()

        @contextlib.contextmanager
        def during(what: str, value: bool):
            before, counts[what] = counts[what], value
            yield
            counts[what] = before

        look, layer_backward, grad = backward.look_at_part, BackwardPass._layer_backward, torch.autograd.grad
        add_module = DirectionalDerivatives.add_module

        def uncounted(*arguments):
            with during("forward", False), during("backward", False):  # one row, to see what the layer calls
                return look(*arguments)

        def added(own, path, called, call, rows, weights, vectors):
            if called is module:
                self.passes += rows.index.numel() * len(vectors[name])
            add_module(own, path, called, call, rows, weights, vectors)

        def counted_backward(own, layer):
            with during("backward", layer == 0):
                return layer_backward(own, layer)

        def counted_grad(outputs, *arguments, **settings):
            is_loss = settings.get("allow_unused", False)  # the other ones are along a norm's task vectors
            self.passes += outputs.shape[:-1].numel() * (counts["backward"] and is_loss)
            return grad(outputs, *arguments, **settings)

        features = joint_search.features_point

        def features_point(job, *arguments):
            self.passes += len(job.plan.models) * sum(len(example.row.ids) for example in job.examples(0))
            self.readings += 1
            with during("forward", False), during("read", False):  # `features` has an estimate of its own
                return features(job, *arguments)

        raw = Checkpoints.raw

        def counted_raw(own, tensor, models=None):
            found = raw(own, tensor, models)
            self.readings += counts["read"] * (tensor == name) * len(found) / len(job.plan.models)
            return found

        put = ResumeStore.put

        def watched(own, key, tensors):
            put(own, key, tensors)
            stores = own.folder.glob("*activations/activations.bin")
            self.scratch = max(self.scratch, sum(path.stat().st_size for path in stores))

        with monkeypatch.context() as patch, ResumeStore(folder, "same") as store:
            patch.setattr(batches, "PADDING", 1.0)  # only rows of one length run together
            patch.setattr(backward, "look_at_part", uncounted)
            patch.setattr(DirectionalDerivatives, "add_module", added)
            patch.setattr(BackwardPass, "_layer_backward", counted_backward)
            patch.setattr(torch.autograd, "grad", counted_grad)
            patch.setattr(Checkpoints, "raw", counted_raw)
            patch.setattr(ResumeStore, "put", watched)
            patch.setattr(joint_search, "features_point", features_point)
            hook = module.register_forward_pre_hook(forward)
            store.open()
            alphas = solve_job(job, gather_statistics(job, store))
            if evaluated:
                evaluate(job, alphas)
            hook.remove()


JOINT = {**PLAIN_JOINT, "num_samples": 3}
SETTINGS = [
    {**JOINT, "steps": 0, "label_samples": 0},
    {**JOINT, "steps": 0, "label_samples": 3, "evaluate": False},
    {**JOINT, "steps": 2},
    {**JOINT, "steps": 3, "label_samples": 3, "num_samples": 7},
    {**JOINT, "steps": 2, "ridge": 1.0, "fresh_rows": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_costs_of_derivatives_are_counted(specimen, with_rows, monkeypatch, tmp_path, settings):
    """Where all steps are made, an estimate is what happens: to the token, the reading and the byte."""
    job = job_of(with_rows(specimen("qwen3")), **{"granularity": "attn_mlp", **settings})
    told = estimate_gradients(job)
    counted = Counted(job, monkeypatch, tmp_path / ".partial")
    sizes = {name: math.prod(shape) for name, shape in job.skeleton.shapes.items()}
    inner = sum(size for name, size in sizes.items() if name.startswith(job.skeleton.layers_path + "."))
    assert told.flops == 2 * (inner + sizes[job.skeleton.head_weight]) * counted.passes
    assert told.read_bytes == pytest.approx(total_bytes(job.plan) * counted.readings)
    assert told.scratch_bytes == counted.scratch
    lines = plain(*describe_job(job, told))
    assert f"keeps       {told.scratch_bytes / 2**10:.3g} KiB of features" in lines
    assert "None" not in lines


def test_costs_without_held_out_rows_are_those_of_features(specimen, monkeypatch, tmp_path):
    job = job_of(specimen("qwen3"), granularity="attn_mlp", **JOINT)
    assert not job.held_out_examples()
    told, counted = estimate_gradients(job), Counted(job, monkeypatch, tmp_path / ".partial")
    sizes = {name: math.prod(shape) for name, shape in job.skeleton.shapes.items()}
    inner = sum(size for name, size in sizes.items() if name.startswith(job.skeleton.layers_path + "."))
    assert told.flops == 2 * (inner + sizes[job.skeleton.head_weight]) * counted.passes
    assert told.read_bytes == total_bytes(job.plan)
    assert told.scratch_bytes == counted.scratch == 0
    assert "no steps: the weights are those of `features`" in plain(*describe_job(job, told))


@pytest.mark.parametrize("inputs", ["base", "merged"])
def test_costs_of_an_evaluation_are_counted(specimen, with_rows, monkeypatch, tmp_path, inputs):
    """Beside those of `features`: the held-out rows run through base, merge and their expert, in one more reading."""
    job = job_of(with_rows(specimen("qwen3")), granularity="attn_mlp", inputs=inputs, evaluate=True)
    tokens = sum(len(example.row.ids) for example in job.held_out_examples())
    told = estimate_features(job)
    whole, alone = Counted(job, monkeypatch, tmp_path / "whole"), Counted(job, monkeypatch, tmp_path / "alone", False)
    assert whole.passes - alone.passes == 3 * tokens
    assert whole.readings - alone.readings == pytest.approx(1)
    monkeypatch.setattr(Job, "held_out_examples", lambda _: [])
    without = estimate_features(job)
    sizes = {name: math.prod(shape) for name, shape in job.skeleton.shapes.items()}
    inner = sum(size for name, size in sizes.items() if name.startswith(job.skeleton.layers_path + "."))
    assert told.flops - without.flops == 3 * tokens * 2 * (inner + sizes[job.skeleton.head_weight])
    assert told.read_bytes - without.read_bytes == total_bytes(job.plan)


def test_memory_of_draws_is_counted(specimen, monkeypatch):
    """The gradients by all outputs in a layer, of a batch for every draw; a solve among many rows if that is more."""
    models = specimen("qwen3")
    jobs = [job_of(models, **PLAIN_JOINT, granularity="attn_mlp", steps=0, label_samples=count) for count in (100, 300)]
    config, tokens = jobs[0].skeleton.config, jobs[0].num_tokens
    outputs = 3 * config.intermediate_size + 4 * config.hidden_size
    monkeypatch.setattr(costs, "SOLVE_MATRICES", 0)
    few, many = (estimate_gradients(job).peak_bytes for job in jobs)
    assert many - few == pytest.approx(200 * tokens * outputs * 4 * costs.MEMORY_MARGIN, abs=2)
    monkeypatch.setattr(costs, "SOLVE_MATRICES", 1000)
    draws = 300 * sum(len(rows.rows) for rows in jobs[1].rows)
    slopes = 6 * draws * 2 * len(jobs[1].submodules) * 8
    assert estimate_gradients(jobs[1]).peak_bytes == int(costs.MEMORY_MARGIN * (1000 * draws**2 * 8 + slopes))


def test_memory_of_a_solve_is_that_of_the_rows_of_all_steps(specimen, with_rows, monkeypatch):
    """Also where steps take the same rows again."""
    models = with_rows(specimen("qwen3"))
    monkeypatch.setattr(costs, "SOLVE_MATRICES", 10**9)
    peaks = []
    for settings in ({"num_samples": 4, "steps": 4}, {"num_samples": 16, "fresh_rows": False, "steps": 1}):
        job = job_of(models, **PLAIN_JOINT, granularity="attn_mlp", **settings)
        peaks.append(estimate_gradients(job).peak_bytes)
    again = job_of(models, **PLAIN_JOINT, granularity="attn_mlp", num_samples=4, fresh_rows=False, steps=4)
    assert estimate_gradients(again).peak_bytes == peaks[0] == peaks[1]
