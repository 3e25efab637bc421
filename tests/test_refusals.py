"""Every refusal: the same line and exit code from every command, and OUT not even made."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import assert_applied, assert_refused, fork, mergekit_yaml, slta, stock_command, tensors
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

QUIET = ["--quiet"]


def saved_copy(source: Path, target: Path, change=None, **config) -> str:
    """A checkpoint made from another one, with its model or config changed."""
    model = AutoModelForCausalLM.from_pretrained(source)
    if change:
        model = change(model) or model
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    if config:
        path = target / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return str(target)


def with_expert(recipe: dict, path: object) -> dict:
    recipe["models"][1]["model"] = str(path)
    return recipe


def with_task(recipe: dict, **parameters: object) -> dict:
    recipe["models"][0]["parameters"].update(parameters)
    return recipe


def fewer_layers(model):
    config = model.config
    config.num_hidden_layers = 1
    smaller = LlamaForCausalLM(config)
    smaller.load_state_dict(model.state_dict(), strict=False)
    return smaller


def other_architecture(tiny, make_models, tmp_path):
    return with_expert(tiny.recipe(2), make_models("qwen2").experts[0])


def unsupported(tiny, make_models, tmp_path):
    import transformers

    config = transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32, vocab_size=320, word_embed_proj_dim=32
    )
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    recipe = with_expert(tiny.recipe(2), tmp_path / "opt")
    return {**recipe, "base_model": str(tmp_path / "opt")} | {"models": recipe["models"][:1]}


def truncated(tiny, make_models, tmp_path):
    path = saved_copy(tiny.experts[1], tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return with_expert(tiny.recipe(2), path)


def missing_shard(tiny, make_models, tmp_path):
    shutil.copytree(tiny.experts[1], tmp_path / "broken")
    sorted((tmp_path / "broken").glob("*.safetensors"))[0].unlink()
    return with_expert(tiny.recipe(2), tmp_path / "broken")


def missing_tensor(tiny, make_models, tmp_path):
    path = saved_copy(tiny.experts[1], tmp_path / "broken")
    from safetensors.torch import save_file

    content = load_file(tmp_path / "broken" / "model.safetensors")
    del content["model.layers.1.mlp.up_proj.weight"]
    save_file(content, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    return with_expert(tiny.recipe(2), path)


def nan_weights(tiny, make_models, tmp_path):
    def poison(model):
        with torch.no_grad():
            model.model.norm.weight[0] = float("inf")

    return with_expert(tiny.recipe(2), saved_copy(tiny.experts[1], tmp_path / "nan", poison))


def file(tmp_path: Path, name: str, text: str) -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


REFUSALS = {
    "unknown key": (lambda t, m, p: t.recipe(2, densty=1), "unknown-key", ["`densty`"]),
    "unknown value": (
        lambda t, m, p: t.recipe(2, granularity="all"), "invalid-value", ["`granularity` of the recipe is 'all'"]
    ),
    "weight": (lambda t, m, p: t.recipe(2, weight=1), "unknown-key", ["`importance`"]),
    "no base": (lambda t, m, p: {**t.recipe(2), "base_model": None}, "missing-base", []),
    "no expert": (lambda t, m, p: {**t.recipe(2), "models": [{"model": str(t.base)}]}, "missing-expert", []),
    "expert twice": (lambda t, m, p: with_expert(t.recipe(2), t.experts[0]), "duplicate-model", []),
    "slices": (
        lambda t, m, p: {**{k: v for k, v in t.recipe(2).items() if k != "models"},
                         "slices": [{"sources": [{"model": str(t.base), "layer_range": [0, 1]}]}]},
        "unsupported-layout", ["`slices:`"],
    ),
    "no dataset": (
        lambda t, m, p: {**t.recipe(2), "models": [t.recipe(2)["models"][0], {"model": str(t.experts[1])}]},
        "missing-dataset", [],
    ),
    "missing file": (
        lambda t, m, p: with_task(t.recipe(2), dataset="no/such/file.jsonl"), "dataset-not-found",
        ["no/such/file.jsonl"],
    ),
    "missing split": (lambda t, m, p: with_task(t.recipe(2), split="test"), "unreadable-dataset", ["split test"]),
    "missing column": (lambda t, m, p: with_task(t.recipe(2), text="body"), "missing-column", ["`text` names 'body'"]),
    "missing field": (lambda t, m, p: with_task(t.recipe(2), text="{body}"), "missing-column", ["`text` names 'body'"]),
    "empty row": (
        lambda t, m, p: with_task(t.recipe(2), dataset=file(p, "empty.jsonl", '{"text": " "}\n')), "unusable-row",
        ["is empty"],
    ),
    "answer twice": (
        lambda t, m, p: with_task(t.recipe(2), text="{question} {answer}", completion="{answer}"), "conflicting-keys",
        ["`text`", "`completion`"],
    ),
    "typo in completion": (
        lambda t, m, p: with_task(t.recipe(2), completion="{anwser}"), "missing-column", ["`completion` names 'anwser'"]
    ),
    "images": (
        lambda t, m, p: with_task(t.recipe(2), dataset=file(
            p, "image.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}')),
        "unusable-row", ["row 0", "'image'"],
    ),
    "missing model": (lambda t, m, p: with_expert(t.recipe(2), p / "none"), "missing-model", ["none (paths start"]),
    "no weights": (
        lambda t, m, p: with_expert(t.recipe(2), shutil.copytree(t.experts[1], p / "bare",
                                    ignore=shutil.ignore_patterns("*.safetensors*"))),
        "unreadable-checkpoint", ["bare"],
    ),
    "other architecture": (other_architecture, "differing-architectures", ["Qwen2ForCausalLM"]),
    "unsupported architecture": (unsupported, "differing-architectures", ["OPTForCausalLM", "Llama"]),
    "other layer count": (
        lambda t, m, p: with_expert(t.recipe(2), saved_copy(t.experts[1], p / "short", fewer_layers)),
        "differing-sizes", ["has num_hidden_layers 1, the base 2"],
    ),
    "other shapes": (
        lambda t, m, p: with_expert(t.recipe(2), m("llama", intermediate_size=64).experts[0]),
        "differing-sizes", ["has intermediate_size 64, the base 48"],
    ),
    "other vocabulary": (
        lambda t, m, p: with_expert(t.recipe(2), m("llama", vocab_size=330).experts[0]),
        "differing-vocabularies", ["has vocab_size 330, the base 320"],
    ),
    "shape against config": (
        lambda t, m, p: with_expert(t.recipe(2), saved_copy(m("llama", intermediate_size=64).experts[0], p / "lie",
                                                            intermediate_size=48)),
        "differing-sizes", ["[32, 64]", "[32, 48]"],
    ),
    "truncated safetensors": (truncated, "unreadable-checkpoint", ["broken"]),
    "missing shard": (missing_shard, "corrupt-checkpoint", ["model-00001"]),
    "missing tensor": (missing_tensor, "missing-tensor", ["model.layers.1.mlp.up_proj.weight"]),
    "corrupt alphas": (
        lambda t, m, p: t.recipe(2, alphas=file(p, "bad.json", "{")), "unreadable-file", ["bad.json"]
    ),
    "foreign alphas": (
        lambda t, m, p: t.recipe(2, alphas=file(p, "other.json", '{"format": "x"}')),
        "wrong-file-type", ["other.json"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_by_every_command(tiny, make_models, write_recipe, tmp_path, case):
    """The same line and exit code from `mergekit-yaml`, `merge`, `calibrate` and `check`; OUT is not even made."""
    build, code, values = REFUSALS[case]
    (tmp_path / "parts").mkdir()
    path = write_recipe(build(tiny, make_models, tmp_path / "parts"))
    before = sorted(os.listdir(tmp_path))
    lines = set()
    commands = [
        (mergekit_yaml, (path, tmp_path / "out")),
        (slta, ("merge", path, tmp_path / "out")),
        (slta, ("check", path)),
        (slta, ("calibrate", path)),
    ]
    for command, arguments in commands:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            result = command(*arguments, *QUIET)
        lines.add(assert_refused(result, code, *values))
        assert sorted(os.listdir(tmp_path)) == before
    assert len(lines) == 1, lines


def test_what_mergekit_does_not_list(make_models, write_recipe, tmp_path):
    """Attention biases on Llama are merged, and no stock recipe can do that: `export` says so."""
    models = make_models("llama", attention_bias=True)
    out = tmp_path / "out"
    result = mergekit_yaml(write_recipe(models.recipe(2)), out, *QUIET)
    assert result.exit_code == 0, result.output
    assert_applied(dataclasses.replace(models, experts=models.experts[:2]), out)
    assert "model.layers.0.self_attn.q_proj.bias" in tensors(out)
    assert_refused(slta("export", out / "slta_alphas.json", "-o", tmp_path / "stock.yml"), "plan-does-not-fit")
    assert not (tmp_path / "stock.yml").exists()


def test_a_tensor_that_the_base_lacks(tiny, make_models, write_recipe):
    """An expert's biases would be dropped, and its features would be others."""
    recipe = with_expert(tiny.recipe(2), make_models("llama", attention_bias=True).experts[0])
    assert_refused(slta("check", write_recipe(recipe)), "missing-tensor", "self_attn", "bias", str(tiny.base))


