"""Passes of `objective: joint` at merged models: derivatives, divergences and losses against whole models and autograd;
killed runs; shared rows; files."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from conftest import PLAIN_JOINT, read, refused
from mergekit.options import MergeOptions
from test_architectures import job_of
from whole_models import assert_close, divergence, loss, merged_model, models_of, slopes_of
from zoo import TYPICAL

from mergekit_slta.calibration.calibrate import calibrate, gather_statistics
from mergekit_slta.data import batches
from mergekit_slta.errors import RunError
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.job.preflight import prepare
from mergekit_slta.maths.ridges import FIRST_RIDGES
from mergekit_slta.models.skeleton import Skeleton
from mergekit_slta.objectives import gradient_passes
from mergekit_slta.objectives.gradient_passes import Passes
from mergekit_slta.runner import backward, head_loss, lanes
from mergekit_slta.runtime.distributed import ALONE
from mergekit_slta.runtime.progress import Progress
from mergekit_slta.runtime.resume import ResumeStore


def stepping(models, **settings):
    """A joint job with steps."""
    return job_of(models, **{**PLAIN_JOINT, "granularity": "attn_mlp", "steps": 1, "label_samples": 1, **settings})


def passes_of(job, resume=None, ranks=ALONE) -> Passes:
    return Passes(job, resume, ranks, Progress("", 1, quiet=True))


def some_point(job, seed: int = 0, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Weights from 0 to `scale`."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(job.experts)
    return {part.name: torch.rand(shape, generator=generator, dtype=torch.float64) * scale for part in job.submodules}


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "granularity"), [*((name, "attn_mlp") for name in TYPICAL), ("qwen3", "head_mlp"), ("llama", "model")]
)
def test_derivatives_and_measurements_equal_whole_models(specimen, monkeypatch, name, granularity):
    """At a merged model: derivatives of the divergence and of a loss with known labels. Divergences and losses of the
    base and of two merged models."""
    monkeypatch.setattr(head_loss, "label_uniforms", lambda *_: None)  # the rows' own tokens
    models = specimen(name)
    job = stepping(models, granularity=granularity)
    examples = job.examples()
    points = [None, some_point(job, 1), some_point(job, 2, -0.5)]
    with torch.no_grad(), passes_of(job) as passes:
        found = passes.derivatives("", examples, points[1], label_samples=1, seed=0)
        measured = passes.measure("", examples, points)
    experts = models_of(models)[1:]
    merged = [models_of(models)[0], *(merged_model(models, job, point) for point in points[1:])]
    expected: dict[str, list[torch.Tensor]] = {key: [] for key in found}
    for row, example in enumerate(examples):
        teacher = experts[example.task]
        felt, own = divergence(teacher, merged[1], example), loss(merged[1], example)
        both = [slopes_of(part, merged[1], models, job) for part in (felt, own)]
        for key, parts in expected.items():
            parts.append(torch.stack([part[key] for part in both]))
        told = torch.stack([measured.divergences[row], measured.losses[row]])
        with torch.no_grad():
            known = [[function(model) for model in merged] for function in (
                lambda model, teacher=teacher, example=example: divergence(teacher, model, example),
                lambda model, example=example: loss(model, example),
            )]  # fmt: skip
            taught = loss(teacher, example)
        torch.testing.assert_close(told, torch.tensor(known, dtype=torch.float64), rtol=1e-4, atol=1e-5)
        assert float(measured.expert_losses[row]) == pytest.approx(float(taught), rel=1e-5)
    assert_close(found, {key: torch.stack(parts) for key, parts in expected.items()})


@pytest.mark.zoo
@pytest.mark.parametrize(
    "name", [*TYPICAL, "mistral", "falcon", "gpt_oss", "opt", "apertus", "lfm2", "mamba", "deepseek_v3"]
)
def test_batches_equal_single_rows(specimen, with_rows, monkeypatch, name):
    """Rows of unequal lengths that run together: with sliding windows, ALiBi, learned positions, attention sinks, tied
    heads, experts, convolutions, and weights inside an activation."""
    job = stepping(with_rows(specimen(name)), granularity="linear", compute_dtype="float64", max_seq_length=40)
    examples = job.examples()
    assert len({len(example.row.ids) for example in examples}) > 2
    found = []
    for tokens in (0, 10**6):
        monkeypatch.setattr(gradient_passes, "GRADIENT_TOKENS", tokens)
        monkeypatch.setattr(batches, "PADDING", 10.0)
        with torch.no_grad(), passes_of(job) as passes:
            derivatives = passes.derivatives("", examples, some_point(job), label_samples=2, seed=0)
            found.append((derivatives, passes.measure("", examples, [None, some_point(job)])))
    (alone, measured), (together, measured_together) = found
    assert_close(together, alone, 1e-7)
    for one, other in zip(vars(measured).values(), vars(measured_together).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_no_layer_outlives_its_backward_pass(specimen, monkeypatch):
    """Task vectors are freed by reference counts alone: waiting for the garbage collector, memory would grow."""
    kept = []
    original = backward.task_vectors

    def watched(tensors):
        vectors = original(tensors)
        kept.append(weakref.ref(vectors))
        return vectors

    monkeypatch.setattr(backward, "task_vectors", watched)
    job = stepping(specimen("llama"))
    gc.collect()
    gc.disable()
    try:
        with passes_of(job) as passes:
            passes.derivatives("", job.examples(), some_point(job), label_samples=1, seed=0)
        assert len(kept) >= 20
        assert not [ref for ref in kept if ref() is not None]
    finally:
        gc.enable()


@torch.no_grad()
def test_losses_are_those_of_transformers(tiny, options, monkeypatch):
    """Means per token of the answer, of every model and of the expert; a few positions at a time, too."""
    job = prepare(read(tiny.recipe_with_answers(**PLAIN_JOINT, steps=1)), options, for_merge=False)
    examples = job.examples()
    base, *experts = models_of(tiny)
    expected = []
    for example in examples:
        ids = torch.tensor([example.row.ids])
        labels = ids.clone()
        labels[:, : example.row.completion] = -100
        expected.append([float(model(ids, labels=labels).loss) for model in (base, experts[example.task])])
    assert len({example.row.completion for example in examples}) > 1
    for logits in (lanes.POSITION_LOGITS, 320 * 3):
        monkeypatch.setattr(lanes, "POSITION_LOGITS", logits)
        with passes_of(job) as passes:
            found = passes.measure("", examples, [None]).losses_per_token(examples)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows_without_an_answer_have_no_divergence(tiny, options):
    """Rows that are cut before their answer: zeros, and no loss per token."""
    recipe = tiny.recipe(2, text="{text}", **PLAIN_JOINT, steps=1, num_samples=12)
    recipe["models"][0]["parameters"]["completion"] = " {answer}"
    job = prepare(read(recipe), options, for_merge=False)
    examples = job.examples()
    cut = torch.tensor([example.row.completion >= len(example.row.ids) for example in examples])
    assert 0 < int(cut.sum()) < len(cut)
    with passes_of(job) as passes:
        measured = passes.measure("", examples, [None, some_point(job)])
        derivatives = passes.derivatives("", examples, some_point(job), label_samples=1, seed=0)
    assert not measured.divergences[cut].any()
    assert (measured.divergences[~cut] > 0).all()
    assert torch.equal(measured.losses_per_token(examples).isnan().any(1), cut)
    assert not any(part[cut].any() for part in derivatives.values())


@torch.no_grad()
def test_a_trial_may_explode(specimen):
    """Weights far from every model: infinite results, beside the others' own ones. In a pass that is not a trial they
    are an error."""
    job = stepping(specimen("llama"))
    examples = job.examples()
    wild = some_point(job, scale=1e15)
    with passes_of(job) as passes:
        alone = passes.measure("", examples, [None, some_point(job)])
        beside = passes.measure("", examples, [None, wild, some_point(job)])
        assert alone.is_finite == [True, True]
        assert beside.is_finite == [True, False, True]
        assert torch.equal(beside.divergences[:, [0, 2]], alone.divergences)
        with refused(RunError, "not-finite"):
            passes.derivatives("", examples, wild, label_samples=1, seed=0)


@torch.no_grad()
def test_experts_run_once(specimen, monkeypatch):
    """A second measurement of the same rows has their outputs."""
    job = stepping(specimen("llama"))
    examples, layer, calls = job.examples(), Skeleton.layer, []
    monkeypatch.setattr(Skeleton, "layer", lambda *arguments: calls.append(0) or layer(*arguments))
    with passes_of(job) as passes:
        counts = []
        for _ in range(2):
            calls.clear()
            measured = passes.measure("", examples, [None])
            counts.append(len(calls))
            assert (measured.divergences > 0).all()
    assert counts[0] == 2 * counts[1]


@pytest.mark.parametrize("pad", ["first token", "token of a row", "last in the vocabulary"])
@pytest.mark.parametrize("objective", ["features", "joint"])
def test_the_padding_token_is_a_token_like_others(tiny, with_rows, tmp_path, objective, pad):
    """A base's `pad_token_id` changes nothing: not one that occurs in the rows, nor one beyond the rows that occur."""
    own = {"steps": 1, "direction": "none"} if objective == "joint" else {}
    recipe = with_rows(tiny).recipe(2, objective=objective, granularity="attn_mlp", num_samples=3, **own)
    expected = calibrate(recipe)
    ids = prepare(read(recipe), MergeOptions(quiet=True), for_merge=False).examples()[0].row.ids
    token = {"first token": ids[0], "token of a row": ids[3], "last in the vocabulary": 319}[pad]
    padded = tmp_path / "padded"
    for source in (tiny.base, *tiny.experts[:2]):
        shutil.copytree(source, padded / source.name)
        config = json.loads((source / "config.json").read_text())
        (padded / source.name / "config.json").write_text(json.dumps(config | {"pad_token_id": token}))
    recipe["base_model"] = str(padded / tiny.base.name)
    for entry, source in zip(recipe["models"], tiny.experts, strict=False):
        entry["model"] = str(padded / source.name)
    found = calibrate(recipe)
    assert [entry.alpha for entry in found.submodules] == [entry.alpha for entry in expected.submodules]
    if objective == "joint":
        assert found.evaluation.points == expected.evaluation.points
        assert found.evaluation.trials == expected.evaluation.trials
        assert len(found.evaluation.trials) == len(FIRST_RIDGES)


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


