"""Headers of shards that are broken, and who reads them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import read, refused
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from safetensors.torch import load_file, save_file

from mergekit_slta.checkpoints.headers import read_headers, read_pickled
from mergekit_slta.checkpoints.lora_adapter import check_shapes
from mergekit_slta.errors import ModelError
from mergekit_slta.job.preflight import prepare


def broken_copy(tiny, folder, change) -> LazyTensorLoader:
    """A checkpoint in shards whose first was changed behind the index."""
    shutil.copytree(tiny.experts[0], folder)
    shard = min(folder.glob("model*.safetensors"))
    loader = LazyTensorLoader.from_disk(str(folder))
    change(shard)
    return loader


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def promise_too_much(path) -> None:
    path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:])


def drop_a_tensor(path) -> None:
    content = load_file(path)
    content.pop(sorted(content)[0])
    save_file(content, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (cut, "shorter than its header says"),
        (promise_too_much, "header is longer than the file"),
        (drop_a_tensor, "which its index promises"),
    ],
)
def test_headers_of_broken_shards(tiny, tmp_path, change, reason):
    """Shards that are cut, that promise too much, or that lack a tensor of the index, are refused with why."""
    with refused(ModelError, "corrupt-checkpoint", tmp_path / "broken", reason):
        read_headers(broken_copy(tiny, tmp_path / "broken", change), "x")


def fill_second(path) -> None:
    """Put a tensor of the first shard into the second as well, with another content."""
    second = sorted(path.parent.glob("model*.safetensors"))[1]
    name, tensor = next(iter(load_file(path).items()))
    save_file({**load_file(second), name: tensor + 1}, second, metadata={"format": "pt"})


def test_a_tensor_in_two_shards(tiny, tmp_path):
    """transformers loads the one of the last shard, mergekit the one of the index."""
    loader = broken_copy(tiny, tmp_path / "broken", fill_second)
    first, second = (shard.filename for shard in loader.index.shards[:2])
    with refused(ModelError, "corrupt-checkpoint", tmp_path / "broken" / first, tmp_path / "broken" / second):
        read_headers(loader, "x")


def test_a_pickled_tensor_in_two_shards(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "1.bin")
    torch.save({"a": torch.zeros(2), "b": torch.ones(2)}, tmp_path / "2.bin")
    index = {"weight_map": {"a": "1.bin", "b": "2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with refused(ModelError, "corrupt-checkpoint", tmp_path / "1.bin", tmp_path / "2.bin"):
        read_pickled(LazyTensorLoader.from_disk(str(tmp_path)), "x")


@pytest.mark.parametrize("tensor", ["lm_head.weight", "model.norm.weight"])
def test_a_tensor_that_the_index_does_not_list(make_models, options, tmp_path, tensor):
    """Nothing is advised that makes a model without it."""
    models = make_models("llama")
    shutil.copytree(models.experts[0], tmp_path / "expert")
    path = tmp_path / "expert" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = index["weight_map"].pop(tensor)
    path.write_text(json.dumps(index))
    recipe = models.recipe(2)
    recipe["models"][0]["model"] = str(tmp_path / "expert")
    with refused(ModelError, "corrupt-checkpoint", tmp_path / "expert" / file, tensor, "does not list"):
        prepare(read(recipe), options)


def test_an_adapter_on_a_broken_base(tiny, tmp_path):
    """A base that cannot be read is said to be broken, not to have other shapes than the adapter."""
    loader = broken_copy(tiny, tmp_path / "broken", promise_too_much)
    names = dict.fromkeys(loader.index.tensor_paths)
    with refused(ModelError, "corrupt-checkpoint"):
        check_shapes(loader, names)
