"""Add a LoRA adapter ("base+adapter" in a recipe) to its base tensor by tensor, without a merged copy on disk.

Scope: a drop-in for mergekit's checkpoint loader. Adapters that do more than add a product of two matrices to base
tensors (DoRA, trained embeddings, ...) are left to mergekit, which merges them into a full copy on disk.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_slta.checkpoints.headers import read_stored
from mergekit_slta.checkpoints.hub import Download
from mergekit_slta.checkpoints.lora_adapter import (
    LowRank,
    check_shapes,
    fetch_weights,
    find_updates,
    merge_reason,
    read_adapter,
)
from mergekit_slta.checkpoints.quantization import refuse_quantized
from mergekit_slta.checkpoints.weight_files import open_checkpoint
from mergekit_slta.errors import ModelError, SltaError, show
from mergekit_slta.libraries.mergekit import LazyTensorLoader, dtype_named, loader_of_file
from mergekit_slta.libraries.transformers import read_names
from mergekit_slta.models.skeleton import Skeleton


class AdapterLoader(LazyTensorLoader):
    """A base checkpoint's tensors with an adapter's products added; a drop-in for mergekit's loader.

    The product is computed in float32 (float64 for float64 weights), and the sum is rounded once, to the base tensor's
    dtype. peft does the same by default; with `autocast_adapter_dtype=False` it also rounds the product. Tensors
    without an update equal the base's bit for bit. Nothing is cached between calls: the matrices are read from the
    adapter's memory-mapped file. Threads may share a loader: both inner loaders use locks, and there is no other state.

    Args:
        base: the base model's loader, which may be shared.
        adapter: a loader of the adapter's file.
        updates: name in the base checkpoint -> update.
        files: paths of the adapter's config and weights.
        dtype: if given, floating tensors are rounded to it (mergekit's --lora-merge-dtype).
        download: the download of the adapter's weights, if they are still on the Hub.

    Attributes:
        index: the base's index of names and shards.
    """

    def __init__(
        self,
        base: LazyTensorLoader,
        adapter: LazyTensorLoader,
        updates: Mapping[str, LowRank],
        files: tuple[str, ...],
        dtype: torch.dtype | None = None,
        download: Download | None = None,
    ) -> None:
        super().__init__(base.index, lazy_unpickle=base.lazy_unpickle)
        self.base = base
        self.adapter = adapter
        self.updates = dict(updates)
        self.dtype = dtype
        self.download = download
        self._files = files

    @property
    def fingerprint_files(self) -> list[str]:
        """Paths of the adapter's config and weights; the tensors depend on these and on the base's shards."""
        return list(self._files)

    def get_tensor(
        self, key: str, device: str = "cpu", aliases: list[str] | None = None, raise_on_missing: bool = True
    ) -> Tensor | None:
        """Read the base's tensor, with the adapter's product added if there is one.

        Raises:
            KeyError: the base checkpoint lacks the tensor and `raise_on_missing` is true; else None is returned.
            ModelError: shapes differ.
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
        """Close and unmap the open files of base and adapter; they are opened again when needed."""
        self.base.flush()
        self.adapter.flush()

    @torch.no_grad()
    def _sum(self, name: str, weight: Tensor, update: LowRank) -> Tensor:
        transposed = update.is_transposed(name, tuple(weight.shape))
        precise = torch.promote_types(weight.dtype, torch.float32)
        a, b = (self.adapter.get_tensor(key).to(weight.device, precise) for key in (update.a, update.b))
        product = a.T @ b.T if transposed else b @ a
        return product.mul_(update.scaling).add_(weight)


def needs_merged_copy(model: ModelReference) -> str | None:
    """Why a model's adapter cannot be added tensor by tensor, in a few words; None if it can, or there is no adapter.

    Reads the adapter's config and the header of its weights.

    Raises:
        ModelError: the adapter is missing or damaged.
    """
    return merge_reason(read_adapter(model.lora)) if model.lora is not None else None


def open_adapter(
    model: ModelReference,
    options: MergeOptions,
    *,
    base: LazyTensorLoader | None = None,
    skeleton: Skeleton | None = None,
    planning: bool = False,
) -> AdapterLoader | None:
    """Open a loader for "base+adapter", to be put into mergekit's cache of loaders.

    Args:
        model: the model reference.
        options: mergekit's options: caches, `lazy_unpickle` and `lora_merge_dtype` are used.
        base: the base model's loader, which is then shared; None opens a new one.
        skeleton: the model, if it is known: adapters name modules as the model does, and its checkpoint may not.
        planning: download no weights. If some are missing, the loader gives names and shapes, and no tensors.

    Returns:
        The loader; None if the model has no adapter or mergekit has to merge a copy (see `needs_merged_copy`).

    Raises:
        ModelError: the adapter is missing or damaged, adapts a module that its base lacks, or has other shapes; or the
            base's weights are quantized.
    """
    if model.lora is None:
        return None
    adapter = read_adapter(model.lora)
    if merge_reason(adapter) is not None:
        return None
    plain = model.model_copy(update={"lora": None})
    try:
        config = plain.config(trust_remote_code=options.trust_remote_code)
        base = base or open_checkpoint(plain, options, str(plain), planning=planning)
        refuse_quantized(base, read_stored(base, str(plain)), str(plain))
    except SltaError:
        raise
    except Exception as error:  # mergekit, the Hub and the file system raise different errors
        raise ModelError(
            f"cannot open the checkpoint of {show(plain)}, the base of an adapter ({show(error)}): "
            "check the path or Hub id",
            code="unreadable-checkpoint",
        ) from error
    names = read_names(skeleton.model, base.index.tensor_paths)[0] if skeleton is not None else None
    updates = find_updates(adapter, base, config, names)
    check_shapes(base, updates)
    if not planning:
        adapter = fetch_weights(adapter)
    return AdapterLoader(
        base,
        loader_of_file(adapter.weights_file, list(adapter.shapes)),
        updates,
        (adapter.config_file, adapter.weights_file),
        dtype_named(options.lora_merge_dtype),
        adapter.download,
    )