@torch.no_grad()
def test_processes_share_the_rows(specimen):
    """Two halves add up to the whole: what is found for a row does not depend on who computes it."""
    job = stepping(specimen("llama"), num_samples=3)
    examples, points = job.examples(), [None, some_point(job)]

    def run(ranks):
        with passes_of(job, None, ranks) as passes:
            slopes = [
                passes.derivatives("", examples, point, label_samples=2, seed=1) for point in (None, some_point(job))
            ]
            return slopes, passes.measure("", examples, points), passes.measure("", examples, points)

    whole, *halves = (run(ranks) for ranks in (ALONE, Share(0), Share(1)))
    for number in range(2):
        for name, slopes in whole[0][number].items():
            torch.testing.assert_close(sum(half[0][number][name] for half in halves), slopes, rtol=1e-10, atol=1e-10)
    for number in (1, 2):  # measured again, with the experts' outputs of the first time
        for field, values in vars(whole[number]).items():
            torch.testing.assert_close(
                sum(getattr(half[number], field) for half in halves), values, rtol=1e-10, atol=1e-10
            )


def test_activations_go_to_temporary_files_beyond_a_bound(specimen, with_rows, monkeypatch):
    """With nothing to keep unfinished work in, memory still ends at a bound; nothing is left behind."""
    job = stepping(with_rows(specimen("llama")))
    whole = gather_statistics(job)
    made = []
    original = gradient_passes.TemporaryDirectory

    def spy(**arguments):
        made.append(original(**arguments))
        return made[-1]

    monkeypatch.setattr(gradient_passes, "TemporaryDirectory", spy)
    gather_statistics(job)
    assert not made  # they fit into memory
    monkeypatch.setattr(gradient_passes, "ACTIVATIONS_IN_MEMORY", 0)
    found = gather_statistics(job)
    assert_same_bits(found, whole)
    assert len(made) == 4  # the experts' of the held-out rows, the starting points', the step's, and the trials'
    assert not any(Path(folder.name).exists() for folder in made)


