"""Which of a folder's files are a model's weights: those that transformers loads, or a refusal that names them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Models, assert_refused, mergekit_yaml, read, refused, slta, tensors
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from mergekit_slta.errors import ModelError
from mergekit_slta.files.alphas_file import Alphas
from mergekit_slta.job.preflight import prepare

INDEX = "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"


def with_expert(models: Models, expert: object) -> dict:
    recipe = models.recipe(2)
    recipe["models"][1]["model"] = str(expert)
    return recipe


def whole_beside_shards(tiny, folder: Path) -> Path:
    """The shards of one expert, and another's weights in one file."""
    shutil.copytree(tiny.experts[1], folder)
    assert (folder / INDEX).is_file()
    save_file(tensors(tiny.experts[2]), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def all_there(folder: Path) -> None:
    pass


def all_gone(folder: Path) -> None:
    for path in folder.glob("model-*"):
        path.unlink()


def partly_gone(folder: Path) -> None:
    min(folder.glob("model-*")).unlink()


@pytest.mark.parametrize("change", [all_there, all_gone, partly_gone])
def test_a_whole_file_beside_an_index(tiny, write_recipe, tmp_path, caplog, change):
    """transformers loads the whole file; mergekit alone would take the shards. The merge is transformers' way, and both
    files are named."""
    folder = whole_beside_shards(tiny, tmp_path / "two")
    change(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    theirs = tensors(tiny.experts[2])
    assert all(torch.equal(loaded[name], theirs[name]) for name in theirs)
    result = mergekit_yaml(write_recipe(with_expert(tiny, folder)), tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    assert f"{folder} holds two checkpoints, model.safetensors and {INDEX}" in caplog.text
    alphas = Alphas.load(tmp_path / "out" / "slta_alphas.json")
    base, first, merged = tensors(tiny.base), tensors(tiny.experts[0]), tensors(tmp_path / "out")
    for entry in alphas.submodules:
        for name in entry.tensors:
            expected = base[name] + sum(
                alpha * (other[name] - base[name]) for alpha, other in zip(entry.alpha, (first, theirs), strict=True)
            )
            torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)


def test_other_files_beside_the_weights(tiny, options, tmp_path, caplog):
    """`.bin`, `consolidated.safetensors`, and shards that the index does not name are not read, by anybody."""
    folder = tmp_path / "many"
    shutil.copytree(tiny.experts[1], folder)
    (folder / "pytorch_model.bin").write_bytes(b"old")
    (folder / "consolidated.safetensors").write_bytes(b"old")
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"old")
    (folder / "training_args.bin").write_text(POINTER)
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "adapter_config.json").write_text("{}")
    prepare(read(with_expert(tiny, folder)), options)
    assert "two checkpoints" not in caplog.text


def test_a_file_that_the_config_names(tiny, write_recipe, tmp_path):
    """`transformers_weights` is what transformers loads, and nothing else; OUT's config does not name a file of the
    base."""
    recipe = tiny.recipe(1)
    folder = tmp_path / "base"
    shutil.copytree(tiny.experts[2], folder)
    save_file(tensors(tiny.base), folder / "other.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    assert mergekit_yaml(write_recipe(recipe), tmp_path / "one", "--quiet").exit_code == 0
    recipe["base_model"] = str(folder)
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "two", "--quiet")
    assert result.exit_code == 0, result.output
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "two") is not None
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "../x.safetensors"}))
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "three", "--quiet")
    assert_refused(result, "corrupt-checkpoint", "../x.safetensors", "outside of its folder")


