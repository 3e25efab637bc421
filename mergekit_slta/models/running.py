"""Call a transformers model with given tensors, as a whole or up to its decoder layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PretrainedConfig

from mergekit_slta.libraries.torch import replaced_forwards, tree_leaves


class Stop(Exception):  # noqa: N818 - control flow, never seen outside this folder
    """Ends a forward pass of which no more is needed."""


@dataclass(frozen=True)
class LayerCall:
    """The arguments of a decoder layer besides the hidden states: masks, position embeddings."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BaseOutput:
    """Stands for a base model's output: the features, and None for everything else (router logits, caches)."""

    def __init__(self, features: Tensor) -> None:
        self.last_hidden_state = features

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


def chained(modules: Sequence[nn.Module], features: Tensor) -> Tensor:
    """Run modules one after another."""
    for module in modules:
        features = module(features)
    return features


def call_model(model: nn.Module, weights: Mapping[str, Tensor], **inputs: Tensor) -> Any:
    """Run a model, without a cache."""
    # A skeleton has no tied parameters, and this call must not tie any.
    return functional_call(model, dict(weights), (), {**inputs, "use_cache": False}, tie_weights=False)


def call_with_cache(model: nn.Module, weights: Mapping[str, Tensor], ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Run a model on tokens [b, s] behind those of a cache, None at first; returns logits [b, s, v] and the new cache.

    The cache is None if the model's code keeps none of the usual kind. It must then be given all tokens again.
    """
    inputs = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
    output = functional_call(model, dict(weights), (), inputs, tie_weights=False)
    kept = getattr(output, "past_key_values", None)
    return output.logits, kept if hasattr(kept, "reorder_cache") else None


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
        if calls and hidden is not inputs[0] and not torch.equal(hidden, inputs[0]):
            raise ValueError("the model changes the hidden states between layers")
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


def looks_ahead(layer: nn.Module, call: LayerCall) -> bool:
    """Whether a layer's attention reads later tokens: by its mask [b, h, s, s], where True or 0 stands for reading (or
    the reverse), or if there is none by its modules' `is_causal`, which tells torch's kernels."""
    leaves = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
    masks = [leaf for leaf in leaves if leaf.dim() == 4 and 1 < leaf.shape[-1] == leaf.shape[-2]]
    if masks:
        reads = masks[0] if masks[0].dtype == torch.bool else masks[0] >= 0
        if not reads.diagonal(dim1=-2, dim2=-1).any():  # every token reads itself
            reads = ~reads
        return bool(reads.triu(1).any())
    return any(getattr(module, "is_causal", True) is False for module in layer.modules())


def learned_positions(model: nn.Module, config: PretrainedConfig) -> int | None:
    """Rows of the table of position embeddings that tokens can have; None if there is no such table.

    OPT's has `offset` rows more than positions.
    """
    tokens = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not tokens:
            offset = int(getattr(module, "offset", 0))
            if module.num_embeddings - offset == getattr(config, "max_position_embeddings", None):
                return module.num_embeddings - offset
    return None
