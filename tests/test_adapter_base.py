"""Adapters and the bases that they are given: other vocabularies, other bases, and the copies that mergekit keeps."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Models, assert_refused, mergekit_yaml, read, refused, slta, tensors
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from test_checkpoints import adapter
from transformers import AutoModelForCausalLM

from mergekit_slta.errors import ModelError
from mergekit_slta.job.preflight import prepare


def with_expert(models: Models, reference: object) -> dict:
    recipe = models.recipe(2)
    recipe["models"][0]["model"] = str(reference)
    return recipe


def grown_adapter(models: Models, folder: Path, rows: int, **config: object) -> Path:
    """An adapter that was trained on the base with `rows` rows of embeddings."""
    model = AutoModelForCausalLM.from_pretrained(models.base)
    model.resize_token_embeddings(rows)
    settings = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **config}
    get_peft_model(model, LoraConfig(**settings)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {},  # peft saves the resized embeddings by itself
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"trainable_token_indices": [5, 322]},
    ],
    ids=["saved modules", "saved embeddings", "LoRA on embeddings", "LoRA on the head", "new tokens alone"],
)
@pytest.mark.parametrize("cached", [True, False])
def test_an_adapter_whose_vocabulary_grew(tiny, write_recipe, tmp_path, config, cached):
    """Said before anything is read, with or without a cache, and nothing is left there."""
    folder = grown_adapter(tiny, tmp_path / "adapter", 323, **config)
    cache = ["--lora-merge-cache", tmp_path / "cache"] if cached else []
    recipe = write_recipe(with_expert(tiny, f"{tiny.base}+{folder}"))
    result = mergekit_yaml(recipe, tmp_path / "out", "--quiet", *cache)
    assert_refused(
        result, "differing-vocabularies", folder, "323 tokens", "its base has 320", "merge it with peft first"
    )
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "out").exists()


def test_trained_tokens_of_the_bases_own_vocabulary(tiny, write_recipe, tmp_path):
    """`trainable_token_indices` goes mergekit's way, and the merge is that of peft's own full checkpoint."""
    path, full = adapter(tiny, tmp_path, 11, trainable_token_indices={"embed_tokens": [3, 7]})
    cache = tmp_path / "cache"
    recipe = write_recipe(with_expert(tiny, f"{tiny.base}+{path}"))
    result = mergekit_yaml(recipe, tmp_path / "one", "--quiet", "--lora-merge-cache", cache)
    assert result.exit_code == 0, result.output
    assert [entry.name[0] for entry in cache.iterdir()] != ["."]
    assert mergekit_yaml(write_recipe(with_expert(tiny, full)), tmp_path / "two", "--quiet").exit_code == 0
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for name in two:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_an_adapter_that_changes_no_weights(tiny, write_recipe, tmp_path, kind):
    """Not even a merged copy holds prompts: `check` and the merge refuse them, with a cache and without."""
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny.base), config).save_pretrained(tmp_path / "prompt")
    path = write_recipe(with_expert(tiny, f"{tiny.base}+{tmp_path / 'prompt'}"))
    cache = ("--lora-merge-cache", tmp_path / "cache")
    for result in (slta("check", path), slta("check", path, *cache), mergekit_yaml(path, tmp_path / "out", *cache)):
        assert_refused(result, "cannot-merge-adapter", tmp_path / "prompt", config.peft_type.value, "leave it out")
    assert not (tmp_path / "out").exists()


def test_a_merge_that_fails_leaves_nothing_in_the_cache(tiny, write_recipe, tmp_path, monkeypatch):
    """mergekit would take the folder for a finished copy the next time."""
    from peft import PeftModel

    path, _ = adapter(tiny, tmp_path, 12, use_dora=True)

    def fail(*args, **kwargs):
        raise RuntimeError("size mismatch")

    recipe = write_recipe(with_expert(tiny, f"{tiny.base}+{path}"))
    arguments = (recipe, tmp_path / "out", "--quiet", "--lora-merge-cache", tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(PeftModel, "from_pretrained", fail)
        assert_refused(mergekit_yaml(*arguments), "cannot-merge-adapter", path, "size mismatch")
    assert not (tmp_path / "cache").exists()
    assert mergekit_yaml(*arguments).exit_code == 0


def test_a_copy_that_is_older_than_its_adapter(tiny, write_recipe, tmp_path):
    """mergekit finds copies by name: an adapter that was trained again, or a copy that is not whole, is noticed."""
    path, _ = adapter(tiny, tmp_path, 13, use_dora=True)
    recipe = write_recipe(with_expert(tiny, f"{tiny.base}+{path}"))
    arguments = (recipe, tmp_path / "out", "--quiet", "--lora-merge-cache", tmp_path / "cache")
    assert mergekit_yaml(*arguments).exit_code == 0
    assert mergekit_yaml(*arguments).exit_code == 0
    (copy,) = (tmp_path / "cache").iterdir()
    later = (copy / "config.json").stat().st_mtime + 5
    os.utime(path / "adapter_model.safetensors", (later, later))
    assert_refused(mergekit_yaml(*arguments), "stale-copy", copy, "is older than", path / "adapter_model.safetensors")
    shutil.rmtree(copy)
    copy.mkdir()
    assert_refused(mergekit_yaml(*arguments), "stale-copy", copy, "is not whole")
    shutil.rmtree(copy)
    assert mergekit_yaml(*arguments).exit_code == 0


@pytest.mark.parametrize(
    ("named", "warned"),
    [
        ("meta-llama/Llama-2-7b-hf", True),
        (None, False),
        ("/data/models--org--base/snapshots/0123abc", False),
        ("org/base", False),
        ("unsloth/base-bnb-4bit", False),
        ("C:\\models\\base\\", False),
    ],
)
def test_an_adapter_that_names_another_base(tiny, options, tmp_path, caplog, named, warned):
    """A warning, because the same weights may have another name; none if the names are alike."""
    path, _ = adapter(tiny, tmp_path, 14)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
    prepare(read(with_expert(tiny, f"{tiny.base}+{path}")), options)
    assert (f"was trained on {named}" in caplog.text) == warned


def test_safetensors_before_pickles(tiny, options, tmp_path):
    """Of both in an adapter's folder, peft and this package read the safetensors; a Git LFS pointer is named."""
    path, _ = adapter(tiny, tmp_path, 15)
    (path / "adapter_model.bin").write_bytes(b"old")
    prepare(read(with_expert(tiny, f"{tiny.base}+{path}")), options)
    (path / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with refused(ModelError, "git-lfs-pointer", path / "adapter_model.safetensors"):
        prepare(read(with_expert(tiny, f"{tiny.base}+{path}")), options)
