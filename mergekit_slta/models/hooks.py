"""Record the inputs of modules while a model runs, and the gradients with respect to their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class ModuleCall:
    """One call of a module.

    Attributes:
        inputs, named: its positional and named arguments.
        gradient: gradient of the last backward pass with respect to the module's output, in the shape of the output;
            None before a backward pass.
    """

    inputs: tuple[Any, ...]
    named: dict[str, Any] = field(default_factory=dict)
    gradient: Tensor | None = None


@contextmanager
def record_calls(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[ModuleCall]]]:
    """Record the calls of modules inside the context.

    Args:
        modules: name -> module.

    Yields:
        name -> the module's calls so far, in order. A gradient is recorded only if the output is one tensor that
        requires a gradient.
    """
    seen: dict[str, list[ModuleCall]] = {name: [] for name in modules}

    def recorder(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            call = ModuleCall(inputs, named)
            seen[name].append(call)
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda gradient: setattr(call, "gradient", gradient))

        return hook

    handles = [module.register_forward_hook(recorder(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