@pytest.mark.parametrize("command", ["mergekit-yaml", "merge", "calibrate"])
def test_nan_is_refused_while_calibrating(tiny, make_models, write_recipe, tmp_path, command):
    """Weights are read only by the pre-pass: a NaN stops it with tensor and model, before OUT exists."""
    (tmp_path / "parts").mkdir()
    path = write_recipe(nan_weights(tiny, make_models, tmp_path / "parts"))
    out = tmp_path / "out"
    if command == "mergekit-yaml":
        result = mergekit_yaml(path, out, *QUIET)
    elif command == "merge":
        result = slta("merge", path, out, *QUIET)
    else:
        result = slta("calibrate", path, "-o", out / "slta_alphas.json", *QUIET)
    assert_refused(result, "not-finite-weights", f"model.norm.weight of {tmp_path / 'parts' / 'nan'}")
    assert not out.exists()


@pytest.mark.process
def test_refusal_in_a_process_of_its_own(tiny, write_recipe, tmp_path):
    """The stock command on a bad recipe: one line on stderr, exit code 2, no traceback; with -v the traceback."""
    path = write_recipe(tiny.recipe(2, granularity="all"))
    brief, verbose = [fork(stock_command, str(path), "out", *more, cwd=tmp_path) for more in ((), ("-v",))]
    assert_refused(brief.ended(), "invalid-value", "`granularity`", "'all'")
    assert "Traceback" in verbose.ended().stderr
    assert not (tmp_path / "out").exists()