def pickled(source: Path, folder: Path, content: object) -> Path:
    """A checkpoint in a `.bin` file."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(content, folder / "pytorch_model.bin")
    return folder


def test_pickles_of_parameters(tiny, write_recipe, tmp_path):
    """A `.bin` of parameters with gradients, and a number among them, gives the merge of the plain tensors."""
    state: dict = {name: torch.nn.Parameter(tensor) for name, tensor in tensors(tiny.experts[1]).items()}
    folder = pickled(tiny.experts[1], tmp_path / "bin", {**state, "step": 5})
    result = mergekit_yaml(write_recipe(with_expert(tiny, folder)), tmp_path / "one", "--quiet")
    assert result.exit_code == 0, result.output
    assert mergekit_yaml(write_recipe(tiny.recipe(2)), tmp_path / "two", "--quiet").exit_code == 0
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_pickles_of_other_things(tiny, options, tmp_path):
    """The state dict inside of another mapping, and other shapes, are refused before a weight is read."""
    state = tensors(tiny.experts[1])
    folder = pickled(tiny.experts[1], tmp_path / "nested", {"state_dict": state})
    with refused(ModelError, "corrupt-checkpoint", folder, "holds state_dict"):
        prepare(read(with_expert(tiny, folder)), options)
    folder = pickled(tiny.experts[1], tmp_path / "shape", {**state, "model.norm.weight": torch.ones(3)})
    with refused(ModelError, "differing-sizes", "model.norm.weight is [3]"):
        prepare(read(with_expert(tiny, folder)), options)


@pytest.mark.parametrize("name", ["run@5", "a+b"])
def test_folders_whose_names_mean_something_else(tiny, options, tmp_path, name):
    shutil.copytree(tiny.experts[1], tmp_path / name)
    with refused(ModelError, "missing-model", tmp_path / name, "rename the folder"):
        prepare(read(with_expert(tiny, tmp_path / name)), options)


def test_a_folder_whose_name_cannot_be_parsed(tiny, write_recipe, tmp_path):
    shutil.copytree(tiny.experts[1], tmp_path / "c++")
    result = slta("check", write_recipe(with_expert(tiny, tmp_path / "c++")))
    assert_refused(result, "missing-model", tmp_path / "c++", "rename the folder")


def test_empty_tensors(tiny, options, tmp_path):
    """DeepSpeed ZeRO-3 saves them; an empty tensor that is no parameter does not matter."""
    folder = tmp_path / "zero"
    shutil.copytree(tiny.experts[1], folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    state = tensors(tiny.experts[1])
    save_file({**state, "unused": torch.zeros(0)}, folder / "model.safetensors", metadata={"format": "pt"})
    prepare(read(with_expert(tiny, folder)), options)
    state["model.norm.weight"] = torch.zeros(0)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with refused(ModelError, "differing-sizes", "is [0] in", "ZeRO-3"):
        prepare(read(with_expert(tiny, folder)), options)


def test_a_partly_gone_checkpoint(tiny, options, tmp_path):
    shutil.copytree(tiny.experts[1], tmp_path / "part")
    partly_gone(tmp_path / "part")
    with refused(ModelError, "corrupt-checkpoint", "model-00001-of-", "no such file"):
        prepare(read(with_expert(tiny, tmp_path / "part")), options)


def escape(folder: Path) -> str:
    shutil.move(min(folder.glob("model-*")), folder.parent / "secret.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {
        key: "../secret.safetensors" if "00001-of" in file else file for key, file in index["weight_map"].items()
    }
    (folder / INDEX).write_text(json.dumps(index))
    return "it names ../secret.safetensors, which is outside of its folder"


def no_map(folder: Path) -> str:
    (folder / INDEX).write_text('{"weight_map": ["model-00001-of-00002.safetensors"]}')
    return "`weight_map` is not a mapping"


def empty_index(folder: Path) -> str:
    (folder / INDEX).write_text("")
    return f"{INDEX} of"


def empty_shard(folder: Path) -> str:
    min(folder.glob("model-*")).write_bytes(b"")
    return "it is empty"


@pytest.mark.parametrize("change", [escape, no_map, empty_index, empty_shard])
def test_broken_checkpoints(tiny, options, tmp_path, change):
    """An index that names files outside of its folder, one that is damaged, and a shard of no bytes."""
    shutil.copytree(tiny.experts[1], tmp_path / "broken")
    reason = change(tmp_path / "broken")
    with refused(ModelError, "corrupt-checkpoint", tmp_path / "broken", reason):
        prepare(read(with_expert(tiny, tmp_path / "broken")), options)


@pytest.mark.parametrize("name", ["model-00001-of-00000.safetensors", "config.json", "tokenizer.json", INDEX])
def test_git_lfs_pointers(tiny, write_recipe, tmp_path, name):
    """A repository that was cloned without its large files: said so, with the command that helps."""
    folder = tmp_path / "clone"
    shutil.copytree(tiny.base, folder)
    shard = min(folder.glob("model-*")).name
    name = shard if name.startswith("model-") else name
    (folder / name).write_text(POINTER)
    recipe = tiny.recipe(2)
    recipe["base_model"] = str(folder)
    result = mergekit_yaml(write_recipe(recipe), tmp_path / "out", "--quiet")
    assert_refused(result, "git-lfs-pointer", f"{folder / name} of {folder}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "remedy"),
    [
        (["model-q4.gguf"], "gguf_file="),
        (["model-00001-of-00002.safetensors"], "fetch the index of its shards"),
        (["consolidated.00.pth"], "load it with transformers and save it"),
        (["diffusion_pytorch_model.safetensors"], "load it with transformers and save it"),
        (["checkpoint-10/model.safetensors"], "name the folder"),
        ([], "fetch its weights"),
    ],
)  # fmt: skip
def test_weights_under_other_names(tiny, options, tmp_path, files, remedy):
    """What is there is named, with what to do."""
    folder = tmp_path / "other"
    shutil.copytree(tiny.experts[1], folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"x")
    named = [file.split("/")[0] for file in files]
    with refused(ModelError, "unreadable-checkpoint", folder, "no model.safetensors", *named, remedy):
        prepare(read(with_expert(tiny, folder)), options)


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize("base", ["org/base", None])
def test_an_adapter_without_its_base(tiny, options, tmp_path, has_config, base):
    """The message gives the reference to write; some tools put the base's config beside an adapter."""
    folder = tmp_path / "lora"
    shutil.copytree(tiny.experts[1], folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    if not has_config:
        (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    with refused(ModelError, "adapter-without-base", f"write `{base or 'BASE'}+{folder}`"):
        prepare(read(with_expert(tiny, folder)), options)


def test_a_model_with_an_adapter_in_its_folder(tiny, options, tmp_path):
    """transformers adds the adapter to the model, mergekit does not: refused, unless the reference names both."""
    from test_checkpoints import adapter

    path, _ = adapter(tiny, tmp_path, 8)
    folder = tmp_path / "both"
    shutil.copytree(tiny.experts[1], folder)
    shutil.copy(path / "adapter_config.json", folder)
    prepare(read(with_expert(tiny, folder)), options)  # no weights of an adapter
    shutil.copy(path / "adapter_model.safetensors", folder)
    with refused(ModelError, "model-and-adapter", "adapter_model.safetensors", f"write `{folder}+{folder}`"):
        prepare(read(with_expert(tiny, folder)), options)
    job = prepare(read(with_expert(tiny, f"{folder}+{folder}")), options)
    (model,) = [model for model in job.plan.models if model.lora]
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = AutoModelForCausalLM.from_pretrained(folder)
    expected = expected.get_submodule("model.layers.0.self_attn.q_proj")
    product = expected.lora_B["default"].weight @ expected.lora_A["default"].weight * expected.scaling["default"]
    torch.testing.assert_close(job.plan.loaders[model].get_tensor(name), expected.base_layer.weight + product)
