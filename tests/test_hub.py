"""Models on the Hub: what `check` and `merge` read of them, and when. The Hub is `hub_server.py`, on this machine."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from conftest import Models, assert_refused, mergekit_yaml, slta, tensors
from hub_server import TOKEN, HubServer, serving
from huggingface_hub import ModelCard, constants, hf_api
from huggingface_hub.utils import close_session
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

NAMES = ("org/base", "org/one", "org/two")


@pytest.fixture(scope="session")
def large(make_models) -> Models:
    """Models whose weights are much larger than what is read of a header at once (100 kB)."""
    return make_models("llama", num_experts=2, intermediate_size=8192, shard="2MB")


@pytest.fixture
def hub(large: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with the models, which the libraries ask, and an empty cache."""
    for name, folder in zip(NAMES, (large.base, *large.experts), strict=True):
        shutil.copytree(folder, tmp_path / "hub" / name)
    with serving(tmp_path / "hub") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.chdir(tmp_path)
        close_session()
        yield server
        close_session()


@pytest.fixture
def recipe(large: Models) -> dict:
    """A recipe that names the models by their ids."""
    recipe = large.recipe(2)
    recipe["base_model"] = NAMES[0]
    for entry, name in zip(recipe["models"], NAMES[1:], strict=True):
        entry["model"] = name
    return recipe


def size_of_weights(hub: HubServer, *names: str) -> int:
    return sum(path.stat().st_size for name in names for path in (hub.folder / name).glob("*.safetensors"))


def test_check_reads_headers_only(hub, recipe, write_recipe, tmp_path):
    """Names and shapes come from the headers; the plan says what would be downloaded, and no weights are."""
    result = slta("check", write_recipe(recipe))
    assert result.exit_code == 0, result.output
    assert 0 < hub.sent_of(".safetensors") < 0.4 * size_of_weights(hub, *NAMES)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    for name in NAMES:
        assert f" of {name}\n" in result.output
    assert f"in all, to {tmp_path / 'cache'}" in result.output
    assert f"later       {', '.join(NAMES)}: NaN, tied tables" in result.output


def test_merging_from_the_hub(hub, recipe, large, write_recipe, tmp_path):
    """The result is that of the same models in local folders, and every file is downloaded once. The card names the
    models by their ids, and claims the licence that their cards state."""
    for name in NAMES:
        (hub.folder / name / "README.md").write_text("---\nlicense: mit\n---\n")
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out", card=True)
    assert result.exit_code == 0, result.output
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data.license) == ([*NAMES], "mit")
    local = mergekit_yaml(write_recipe(large.recipe(2), "local.yml"), tmp_path / "local")
    assert local.exit_code == 0, local.output
    found, expected = tensors(tmp_path / "out"), tensors(tmp_path / "local")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    for name in NAMES:
        for path in (hub.folder / name).glob("*.safetensors"):
            assert hub.sent[f"{name}/{path.name}"] <= path.stat().st_size + 100_001


def test_what_is_downloaded_is_used_without_the_hub(hub, recipe, write_recipe, tmp_path, monkeypatch):
    """After a merge, `check` and another merge read the cache, also if the Hub is switched off."""
    path = write_recipe(recipe)
    assert mergekit_yaml(path, tmp_path / "out").exit_code == 0
    before = hub.sent.copy()
    result = slta("check", path)
    assert result.exit_code == 0, result.output
    assert "download" not in result.output
    assert hub.sent == before
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = mergekit_yaml(path, tmp_path / "again")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "again" / "tokenizer.json").is_file()
    assert hub.sent == before


