"""Whole merges: the stock command, the project's own, mergekit-multi, reuse, OUT's hygiene, and every refusal."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import NO_CARD, assert_refused, fork, mergekit_yaml, run, script, slta, stock_command, tensors
from mergekit.config import MergeConfiguration
from mergekit.io.tensor_writer import TensorWriter
from mergekit.scripts import multimerge, run_yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import mergekit_slta.host.merge as host
from mergekit_slta.calibration import reuse
from mergekit_slta.cli import main as cli
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.files.statistics_file import Statistics

QUIET = ["--quiet"]


def state(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in tensors(path).items()}


def explicit(models, alphas: Alphas, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """theta_0 + lambda sum alpha_t tau_t in float64, for every tensor the file lists."""
    base, experts = state(models.base), [state(Path(name)) for name in alphas.models]
    result = {}
    for entry in alphas.submodules:
        for name in entry.tensors:
            total = base[name].double()
            for weight, expert in zip(entry.alpha, experts, strict=True):
                total = total + scale * weight * (expert[name].double() - base[name].double())
            if name not in entry.slices:
                result[name] = total
            else:
                axis, start, stop = entry.slices[name]
                into = result.setdefault(name, torch.full_like(total, float("nan")))
                into.narrow(axis, start, stop - start).copy_(total.narrow(axis, start, stop - start))
    return result


@pytest.mark.parametrize(
    ("granularity", "tied"),
    [
        *((granularity, False) for granularity in ("model", "layer", "attn_mlp", "head_mlp", "linear")),
        ("attn_mlp", True),
    ],
)
def test_merged_tensors_are_explicit_arithmetic(make_models, write_recipe, tmp_path, granularity, tied):
    """Every tensor of OUT is the formula's value, rounded once to the output dtype; the model loads and generates."""
    models = make_models("llama", tied=tied, dtype=torch.bfloat16)
    recipe = {**models.recipe(granularity=granularity, **{"lambda": 0.9}), "out_dtype": "bfloat16"}
    out = tmp_path / "out"
    result = mergekit_yaml(write_recipe(recipe), out, *QUIET)
    assert result.exit_code == 0, result.output
    alphas = Alphas.load(out / "slta_alphas.json")
    expected, found = explicit(models, alphas, 0.9), tensors(out)
    assert set(found) == set(expected) == set(state(models.base))
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        difference = (tensor.double() - expected[name]).abs()
        assert (difference <= expected[name].abs() * 2**-8 + 1e-30).all(), name  # half a unit in the last place
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("the quick", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


def test_output_dtype_follows_the_recipe(tiny, make_models, write_recipe, tmp_path):
    """Without `out_dtype` the inputs' dtype stays; bf16 inputs with `out_dtype: float32` keep the sum's precision."""
    models = make_models("llama", dtype=torch.bfloat16)
    for dtype, expected in ((None, torch.bfloat16), ("float32", torch.float32)):
        recipe = models.recipe()
        if dtype:
            recipe["out_dtype"] = dtype
        out = tmp_path / str(dtype)
        assert mergekit_yaml(write_recipe(recipe), out, *QUIET).exit_code == 0
        assert {tensor.dtype for tensor in tensors(out).values()} == {expected}
    values = explicit(models, Alphas.load(out / "slta_alphas.json"))
    for name, tensor in tensors(out).items():
        torch.testing.assert_close(tensor.double(), values[name], rtol=1e-6, atol=1e-7)


@pytest.mark.process
def test_three_ways_give_the_same_bytes(tiny, write_recipe, tmp_path):
    """`mergekit-yaml` and `mergekit-slta merge`, each a process of its own with another `PYTHONHASHSEED`; `calibrate`
    here, and `alphas:` of its file. The statistics are the same, too."""
    recipe = {**tiny.recipe(2), "out_dtype": "bfloat16"}
    path = write_recipe(recipe)
    first = run(script("mergekit-yaml"), path, "one", NO_CARD, cwd=tmp_path, PYTHONHASHSEED="0", OMP_NUM_THREADS="1")
    assert first.returncode == 0, first.stderr
    assert re.search(r"^took .*: features ", first.stderr, re.MULTILINE)
    off = {"MERGEKIT_SLTA_AUTOLOAD": "0", "PYTHONHASHSEED": "4242", "OMP_NUM_THREADS": "1"}  # works without .pth files
    second = run(script("mergekit-slta"), "merge", path, "two", "--quiet", NO_CARD, cwd=tmp_path, **off)
    assert second.returncode == 0, second.stderr
    third = slta("calibrate", path, "-o", tmp_path / "saved.json", "--quiet")
    assert third.exit_code == 0, third.output
    named = {**recipe, "parameters": {**recipe["parameters"], "alphas": str(tmp_path / "saved.json")}}
    for entry in named["models"]:
        entry["parameters"] = {}
    fourth = mergekit_yaml(write_recipe(named, "named.yml"), tmp_path / "three")
    assert fourth.exit_code == 0, fourth.output
    assert "Reusing the alphas" in fourth.output
    one, two, three = (tensors(tmp_path / name) for name in ("one", "two", "three"))
    assert one.keys() == two.keys() == three.keys()
    for name in one:
        assert torch.equal(one[name], two[name])
        assert torch.equal(one[name], three[name])
    alphas = (tmp_path / "one" / "slta_alphas.json").read_bytes()
    assert alphas == (tmp_path / "two" / "slta_alphas.json").read_bytes() == (tmp_path / "saved.json").read_bytes()
    assert alphas == (tmp_path / "three" / "slta_alphas.json").read_bytes()  # OUT explains itself
    places = tmp_path / "one" / "slta_stats.safetensors", tmp_path / "two" / "slta_stats.safetensors"
    grams, others, mine = map(Statistics.load, (*places, tmp_path / "saved.stats.safetensors"))
    assert grams.metadata == others.metadata == mine.metadata  # the files' own headers have no order
    for name, gram in grams.by_submodule.items():
        assert torch.equal(gram, others.by_submodule[name])
        assert torch.equal(gram, mine.by_submodule[name])
    again = mergekit_yaml(path, tmp_path / "one")
    assert again.exit_code == 0, again.output
    assert "Reusing the alphas" in again.output
    assert not re.search(r"^took .*: features ", again.output, re.MULTILINE)
    assert (tmp_path / "one" / "slta_alphas.json").read_bytes() == alphas


def test_mergekit_multi_and_python(tiny, write_recipe, tmp_path, options):
    """The wrapper holds for `mergekit-multi` and for `run_merge` called from Python, with equal tensors."""
    import mergekit.merge

    recipe = tiny.recipe(2)
    mergekit.merge.run_merge(MergeConfiguration.model_validate(recipe), str(tmp_path / "python"), options=options)
    path = tmp_path / "multi.yml"
    path.write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(
        multimerge.main, [str(path), "--out-path", str(tmp_path / "multi"), "-I", str(tmp_path / "between"), *QUIET]
    )
    assert result.exit_code == 0, result.output
    one, two = tensors(tmp_path / "python"), tensors(tmp_path / "multi")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_other_methods_pass_through(tiny, write_recipe, tmp_path):
    """A recipe with another method merges as ever, and leaves none of this package's files."""
    recipe = {
        "merge_method": "linear", "dtype": "float32",
        "models": [{"model": str(path), "parameters": {"weight": 0.5}} for path in tiny.experts[:2]],
    }  # fmt: skip
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out", *QUIET)
    assert result.exit_code == 0, result.output
    assert not [name for name in os.listdir(tmp_path / "out") if "slta" in name]


def test_arguments_that_a_later_mergekit_adds_pass_through(tiny, tmp_path, options, monkeypatch):
    """The wrapper hands on what it does not know, by place and by name."""
    import mergekit.merge

    seen = []

    def later(merge_config, out_path, options, config_source=None, note=None, *, dry=False):
        seen.append((note, dry))
        return mergekit.merge.run_merge.__wrapped__(merge_config, out_path, options, config_source)

    config = MergeConfiguration.model_validate(tiny.recipe(2))
    host.run(later, config, str(tmp_path / "out"), options, None, "a note", dry=True)
    assert seen == [("a note", True)]
    assert "model.safetensors" in os.listdir(tmp_path / "out")


def test_merges_that_run_at_once_may_share_an_alphas_file(tiny, tmp_path, options, write_recipe):
    """A merge that begins and ends while another runs leaves it its weights."""
    import mergekit.merge

    saved = tmp_path / "saved.json"
    assert slta("calibrate", write_recipe(tiny.recipe(2)), "-o", saved, *QUIET).exit_code == 0
    recipe = tiny.recipe(2, alphas=str(saved))
    original = mergekit.merge.run_merge.__wrapped__

    def with_another(*arguments):
        other = MergeConfiguration.model_validate({**recipe, "out_dtype": "bfloat16"})
        mergekit.merge.run_merge(other, str(tmp_path / "inner"), options)
        return original(*arguments)

    config = MergeConfiguration.model_validate(recipe)
    host.run(with_another, config, str(tmp_path / "outer"), options)
    host.run(original, config, str(tmp_path / "alone"), options)
    one, two = tensors(tmp_path / "outer"), tensors(tmp_path / "alone")
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_model_card_and_config_show_the_users_recipe(tiny, write_recipe, tmp_path):
    """mergekit_config.yml is the recipe as written, not as rewritten for mergekit."""
    path = write_recipe(tiny.recipe(2))
    assert mergekit_yaml(path, tmp_path / "out", *QUIET, card=True).exit_code == 0
    assert (tmp_path / "out" / "mergekit_config.yml").read_text() == path.read_text()
    assert "merge_method: submodule_linear" in (tmp_path / "out" / "README.md").read_text()


def test_base_listed_last_and_sharded_output(tiny, write_recipe, tmp_path):
    """The base may be listed among the models; shards, their index and all tensors are there."""
    recipe = tiny.recipe(2)
    assert mergekit_yaml(write_recipe(recipe), tmp_path / "one", *QUIET).exit_code == 0
    recipe["models"].append({"model": str(tiny.base)})
    result = mergekit_yaml(write_recipe(recipe, "two.yml"), tmp_path / "two", "--out-shard-size", "5000", *QUIET)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "two" / "model.safetensors.index.json").exists()
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_one_file_has_an_index(tiny, write_recipe, tmp_path, caplog):
    """Without an index vLLM loads every safetensors file of a folder. As an input the merge is one checkpoint."""
    out = tmp_path / "out"
    assert mergekit_yaml(write_recipe(tiny.recipe(1)), out, "--quiet").exit_code == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(tensors(out), "model.safetensors")
    again = tiny.recipe(1)
    again["models"][0]["model"] = str(out)
    assert slta("check", write_recipe(again)).exit_code == 0
    assert "two checkpoints" not in caplog.text


