"""What modules are given while a model runs, and the gradients by what they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class ModuleCall:
    """One call of a module.

    Attributes:
        inputs: its positional arguments.
        gradient: of whatever the last backward pass began with, by the module's output; None before one.
    """

    inputs: tuple[Any, ...]
    gradient: Tensor | None = None


@contextmanager
def record_calls(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[ModuleCall]]]:
    """Keep the calls of modules, by the names given to these."""
    seen: dict[str, list[ModuleCall]] = {name: [] for name in modules}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            call = ModuleCall(inputs)
            seen[name].append(call)
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda gradient: setattr(call, "gradient", gradient))

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