def assert_same_bits(found: Statistics, expected: Statistics) -> None:
    assert found.by_submodule.keys() == expected.by_submodule.keys()
    assert all(torch.equal(part, expected.by_submodule[name]) for name, part in found.by_submodule.items())
    for field in ("row_task", "row_group", "divergences", "losses"):
        one, other = getattr(found, field), getattr(expected, field)
        assert (one is None and other is None) or torch.equal(one.nan_to_num(), other.nan_to_num()), field
    assert {**found.metadata, "layout": None} == {**expected.metadata, "layout": None}


class Stopped(Exception):  # noqa: N818 - no error
    """Ends a run."""


def run_until(job, folder: Path, stop: int) -> list[str]:
    """A calibration that ends when it has stored `stop` parts more than there were; returns their keys."""
    keys: list[str] = []

    class Stopping(ResumeStore):
        def put(self, key, tensors):
            if key not in self.finished:  # the last layer is stored again: it was not marked as finished
                keys.append(key)
            super().put(key, tensors)
            if len(keys) == stop:
                raise Stopped

    with Stopping(folder, "same") as store:
        store.open()
        with contextlib.suppress(Stopped):
            gather_statistics(job, store)
    return keys


def resumed(job, folder: Path) -> Statistics:
    """The rest of a calibration."""
    with ResumeStore(folder, "same") as store:
        store.open()
        return gather_statistics(job, store)