def test_tokenizer_source_base_with_grown_vocabulary(tiny, write_recipe, tmp_path):
    """An expert with padded embeddings merges over the base's rows under `tokenizer: {source: base}`."""
    grown = tmp_path / "grown"
    model = AutoModelForCausalLM.from_pretrained(tiny.experts[0])
    model.resize_token_embeddings(328, mean_resizing=False)
    model.save_pretrained(grown)
    AutoTokenizer.from_pretrained(tiny.base).save_pretrained(grown)
    recipe = tiny.recipe(2)
    recipe["models"][0]["model"] = str(grown)
    path = write_recipe(recipe)
    result = mergekit_yaml(path, tmp_path / "out", *QUIET)
    assert_refused(result, "differing-vocabularies", grown)
    recipe["tokenizer"] = {"source": "base"}
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out", *QUIET)
    assert result.exit_code == 0, result.output
    rows = len(AutoTokenizer.from_pretrained(tiny.base))
    merged = tensors(tmp_path / "out")["model.embed_tokens.weight"]
    assert merged.shape[0] == rows == AutoConfig.from_pretrained(tmp_path / "out").vocab_size
    plain = tiny.recipe(2)
    assert mergekit_yaml(write_recipe(plain, "plain.yml"), tmp_path / "plain", *QUIET).exit_code == 0
    expected = tensors(tmp_path / "plain")
    torch.testing.assert_close(merged, expected["model.embed_tokens.weight"][:rows], rtol=1e-4, atol=1e-4)


