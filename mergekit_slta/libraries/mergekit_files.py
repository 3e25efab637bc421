"""How mergekit finds the files of a model; see `mergekit.py` for everything else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader

USED = {
    "mergekit.common.ModelReference.local_path(cache_dir, ignore_lora)": "replaced: `prefer_open_loaders`",
    "mergekit.common.ModelReference.tensor_index(cache_dir)": "replaced: `prefer_open_loaders`",
}
"""name(parameters) -> its use in this package."""


def prefer_open_loaders() -> None:
    """Let mergekit find the files of a model whose loader is open without asking the Hub, which may be switched off.

    mergekit lists a model's files on the Hub whenever it needs their folder: to infer an architecture, to copy the
    tokenizer, to copy other files at the end of a merge. Calling this again changes nothing.
    """
    from mergekit.io.tasks import LoaderCache

    def preferring(original: Callable[..., Any], found: Callable[[LazyTensorLoader], Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(self: ModelReference, *args: Any, **kwargs: Any) -> Any:
            loader = None if self.lora else LoaderCache.loaders.get(self)
            return original(self, *args, **kwargs) if loader is None else found(loader)

        return method

    reference: Any = ModelReference
    if not hasattr(reference.local_path, "__wrapped__"):
        reference.tensor_index = preferring(reference.tensor_index, lambda loader: loader.index)
        reference.local_path = preferring(reference.local_path, lambda loader: loader.index.base_path)