@pytest.mark.parametrize("steps", [0, 2])
def test_goes_on_where_it_was_stopped(specimen, with_rows, tmp_path, steps):
    """Stopped after every part of every pass in turn: each is computed once, and the rest gives the same bits."""
    job = stepping(with_rows(specimen("qwen3")), steps=steps)
    whole = gather_statistics(job)
    every = run_until(job, tmp_path / "whole", 1000)
    passes = ["experts-", "losses-"] if steps == 0 else ["start-", "step-1-", "trials-1-", "step-2-", "trials-2-"]
    for prefix in passes:
        assert sum(key.startswith(prefix) for key in every) == (
            4 if prefix in ("experts-", "step-1-", "step-2-") else 1
        )
    folder = tmp_path / ".partial"
    for number, key in enumerate(every):
        assert run_until(job, folder, 1) == [key], number
    found = resumed(job, folder)
    assert_same_bits(found, whole)
    assert_same_bits(resumed(job, folder), whole)  # all is loaded
    for kept in (folder, tmp_path / "whole"):
        assert not list(kept.glob("*activations"))


@pytest.mark.parametrize("calls", [9, 25, 50, 80])
def test_goes_on_in_the_middle_of_a_pass(specimen, with_rows, tmp_path, monkeypatch, calls):
    """Killed within a layer, forward or backward: the same bits, from features that are kept."""
    job = stepping(with_rows(specimen("llama")), steps=2)
    layer, done = Skeleton.layer, []

    def killed(self, *arguments):
        if len(done) == calls:
            raise Stopped
        done.append(arguments[0])
        return layer(self, *arguments)

    whole = gather_statistics(job)
    folder = tmp_path / ".partial"
    with monkeypatch.context() as patch, ResumeStore(folder, "same") as store:
        patch.setattr(Skeleton, "layer", killed)
        store.open()
        with pytest.raises(Stopped):
            gather_statistics(job, store)
    found = resumed(job, folder)
    assert_same_bits(found, whole)
    assert not list(folder.glob("*activations"))


def test_a_damaged_part_is_computed_again(specimen, tmp_path):
    """With all layers behind the forward pass, whose features are still there."""
    job = stepping(specimen("qwen3"), steps=0)
    whole = gather_statistics(job)
    folder = tmp_path / ".partial"
    run_until(job, folder, 3)
    damaged = sorted(folder.glob("*.safetensors"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with ResumeStore(folder, "same") as store:
        store.open()
        assert len(store.finished) == 2
        assert_same_bits(gather_statistics(job, store), whole)
