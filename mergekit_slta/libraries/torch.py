"""Behaviours of torch that this package relies on and torch does not document."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["TorchDispatchMode", "tree_leaves", "tree_map"]
"""Names that other files import from here."""


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the `forward` of modules inside the context.

    Relies on `nn.Module.__call__` and `torch.func.functional_call` calling `self.forward`: an attribute of the instance
    hides the method of the class.
    """
    try:
        for module, forward in forwards.items():
            module.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is from torch's CPU allocator. It is a plain RuntimeError, recognized only by its text."""
    return "not enough memory" in str(error) or "can't allocate memory" in str(error)


class NoMeta(TorchDispatchMode):
    """Refuse tensors without data: torch multiplies one with a tensor on the CPU, and the product is arbitrary.

    Raises:
        ValueError: an operation gets a tensor on the meta device, and another on the CPU.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
        if len({tensor.is_meta for tensor in tensors}) == 2:
            raise ValueError("a tensor that was not loaded is used")
        return func(*args, **(kwargs or {}))