def test_changed_recipe_is_calibrated_anew_or_solved_again(tiny, write_recipe, tmp_path):
    """In OUT: another `ridge` only needs another solve, other rows another calibration; each is said."""
    out = tmp_path / "out"
    recipe = tiny.recipe(2)
    assert mergekit_yaml(write_recipe(recipe), out).exit_code == 0
    first = Alphas.load(out / "slta_alphas.json")
    recipe["parameters"]["ridge"] = 0.5
    result = mergekit_yaml(write_recipe(recipe), out)
    assert result.exit_code == 0, result.output
    assert "other ridge" in result.output
    assert "Solving again from the statistics" in result.output
    ridged = Alphas.load(out / "slta_alphas.json")
    fresh = CliRunner().invoke(
        cli.main, ["calibrate", str(tmp_path / "recipe.yml"), "-o", str(tmp_path / "f.json"), *QUIET]
    )
    assert fresh.exit_code == 0, fresh.output
    assert (tmp_path / "f.json").read_bytes() == (out / "slta_alphas.json").read_bytes()
    assert ridged.submodules[1].alpha != first.submodules[1].alpha
    recipe["parameters"]["seed"] = 7
    result = mergekit_yaml(write_recipe(recipe), out)
    assert result.exit_code == 0, result.output
    assert "other rows of" in result.output
    assert re.search(r"^took .*: features ", result.output, re.MULTILINE)


