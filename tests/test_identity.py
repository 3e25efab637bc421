"""What alphas are valid for: any change that matters moves the fingerprint, any other does not."""

from __future__ import annotations

import json
import shutil

import pytest
from mergekit.config import MergeConfiguration
from transformers import AutoModelForCausalLM, LlamaConfig

from mergekit_slta.calibration.calibrate import statistics_fingerprint
from mergekit_slta.checkpoints.content_hash import checkpoint_fingerprint
from mergekit_slta.data.rows import sample_numbers
from mergekit_slta.files.identity import differences, hash_identity
from mergekit_slta.job.preflight import prepare
from mergekit_slta.recipe.read import read_recipe


def prepared(recipe, options):
    return prepare(read_recipe(MergeConfiguration.model_validate(recipe)), options)


def identity(recipe, options):
    return prepared(recipe, options).identity


def with_task(recipe: dict, **parameters: object) -> dict:
    recipe["models"][0]["parameters"].update(parameters)
    return recipe


CHANGES = {
    "seed": (lambda t: t.recipe(2, seed=1), True),
    "num_samples": (lambda t: t.recipe(2, num_samples=5), True),
    "max_seq_length": (lambda t: t.recipe(2, max_seq_length=10), True),
    "granularity": (lambda t: t.recipe(2, granularity="layer"), True),
    "compute_dtype": (lambda t: t.recipe(2, compute_dtype="float64"), True),
    "text": (lambda t: with_task(t.recipe(2), text="question"), True),
    "split": (lambda t: with_task(t.recipe(2), split="train[:6]"), True),
    "dtype": (lambda t: {**t.recipe(2), "dtype": "bfloat16"}, True),
    "tokenizer": (lambda t: {**t.recipe(2), "tokenizer": {"source": "base"}}, True),
    "another expert": (lambda t: t.recipe(3), True),
    "ridge": (lambda t: t.recipe(2, ridge=0.1), False),
    "balance": (lambda t: t.recipe(2, balance=False), False),
    "importance": (lambda t: with_task(t.recipe(2), importance=2.0), False),
    "evaluate": (lambda t: t.recipe(2, evaluate=True), False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(tiny, options, change):
    """Everything but `lambda` moves the fingerprint; what only re-weighs leaves the statistics' part."""
    build, moves_statistics = CHANGES[change]
    before, after = prepared(tiny.recipe(2), options), prepared(build(tiny), options)
    assert hash_identity(before.identity) != hash_identity(after.identity)
    names = [after.recipe.label(model) for model in after.plan.models]
    assert differences(before.identity, after.identity, names)
    assert (statistics_fingerprint(before) != statistics_fingerprint(after)) == moves_statistics


@pytest.mark.parametrize(
    ("objective", "moves"), [({}, False), ({"objective": "joint"}, True)], ids=["features", "joint"]
)
def test_held_out_rows_are_noticed(plenty, options, tmp_path, objective, moves):
    """A held-out row that changes makes other alphas; the statistics of `features` stay, since only the evaluation is
    of these rows. Rows that are not held out, nor fitted, change nothing."""
    keys = {"num_samples": 2, "evaluate": True, "fresh_rows": False, **objective}
    keys = keys if objective else {key: value for key, value in keys.items() if key != "fresh_rows"}
    recipe = plenty.recipe(**keys)
    order = list(sample_numbers(30, 42))
    before = prepared(recipe, options)
    labels = [label for label in before.identity if "held-out" in label]
    assert len(labels) == 2
    for place, is_held_out in ((-1, True), (-6, True), (-7, False), (2, False), (0, None)):
        lines = plenty.datasets[0].read_text().splitlines()
        lines[order[place]] = json.dumps(json.loads(lines[order[place]]) | {"text": "the lazy dog"})
        (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
        recipe["models"][0]["parameters"]["dataset"] = str(tmp_path / "rows.jsonl")
        after = prepared(recipe, options)
        assert (after.identity != before.identity) == (is_held_out is not False)
        changed = [label for label, value in after.identity.items() if before.identity[label] != value]
        assert changed == (
            labels[:1] if is_held_out else [f"rows of {plenty.experts[0]}"] if is_held_out is None else []
        )
        statistics = statistics_fingerprint(after) != statistics_fingerprint(before)
        assert statistics == (moves if is_held_out else is_held_out is None)


def test_what_does_not_matter_changes_nothing(tiny, options):
    """`lambda`, `out_dtype`, the alphas file's path, the models' order, and settings that choose the same rows."""
    before = identity(tiny.recipe(2), options)
    reordered = tiny.recipe(2)
    reordered["models"].reverse()
    others = [{**tiny.recipe(2, **{"lambda": 0.5}), "out_dtype": "float16"}, tiny.recipe(2, alphas="x.json"), reordered]
    every = tiny.recipe(2, num_samples=12)
    for recipe in others:
        assert identity(recipe, options) == before
    more = [tiny.recipe(2, num_samples=40), tiny.recipe(2, num_samples=12, max_seq_length=24)]
    for recipe in more:
        assert identity(recipe, options) == identity(every, options)


def test_the_config_counts_as_its_file_says(tiny, options, tmp_path, monkeypatch):
    """Defaults that another transformers adds, and its version in the file, change nothing; other values do."""
    base = tmp_path / "base"
    shutil.copytree(tiny.base, base)
    recipe = {**tiny.recipe(2), "base_model": str(base)}

    def of_config() -> str:
        return identity(recipe, options)["config of the base"]

    def edit(**settings: object) -> None:
        stored = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(stored | settings))

    before = of_config()
    edit(transformers_version="99.0")
    original = LlamaConfig.to_dict
    monkeypatch.setattr(LlamaConfig, "to_dict", lambda self: original(self) | {"a_new_default": 1})
    assert of_config() == before
    edit(rms_norm_eps=0.01)
    assert of_config() != before


def test_every_tensor_of_every_checkpoint_counts(tiny, options, tmp_path):
    """One changed tensor in one expert moves that checkpoint's fingerprint; resaving the same bytes does not."""
    from mergekit.io.lazy_tensor_loader import LazyTensorLoader

    from mergekit_slta.checkpoints.headers import read_headers

    def taken(path) -> str:
        loader = LazyTensorLoader.from_disk(str(path))
        return checkpoint_fingerprint(loader, read_headers(loader, "x"))

    copy = tmp_path / "copy"
    shutil.copytree(tiny.experts[0], copy)
    before = taken(copy)
    assert before == taken(tiny.experts[0])
    model = AutoModelForCausalLM.from_pretrained(copy)
    for name, parameter in model.named_parameters():
        original = parameter.data.clone()
        parameter.data.mul_(1.001)
        model.save_pretrained(tmp_path / "changed", max_shard_size="60KB")  # never over the file that is mapped
        assert taken(tmp_path / "changed") != before, name
        parameter.data.copy_(original)


def test_bin_checkpoints_have_fingerprints_too(tiny, tmp_path):
    """Without headers, sizes and samples of the files count."""
    import torch
    from mergekit.io.lazy_tensor_loader import LazyTensorLoader

    state = AutoModelForCausalLM.from_pretrained(tiny.base).state_dict()
    folder = tmp_path / "bin"
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    before = checkpoint_fingerprint(LazyTensorLoader.from_disk(str(folder)), None)
    state["model.norm.weight"] = state["model.norm.weight"] * 2
    torch.save(state, folder / "pytorch_model.bin")
    assert checkpoint_fingerprint(LazyTensorLoader.from_disk(str(folder)), None) != before


def test_auto_is_float32_where_nothing_may_be_rounded(tiny, options):
    """Alphas of `features` stay valid when `compute_dtype: float32` is written out."""
    assert identity(tiny.recipe(2), options) == identity(tiny.recipe(2, compute_dtype="float32"), options)