def test_device_that_is_not_there(tiny, write_recipe, tmp_path):
    """--cuda on a machine without one is refused in a line."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = mergekit_yaml(write_recipe(tiny.recipe(2)), tmp_path / "out", "--cuda", *QUIET)
    assert_refused(result, "unusable-device", "cuda", exit_code=1)


def test_out_of_memory_names_the_knobs(tiny, write_recipe, tmp_path, monkeypatch):
    """Out of memory becomes advice: which keys to lower."""
    from mergekit_slta.models.skeleton import Skeleton

    def fail(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Skeleton, "block", fail)
    result = mergekit_yaml(write_recipe(tiny.recipe(2)), tmp_path / "out", *QUIET)
    assert_refused(result, "out-of-memory", " cpu ", "`max_seq_length` (24) or `num_samples` (6)", exit_code=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("target", "code", "named"),
    [("notes.txt/alphas.json", "not-a-folder", "notes.txt"), ("out/config.json", "reserved-name", "out/config.json"),
     ("somewhere/slta_stats.safetensors", "reserved-name", "somewhere/slta_stats.safetensors"),
     ("there/alphas.json", "foreign-file", "there/alphas.stats.safetensors is no statistics file"),
     ("there/slta_alphas.json", "foreign-file", "there/slta_stats.safetensors is no statistics file"),
     ("there/", "foreign-file", "there/slta_stats.safetensors is no statistics file")],
)  # fmt: skip
def test_unusable_places_for_alphas_are_named_first(tiny, write_recipe, tmp_path, target, code, named):
    """A path that cannot be written, or would collide with other files, is refused before anything is computed."""
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "there").mkdir()
    mine = [tmp_path / "there" / name for name in ("slta_stats.safetensors", "alphas.stats.safetensors")]
    for path in mine:
        path.write_text("mine")
    path = write_recipe(tiny.recipe(2, alphas=f"{tmp_path}/{target}"))
    for result in (mergekit_yaml(path, tmp_path / "out", *QUIET), slta("check", path), slta("calibrate", path, *QUIET)):
        if "config.json" in target and result.exit_code == 0:
            continue  # `check` and `calibrate` know of no OUT
        assert_refused(result, code, tmp_path / named)
    assert not (tmp_path / "out").exists() or "out/" in target
    assert [path.read_text() for path in mine] == ["mine", "mine"]


@pytest.mark.parametrize("target", ["link", "dangling", "text"])
def test_alphas_overwrite_nothing_else(tiny, write_recipe, tmp_path, target):
    """A recipe cannot make `alphas` overwrite another file, or follow a link."""
    victim = tmp_path / "victim.json"
    victim.write_text("precious")
    (tmp_path / "link").symlink_to(victim)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere.json")
    path = victim if target == "text" else tmp_path / target
    result = mergekit_yaml(write_recipe(tiny.recipe(2, alphas=str(path))), tmp_path / "out", *QUIET)
    assert_refused(result, "unreadable-file" if target == "text" else "not-a-plain-file", path)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "nowhere.json").exists()
    assert not (tmp_path / "out").exists()


def test_output_cannot_be_an_input(tiny, write_recipe, tmp_path):
    """Merging into one of the models would destroy it."""
    result = mergekit_yaml(write_recipe(tiny.recipe(2)), tiny.experts[0], *QUIET)
    assert_refused(result, "output-is-an-input", tiny.experts[0])


def test_check_prints_the_plan(tiny, write_recipe):
    """`check` shows models, rows, coverage and costs, and reads no weights."""
    result = slta("check", write_recipe(tiny.recipe(3)))
    assert result.exit_code == 0, result.output
    for expected in ("LlamaForCausalLM, 2 layers", "6 submodules cover all 21 tensors", "takes", "memory"):
        assert expected in result.output
    rows = [line.split()[2] for line in result.output.splitlines() if line.startswith("expert ")]
    assert rows == ["6"] * 3


def test_verbose_shows_where(tiny, write_recipe):
    """-v adds the traceback, of refusals and of crashes, in every command."""
    path = write_recipe(tiny.recipe(2, granularity="all"))
    for command in ("check", "calibrate"):
        assert_refused(slta(command, path), "invalid-value", "`granularity`")
        assert "Traceback" in slta(command, path, "-v").output


def test_multi_gpu_without_one(tiny, write_recipe, tmp_path):
    """--multi-gpu where there is no accelerator is refused before the pre-pass."""
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    result = mergekit_yaml(write_recipe(tiny.recipe(2)), tmp_path / "out", "--multi-gpu", *QUIET)
    assert_refused(result, "unusable-device", "--multi-gpu", exit_code=1)
    assert not (tmp_path / "out").exists()


def test_paths_may_be_spelled_otherwise(tiny, write_recipe, tmp_path, monkeypatch):
    """`./expert1/` is `expert1`: alphas fit a recipe that spells its local paths another way."""
    monkeypatch.chdir(tiny.folder)
    recipe = tiny.recipe(2, alphas=str(tmp_path / "saved.json"))
    recipe["base_model"] = "base"
    for number, entry in enumerate(recipe["models"]):
        entry["model"] = f"expert{number + 1}"
    assert slta("calibrate", write_recipe(recipe), *QUIET).exit_code == 0
    recipe["base_model"] = "./base/"
    recipe["models"][0]["model"] = "./expert1"
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "Reusing the alphas" in result.output


def test_expert_with_another_rope_is_warned_of(tiny, write_recipe, tmp_path, caplog):
    """A config that shapes the forward pass otherwise than the base's is named."""
    path = saved_copy(tiny.experts[1], tmp_path / "other", rms_norm_eps=1e-3)
    result = slta("check", write_recipe(with_expert(tiny.recipe(2), path)))
    assert result.exit_code == 0, result.output
    assert "has other rms_norm_eps; the base's is used" in caplog.text


def test_options_reach_the_pre_pass(tiny, write_recipe, tmp_path, options):
    """The device of mergekit's options is the device of calibration."""
    from mergekit_slta.job.preflight import prepare
    from mergekit_slta.recipe.read import read_recipe

    recipe = read_recipe(MergeConfiguration.model_validate(tiny.recipe(2)))
    assert prepare(recipe, MergeOptions(device="meta")).device == torch.device("meta")
    assert prepare(recipe, options).device == torch.device("cpu")