def test_lambda_needs_no_new_alphas(tiny, write_recipe, tmp_path):
    """`lambda` acts at merge time: the alphas are reused, the tensors move."""
    out = tmp_path / "out"
    assert mergekit_yaml(write_recipe(tiny.recipe(2)), out).exit_code == 0
    one = tensors(out)
    result = mergekit_yaml(write_recipe(tiny.recipe(2, **{"lambda": 0.5})), out)
    assert "Reusing the alphas" in result.output
    base, name = state(tiny.base), "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(tensors(out)[name] - base[name], 0.5 * (one[name] - base[name]), rtol=1e-4, atol=1e-6)


def test_named_alphas_that_do_not_fit_are_refused(tiny, make_models, write_recipe, tmp_path):
    """Alphas for other weights, other rows or another granularity: the error says what differs, OUT is not made."""
    saved = tmp_path / "saved.json"
    assert slta("calibrate", write_recipe(tiny.recipe(2)), "-o", saved, *QUIET).exit_code == 0
    before = saved.read_bytes()
    other = make_models("llama", num_experts=2, scale=0.2).recipe(2, alphas=str(saved))
    cases = [
        (tiny.recipe(2, alphas=str(saved), granularity="layer"), ["other granularity"]),
        (tiny.recipe(2, alphas=str(saved), seed=1), ["other rows of"]),
        (tiny.recipe(3, alphas=str(saved)), ["weights of", "expert3"]),
        (tiny.recipe(1, alphas=str(saved)), ["weights of", "expert2"]),
        (other, ["weights of"]),
    ]
    for recipe, differing in cases:
        result = mergekit_yaml(write_recipe(recipe), tmp_path / "out", *QUIET)
        assert_refused(result, "alphas-of-another-merge", saved, *differing)
        assert not (tmp_path / "out").exists()
    assert saved.read_bytes() == before


def test_weights_changed_after_calibration_are_noticed(tiny, write_recipe, tmp_path):
    """Alphas are bound to the bytes of every checkpoint, experts' included."""
    expert = tmp_path / "expert"
    shutil.copytree(tiny.experts[1], expert)
    recipe = tiny.recipe(2)
    recipe["models"][1]["model"] = str(expert)
    saved = tmp_path / "saved.json"
    assert slta("calibrate", write_recipe(recipe), "-o", saved, *QUIET).exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(tiny.experts[1])
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.01)
    model.save_pretrained(expert, max_shard_size="60KB")
    recipe["parameters"]["alphas"] = str(saved)
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out", *QUIET)
    assert_refused(result, "alphas-of-another-merge", "other weights of")


# --- OUT ------------------------------------------------------------------------------------------------------------


def test_earlier_merge_is_replaced_whole(tiny, write_recipe, tmp_path):
    """One file, then shards, then one file: never a mixture, nothing left aside."""
    out = tmp_path / "out"
    for arguments in ([], ["--out-shard-size", "5000"], []):
        assert mergekit_yaml(write_recipe(tiny.recipe(2)), out, *QUIET, *arguments).exit_code == 0
        assert (out / "model.safetensors").exists() != bool(arguments)
        names = set(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].values())
        assert {path.name for path in out.glob("model*.safetensors")} == names
        assert not list(out.glob(".slta*"))


def test_weights_of_others_are_refused(tiny, write_recipe, tmp_path):
    """A folder with somebody's model in it is left alone, also when an alphas file lies there."""
    out = tmp_path / "out"
    shutil.copytree(tiny.experts[0], out)
    before = sorted(os.listdir(out))
    assert slta("calibrate", write_recipe(tiny.recipe(2)), "-o", tmp_path / "slta_alphas.json", *QUIET).exit_code == 0
    shutil.copy(tmp_path / "slta_alphas.json", out)
    result = mergekit_yaml(write_recipe(tiny.recipe(2)), out, *QUIET)
    assert_refused(result, "foreign-weights", out)
    assert sorted(os.listdir(out)) == sorted([*before, "slta_alphas.json"])


