"""Headers of shards that are broken, and who reads them."""

from __future__ import annotations

import shutil

import pytest
from conftest import refused
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from safetensors.torch import load_file, save_file

from mergekit_slta.checkpoints.headers import read_headers
from mergekit_slta.checkpoints.lora_adapter import check_shapes
from mergekit_slta.errors import ModelError


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


def test_an_adapter_on_a_broken_base(tiny, tmp_path):
    """A base that cannot be read is said to be broken, not to have other shapes than the adapter."""
    loader = broken_copy(tiny, tmp_path / "broken", promise_too_much)
    names = dict.fromkeys(loader.index.tensor_paths)
    with refused(ModelError, "corrupt-checkpoint"):
        check_shapes(loader, names)
