"""Hooks on modules: record their inputs and the gradients by their outputs, and cast inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class ModuleCall:
    """One call of a module.

    Attributes:
        inputs, named: its positional and named arguments.
        shape: the shape of its output; None if the output is not one tensor that requires a gradient.
        gradients: of each backward pass, the gradient with respect to its output.
    """

    inputs: tuple[Any, ...]
    named: dict[str, Any] = field(default_factory=dict)
    shape: torch.Size | None = None
    gradients: list[Tensor] = field(default_factory=list)

    @property
    def first(self) -> Any:
        """The first argument."""
        return self.inputs[0] if self.inputs else next(iter(self.named.values()))


@contextmanager
def record_calls(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[ModuleCall]]]:
    """Record the calls of modules inside the context.

    Args:
        modules: name -> module.

    Yields:
        name -> the module's calls so far, in order.
    """
    seen: dict[str, list[ModuleCall]] = {name: [] for name in modules}

    def recorder(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            call = ModuleCall(inputs, named)
            seen[name].append(call)
            if isinstance(output, Tensor) and output.requires_grad:
                call.shape = output.shape
                output.register_hook(call.gradients.append)

        return hook

    handles = [module.register_forward_hook(recorder(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def cast_linear_maps(modules: Mapping[str, nn.Module], dtype: torch.dtype) -> frozenset[str]:
    """Let linear maps cast their inputs to the dtype of their weights, and their outputs to `dtype`.

    Args:
        modules: path -> linear map.
        dtype: dtype of the outputs.

    Returns:
        Names of their weights and biases.
    """

    def enter(
        module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cast = [each.to(module.weight.dtype) for each in (*args, *named.values())]
        return tuple(cast[: len(args)]), dict(zip(named, cast[len(args) :], strict=True))

    for module in modules.values():
        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(lambda _, __, output: output.to(dtype))
    return frozenset(f"{path}.{key}" for path in modules for key in ("weight", "bias"))