def test_failed_merge_puts_the_earlier_weights_back(tiny, write_recipe, tmp_path, monkeypatch):
    """Where mergekit fails half-way, OUT holds the earlier merge, not half of the new one."""
    out = tmp_path / "out"
    assert mergekit_yaml(write_recipe(tiny.recipe(2)), out, *QUIET).exit_code == 0
    before = tensors(out)

    def fail(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorWriter, "finalize", fail)
    result = mergekit_yaml(write_recipe(tiny.recipe(2, **{"lambda": 0.1})), out, *QUIET, "--out-shard-size", "5000")
    assert_refused(result, "merge-failed", "No space left on device", exit_code=1)
    after = tensors(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    monkeypatch.undo()
    assert mergekit_yaml(write_recipe(tiny.recipe(2)), out, *QUIET).exit_code == 0


def test_failed_merge_keeps_what_was_calibrated(tiny, write_recipe, tmp_path, monkeypatch):
    """After a failure the next run need not calibrate again; nothing of the failed one can be loaded meanwhile."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(TensorWriter, "finalize", lambda self: (_ for _ in ()).throw(OSError(28, "No space left")))
        result = mergekit_yaml(write_recipe(tiny.recipe(2)), out, *QUIET)
    assert_refused(result, "merge-failed", "No space left", exit_code=1)
    assert not [name for name in os.listdir(out) if not name.startswith(".slta")]
    result = mergekit_yaml(write_recipe(tiny.recipe(2)), out)
    assert result.exit_code == 0, result.output
    assert "Reusing the alphas" in result.output
    assert {"slta_alphas.json", "slta_stats.safetensors", "model.safetensors"} <= set(os.listdir(out))
    assert not list(out.glob(".slta*"))


def test_stock_merge_into_the_same_folder_is_noticed(tiny, write_recipe, tmp_path):
    """Another method's weights of the very same name and size are not ours to replace."""
    out = tmp_path / "out"
    assert mergekit_yaml(write_recipe(tiny.recipe(2)), out, *QUIET).exit_code == 0
    stock = {
        "merge_method": "linear", "dtype": "float32",
        "models": [{"model": str(path), "parameters": {"weight": 0.5}} for path in tiny.experts[:2]],
    }  # fmt: skip
    assert mergekit_yaml(write_recipe(stock, "stock.yml"), out, *QUIET).exit_code == 0
    before = (out / "model.safetensors").read_bytes()
    result = mergekit_yaml(write_recipe(tiny.recipe(2)), out, *QUIET)
    assert_refused(result, "foreign-weights", "model.safetensors")
    assert (out / "model.safetensors").read_bytes() == before


def merge_until_written(*arguments: str) -> None:
    """The stock command, killed while mergekit writes."""
    TensorWriter.finalize = lambda self: os.kill(os.getpid(), signal.SIGKILL)
    run_yaml.main(arguments)


@pytest.mark.process
def test_killed_merge_is_taken_up(tiny, write_recipe, tmp_path):
    """SIGKILL while mergekit writes: OUT loads as before or not at all, and the next run ends well."""
    out = tmp_path / "out"
    path = write_recipe(tiny.recipe(2))
    assert mergekit_yaml(path, out, *QUIET).exit_code == 0
    before = tensors(out)
    other = write_recipe(tiny.recipe(2, seed=1), "other.yml")
    arguments = [str(other), str(out), "--quiet", "--out-shard-size", "5000"]
    assert fork(merge_until_written, *arguments, cwd=tmp_path).ended().returncode == -signal.SIGKILL
    after = tensors(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    result = mergekit_yaml(other, out)
    assert result.exit_code == 0, result.output
    assert "Reusing the alphas" in result.output  # those of the run that was killed
    assert any(not torch.equal(before[name], tensors(out)[name]) for name in before)


@pytest.mark.process
def test_two_merges_into_one_folder(tiny, write_recipe, tmp_path, monkeypatch):
    """While one merges, another is refused with the first one's process number, and harms nothing."""
    out = tmp_path / "out"
    path, second = write_recipe(tiny.recipe(2)), []
    finalize = TensorWriter.finalize

    def meanwhile(self):
        second.append(fork(stock_command, str(path), str(out), "--quiet", cwd=tmp_path).ended())
        finalize(self)

    monkeypatch.setattr(TensorWriter, "finalize", meanwhile)
    assert mergekit_yaml(path, out, *QUIET).exit_code == 0
    assert_refused(second[0], "in-use", f"process {os.getpid()}", out)
    assert AutoModelForCausalLM.from_pretrained(out) is not None


@pytest.fixture(scope="module")
def tied_alphas(make_models, tmp_path_factory) -> list[tuple[float, ...]]:
    """Of tied models without a second copy of the table."""
    folder = tmp_path_factory.mktemp("tied")
    (folder / "recipe.yml").write_text(yaml.safe_dump(make_models("llama", tied=True).recipe(2)))
    assert slta("calibrate", folder / "recipe.yml", "-o", folder / "slta_alphas.json", *QUIET).exit_code == 0
    return [entry.alpha for entry in Alphas.load(folder / "slta_alphas.json").submodules]


@pytest.mark.parametrize("stored", ["all", "base", "expert"])
def test_tied_models_that_store_their_head(make_models, tied_alphas, write_recipe, tmp_path, stored):
    """A second copy of the tied table in some checkpoints is the same tensor: one weight, a tied output, and the alphas
    of models without the copy."""
    models = make_models("llama", tied=True)
    recipe = models.recipe(2)
    paths = {"base": models.base, "one": models.experts[0], "two": models.experts[1]}
    chosen = {"all": paths, "base": ["base"], "expert": ["two"]}[stored]
    for name in chosen:
        folder = tmp_path / name
        shutil.copytree(paths[name], folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        state = tensors(paths[name])
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        if name == "base":
            recipe["base_model"] = str(folder)
        else:
            recipe["models"][("one", "two").index(name)]["model"] = str(folder)
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out", *QUIET)
    assert result.exit_code == 0, result.output
    assert [entry.alpha for entry in Alphas.load(tmp_path / "out" / "slta_alphas.json").submodules] == tied_alphas
    merged = tensors(tmp_path / "out")
    if stored == "expert":  # OUT has the base's tensors
        assert "lm_head.weight" not in merged
    else:
        assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert AutoConfig.from_pretrained(tmp_path / "out").tie_word_embeddings


def test_no_room_is_said_before_anything_is_written(tiny, write_recipe, tmp_path, monkeypatch):
    """The free space is compared with what will be written."""
    monkeypatch.setattr(reuse, "free_bytes", lambda out: 1000)
    result = mergekit_yaml(write_recipe(tiny.recipe(2)), tmp_path / "out", *QUIET)
    assert_refused(result, "disk-full", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_statistics_of_unfinished_work_are_gathered_anew(tiny, write_recipe, tmp_path, caplog):
    """Beside alphas that fit no more, statistics that cannot be read are said, and cost no more than a calibration."""
    target = tmp_path / "slta_alphas.json"
    assert slta("calibrate", write_recipe(tiny.recipe(2)), "-o", target, *QUIET).exit_code == 0
    statistics = tmp_path / "slta_stats.safetensors"
    with safe_open(statistics, framework="pt") as file:
        metadata = file.metadata()
    save_file({**load_file(statistics), "row_task": torch.zeros(1, dtype=torch.int64)}, statistics, metadata=metadata)
    result = slta("calibrate", write_recipe(tiny.recipe(2, ridge=0.5)), "-o", target, *QUIET)
    assert result.exit_code == 0, result.output
    assert "they are gathered anew" in caplog.text
    assert len(Statistics.load(statistics).row_task) == 12
    assert Alphas.load(target).calibration["ridge"] == 0.5


def test_clicks_own_errors_pass_a_merge(tiny, options, tmp_path):
    """Usage errors and exits inside a merge are mergekit's to report."""

    def fail(*_, **__):
        raise click.UsageError("no such option")

    config = MergeConfiguration.model_validate(tiny.recipe())
    with pytest.raises(click.UsageError, match="no such option"):
        host.run(fail, config, str(tmp_path / "out"), options, None)


def test_a_tensor_that_gets_lost_stops_the_merge(tiny, write_recipe, tmp_path, monkeypatch):
    """What mergekit writes is compared with the plan before OUT changes."""
    save = TensorWriter.save_tensor

    def lose(self, name, tensor, clone=False):
        if name != "model.layers.1.mlp.up_proj.weight":
            save(self, name, tensor, clone)

    monkeypatch.setattr(TensorWriter, "save_tensor", lose)
    result = mergekit_yaml(write_recipe(tiny.recipe(2)), tmp_path / "out", *QUIET)
    assert_refused(result, "other-tensors", "model.layers.1.mlp.up_proj.weight", exit_code=1)
    assert not list((tmp_path / "out").glob("*model*"))