def test_a_bad_recipe_downloads_no_weights(hub, recipe, large, write_recipe, tmp_path):
    """Wrong rows are found before headers are read, wrong shapes before weights are downloaded."""
    recipe["models"][0]["parameters"]["text"] = "{nothing}"
    assert_refused(mergekit_yaml(write_recipe(recipe), tmp_path / "out"), "missing-column", "nothing")
    assert hub.sent_of(".safetensors") == 0
    del recipe["models"][0]["parameters"]["text"]
    shard = next((hub.folder / NAMES[2]).glob("*-00002-of-*.safetensors"))
    cut = {key: tensor[1:].contiguous() for key, tensor in load_file(shard).items()}
    save_file(cut, shard)
    for command in (lambda: mergekit_yaml(write_recipe(recipe), tmp_path / "out"), lambda: slta("check", "recipe.yml")):
        hub.sent.clear()
        assert_refused(command(), "differing-sizes", NAMES[2])
        assert hub.sent_of(".safetensors") < 0.4 * size_of_weights(hub, *NAMES)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_found_before_the_download(hub, recipe, write_recipe, tmp_path, monkeypatch):
    """The cache's disk needs room for the weights, and for the output if it is the same disk."""
    path = write_recipe(recipe)
    for module in ("calibration.reuse", "checkpoints.hub"):  # room for the downloads or the output, not for both
        monkeypatch.setattr(f"mergekit_slta.{module}.free_bytes", lambda folder: 20 * 2**20)
    for result in (slta("check", path), mergekit_yaml(path, tmp_path / "out")):
        assert_refused(
            result, "disk-full", f"{tmp_path / 'cache'} needs 0.0 GiB for downloads and the output", "HF_HOME"
        )
    monkeypatch.setattr("mergekit_slta.checkpoints.hub.free_bytes", lambda folder: 10 * 2**20)
    assert_refused(slta("calibrate", path), "disk-full", f"{tmp_path / 'cache'} needs 0.0 GiB for downloads and its")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_an_adapter_on_the_hub(hub, recipe, large, write_recipe, tmp_path):
    """`check` reads the header of its weights; a merge is that with the adapter in a local folder."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(large.base),
            LoraConfig(r=16, target_modules=["up_proj", "down_proj"], init_lora_weights=False),
        )
    model.save_pretrained(hub.folder / "org" / "adapter")
    recipe["models"][1]["model"] = "org/base+org/adapter"
    result = slta("check", write_recipe(recipe))
    assert result.exit_code == 0, result.output
    weights = hub.folder / "org/adapter/adapter_model.safetensors"
    # Its header is read four times, as its settings are.
    assert 0 < hub.sent["org/adapter/adapter_model.safetensors"] < weights.stat().st_size / 2
    assert " of org/adapter\n" in result.output
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out")
    assert result.exit_code == 0, result.output
    local = large.recipe(2)
    local["models"][1]["model"] = f"{large.base}+{hub.folder / 'org/adapter'}"
    assert mergekit_yaml(write_recipe(local, "local.yml"), tmp_path / "local").exit_code == 0
    found, expected = tensors(tmp_path / "out"), tensors(tmp_path / "local")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_adapter_without_its_base(hub, recipe, write_recipe):
    """An adapter's id in the place of a model's: how to write it."""
    folder = hub.folder / "org" / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"})
    )
    recipe["models"][1]["model"] = "org/adapter"
    assert_refused(slta("check", write_recipe(recipe)), "adapter-without-base", "write `org/base+org/adapter`")


def test_quantized_weights_are_seen_in_headers(hub, recipe, write_recipe):
    """What is refused of local models is refused of those on the Hub before the download."""
    shard = sorted((hub.folder / NAMES[1]).glob("*.safetensors"))[0]
    save_file({**load_file(shard), "model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)}, shard)
    index = json.loads((hub.folder / NAMES[1] / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.0.mlp.up_proj.weight_scale_inv"] = shard.name
    (hub.folder / NAMES[1] / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(slta("check", write_recipe(recipe)), "quantized-weights", NAMES[1], shard.name)


@pytest.mark.parametrize("damage", ["cut", "lacking", "no header"])
def test_damaged_weights_on_the_hub(hub, recipe, write_recipe, damage):
    """A shard that is missing, shorter than its header says, or no safetensors file."""
    shard = sorted((hub.folder / NAMES[1]).glob("*.safetensors"))[0]
    if damage == "lacking":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[: 2**17] if damage == "cut" else b"x" * 2**18)
    assert_refused(slta("check", write_recipe(recipe)), "corrupt-checkpoint", shard.name, NAMES[1])


def test_named_alphas_are_compared_as_far_as_possible(hub, recipe, write_recipe, tmp_path):
    """`check` compares settings and rows without the weights, and a merge does so before it downloads them."""
    recipe["parameters"]["alphas"] = str(tmp_path / "a.json")
    path = write_recipe(recipe)
    assert slta("calibrate", path).exit_code == 0
    shutil.rmtree(tmp_path / "cache")
    assert slta("check", path).exit_code == 0
    recipe["parameters"]["num_samples"] = 5
    path = write_recipe(recipe)
    hub.sent.clear()
    for result in (slta("check", path), mergekit_yaml(path, tmp_path / "out")):
        assert_refused(result, "alphas-of-another-merge", "other rows of org/one, rows of org/two")
    assert hub.sent_of(".safetensors") < 0.8 * size_of_weights(hub, *NAMES)
    recipe["parameters"]["num_samples"] = 6
    shutil.copytree(hub.folder / NAMES[1], hub.folder / NAMES[2], dirs_exist_ok=True)
    path = write_recipe(recipe)
    assert slta("check", path).exit_code == 0
    assert_refused(mergekit_yaml(path, tmp_path / "out"), "alphas-of-another-merge", "other weights of org/two")


@pytest.mark.parametrize("single", [True, False])
def test_pickled_weights_are_not_downloaded_by_check(hub, recipe, large, write_recipe, single):
    """Of a repository without safetensors, names and sizes are looked at, and `check` says what it cannot see."""
    folder = hub.folder / NAMES[1]
    weights = tensors(folder)
    for path in folder.glob("model*"):
        path.unlink()
    if single:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        torch.save(weights, folder / "pytorch_model-1.bin")
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "pytorch_model-1.bin")}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    result = slta("check", write_recipe(recipe))
    assert result.exit_code == 0, result.output
    assert f"later       {NAMES[1]}: pickled (.bin)" in result.output
    assert hub.sent_of(".bin") == 0


def test_a_model_that_is_gated(hub, recipe, write_recipe, monkeypatch):
    """The page to ask on; with a token that has access it is read."""
    hub.gated.add(NAMES[2])
    path = write_recipe(recipe)
    assert_refused(slta("check", path), "no-access", f"{NAMES[2]} is gated", f"{hub.url}/{NAMES[2]}", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert_refused(slta("check", path), "no-access", "(401)", "make a new one")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    result = slta("check", path)
    assert result.exit_code == 0, result.output


def test_a_model_that_is_not_there(hub, recipe, write_recipe):
    """An id that the Hub does not know, or hides; a revision that does not exist."""
    hub.private.add(NAMES[2])
    for name in (NAMES[2], "org/nothing", "org/base+org/nothing"):
        recipe["models"][1]["model"] = name
        assert_refused(slta("check", write_recipe(recipe)), "missing-model", name.partition("+")[2] or name, "HF_TOKEN")
    recipe["models"][1]["model"] = f"{NAMES[1]}@v2"
    assert_refused(slta("check", write_recipe(recipe)), "missing-model", "has no revision v2", NAMES[1])


def test_a_hub_that_cannot_be_asked(hub, recipe, write_recipe, tmp_path, monkeypatch):
    """Switched off, failing, or not at this address: one line each, and nothing is left in OUT."""
    path = write_recipe(recipe)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for result in (slta("check", path), mergekit_yaml(path, tmp_path / "out")):
        assert_refused(result, "hub-unreachable", NAMES[0], "unset HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
    hub.broken = True
    assert_refused(slta("check", path), "hub-unreachable", NAMES[0], hub.url, "HF_ENDPOINT")
    hub.broken = False
    assert slta("check", path).exit_code == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # config and tokenizer are in the cache, the weights are not
    assert_refused(slta("check", path), "hub-unreachable", NAMES[0], "does not hold such a model completely")
    assert not (tmp_path / "out").exists()


def test_another_cache_keeps_the_chat_template(hub, recipe, large, write_recipe, tmp_path):
    """`--transformers-cache` holds the weights and all files of the tokenizer that mergekit copies to the output."""
    assert (hub.folder / NAMES[0] / "chat_template.jinja").is_file()
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out", "--transformers-cache", tmp_path / "other")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    assert list((tmp_path / "other").rglob("*.safetensors"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_recipe_from_cards_on_the_hub(hub, large, tmp_path):
    """A card and an adapter's settings name the base; no weights are downloaded. A path in a stranger's card is not
    looked at."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(large.base), LoraConfig(target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.save_pretrained(hub.folder / "org" / "adapter")
    front = f"base_model: org/base\ndatasets: {large.datasets[0]}"
    (hub.folder / "org" / "one" / "README.md").write_text(f"---\n{front}\n---\n")
    result = slta("init", "org/one", "org/adapter")
    assert result.exit_code == 0, result.output
    assert "named by one (its card), adapter (its adapter_config.json)" in result.stderr
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    content = yaml.safe_load(Path("recipe.yml").read_text())
    assert content["base_model"] == "org/base"
    assert content["models"] == [{"model": "org/one"}, {"model": "org/base+org/adapter"}]
