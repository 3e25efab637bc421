"""LoRA adapters ("base+adapter" in a recipe) added to their base tensor by tensor, without a merged copy on disk.

Scope: a loader that mergekit takes for a checkpoint's. What is more than a sum of base tensors and products of two
matrices (DoRA, trained embeddings, ...) is named and left to mergekit's own way.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex, ShardInfo
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_slta.checkpoints.lora_adapter import LowRank, check_shapes, find_updates, merge_reason, read_adapter
from mergekit_slta.errors import ModelError, show

_SUMMABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class AdapterLoader(LazyTensorLoader):
    """A base checkpoint's lazy tensors with an adapter's products added; a drop-in for mergekit's loader.

    The product is computed in float32 (float64 for float64 weights) and the sum is rounded once, to the base tensor's
    dtype. peft does the same unless it is told not to keep adapters in float32 (then it rounds the product, too).
    Tensors that the adapter leaves alone are the base's, bit by bit. Nothing is kept between calls: the matrices are
    read from the adapter's mapped file. Calls may come from any thread: both inner loaders lock, and nothing else
    changes.

    Args:
        base: the base model's loader; it may be shared with others.
        adapter: a loader of the adapter's file.
        updates: name in the base checkpoint -> what is added.
        files: the adapter's files.
        dtype: what floating tensors are rounded to instead (mergekit's --lora-merge-dtype).

    Attributes:
        index: the base's, so that headers, shards and names are those of the base.
    """

    def __init__(
        self,
        base: LazyTensorLoader,
        adapter: LazyTensorLoader,
        updates: Mapping[str, LowRank],
        files: tuple[str, ...],
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(base.index, lazy_unpickle=base.lazy_unpickle)
        self.base = base
        self.adapter = adapter
        self.updates = dict(updates)
        self.dtype = dtype
        self._files = files

    @property
    def fingerprint_files(self) -> list[str]:
        """Paths of the adapter's config and weights: with the base's shards, all that the tensors depend on."""
        return list(self._files)

    def get_tensor(
        self, key: str, device: str = "cpu", aliases: list[str] | None = None, raise_on_missing: bool = True
    ) -> Tensor | None:
        """The base's tensor, or its sum with the adapter's product.

        Raises:
            KeyError: the base checkpoint lacks the tensor (None is returned where `raise_on_missing` is false).
            ModelError: the sum is not defined: shapes differ, or the base's weights are quantized.
        """
        if key not in self.index.tensor_paths:
            key = next((alias for alias in aliases or () if alias in self.index.tensor_paths), key)
        tensor = self.base.get_tensor(key, device=device, raise_on_missing=raise_on_missing)
        if tensor is None:
            return None
        dtype = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
        if key in self.updates:
            return self._sum(key, tensor, self.updates[key]).to(dtype)
        return tensor.to(dtype)

    def flush(self) -> None:
        """Close what is open in the base and in the adapter, which unmaps it; both open again when needed."""
        self.base.flush()
        self.adapter.flush()

    @torch.no_grad()
    def _sum(self, name: str, weight: Tensor, update: LowRank) -> Tensor:
        if weight.dtype not in _SUMMABLE:
            raise ModelError(
                f"{show(name)} is stored as {show(weight.dtype)}, which an adapter cannot be added to: "
                "use a base that is not quantized"
            )
        transposed = update.is_transposed(name, tuple(weight.shape))
        precise = torch.promote_types(weight.dtype, torch.float32)
        a, b = (self.adapter.get_tensor(key).to(weight.device, precise) for key in (update.a, update.b))
        product = a.T @ b.T if transposed else b @ a
        return product.mul_(update.scaling).add_(weight)


def needs_merged_copy(model: ModelReference) -> str | None:
    """Why an adapter cannot be added tensor by tensor, in a few words; None where it can (or there is none).

    Only the adapter's config and the header of its weights are read.

    Raises:
        ModelError: the adapter is missing or damaged.
    """
    return merge_reason(read_adapter(model.lora)) if model.lora is not None else None


def open_adapter(
    model: ModelReference, options: MergeOptions, *, base: LazyTensorLoader | None = None
) -> AdapterLoader | None:
    """A loader of "base+adapter" for mergekit's `LoaderCache().loaders[model]`.

    Args:
        model: the reference.
        options: the caches and `lazy_unpickle` of the base's loader, and `lora_merge_dtype`.
        base: the base model's loader where there is one to share; opened here otherwise.

    Returns:
        None where mergekit has to merge a copy (see `needs_merged_copy`) or the model has no adapter.

    Raises:
        ModelError: the adapter is missing or damaged, adapts what its base lacks, or has other shapes.
    """
    if model.lora is None:
        return None
    adapter = read_adapter(model.lora)
    if merge_reason(adapter) is not None:
        return None
    plain = model.model_copy(update={"lora": None})
    try:
        config = plain.config(trust_remote_code=options.trust_remote_code)
        base = base or plain.lazy_loader(cache_dir=options.transformers_cache, lazy_unpickle=options.lazy_unpickle)
    except Exception as error:  # whatever mergekit, the Hub or the file system say about a missing checkpoint
        raise ModelError(
            f"cannot open the checkpoint of {show(plain)}, the base of an adapter ({show(error)}): "
            "check the path or Hub id"
        ) from error
    updates = find_updates(adapter, base, config)
    check_shapes(base, updates)
    folder, file = os.path.split(adapter.weights_file)
    names = list(adapter.shapes)
    index = ShardedTensorIndex(
        base_path=folder,
        is_safetensors=file.endswith(".safetensors"),
        tensor_paths=dict.fromkeys(names, file),
        shards=[ShardInfo(file, names)],
    )
    return AdapterLoader(
        base,
        LazyTensorLoader(index, lazy_unpickle=False),  # for pickles: torch's own `weights_only`
        updates,
        (adapter.config_file, adapter.weights_file),
        dtype_from_name(options.lora_merge_dtype),
    )
