"""Call a transformers model with given tensors, as a whole or up to its decoder layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from mergekit_slta.libraries.torch import replaced_forwards


class Stop(Exception):  # noqa: N818 - control flow, never seen outside this folder
    """Ends a forward pass of which no more is needed."""


@dataclass(frozen=True)
class LayerCall:
    """The arguments of a decoder layer besides the hidden states: masks, position embeddings."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call_model(model: nn.Module, weights: Mapping[str, Tensor], **inputs: Tensor) -> Any:
    """Run a model, without a cache."""
    # A skeleton has no tied parameters, and this call must not tie any.
    return functional_call(model, dict(weights), (), {**inputs, "use_cache": False}, tie_weights=False)


def enter_layers(
    model: nn.Module,
    layers: Sequence[nn.Module],
    returned: Callable[[Tensor], Any],
    ids: Tensor,
    weights: Mapping[str, Tensor],
) -> tuple[Tensor, list[LayerCall]]:
    """Run a model up to its decoder layers.

    Args:
        model: the model.
        layers: its decoder layers, which are not run.
        returned: hidden states -> what the model expects a layer to return.
        ids: [b, s] int64 token ids.
        weights: the tensors before the layers.

    Returns:
        The input [b, s, d] of the first layer, and the arguments of every layer.
    """
    inputs: list[Tensor] = []
    calls: list[LayerCall] = []

    def recorder(*args: Any, **kwargs: Any) -> Any:
        hidden, rest, named = take_hidden(args, kwargs)
        if calls and hidden.shape != inputs[0].shape:
            raise Stop  # the model took [0] of a tensor, so it expects layers that return tuples
        inputs.append(hidden)
        calls.append(LayerCall(rest, named))
        if len(calls) == len(layers):
            raise Stop
        return returned(hidden)

    with replaced_forwards(dict.fromkeys(layers, recorder)), suppress(Stop):
        call_model(model, weights, input_ids=ids)
    return inputs[0], calls


def take_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Split the arguments of a layer or block into the hidden states and the rest."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    key = "hidden_states" if "hidden_states" in rest else next(iter(rest))
    return rest.pop(key), (), rest
