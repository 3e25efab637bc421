"""The parts of a decoder layer that have weights of their own: matrices and norms, heads, the router of its experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PretrainedConfig, PreTrainedModel

from mergekit_slta.libraries.torch import tree_map
from mergekit_slta.models.anatomy import LayerAnatomy, without
from mergekit_slta.models.architectures import Heads, find_heads
from mergekit_slta.models.running import LayerCall


def own_modules(layer: nn.Module, idle: set[nn.Module]) -> Iterator[tuple[str, Literal["linear", "norm"]]]:
    """The modules in a layer that can be evaluated by themselves: matrices and norms, but no experts."""
    inside = tuple(
        f"{path}."
        for path, module in layer.named_modules()
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and any(part.dim() > 1 for part in module.parameters())
    )
    for path, module in layer.named_modules():
        own = {key: parameter.dim() for key, parameter in module.named_parameters(recurse=False)}
        is_one = {"weight", "bias"} & own.keys() and max(own.values()) <= 2
        if is_one and not path.startswith(inside) and module not in idle:
            is_norm = max(own.values()) == 1 or "norm" in type(module).__name__.lower()  # Cohere's have a row per head
            yield path, "norm" if is_norm else "linear"


def idle_modules(
    layer: nn.Module, anatomy: LayerAnatomy, call: LayerCall, width: int, dtype: torch.dtype
) -> set[nn.Module]:
    """The modules in a layer's attention block whose weights are used without calling them (Mamba's `dt_proj`).

    The layer runs on the meta device, without its MLP block. Where that fails, all are taken as called.
    """
    called: set[nn.Module] = set()
    parts = [part for name in anatomy.mixers for part in layer.get_submodule(name).modules()]
    handles = [part.register_forward_pre_hook(lambda module, _: called.add(module)) for part in parts]

    def on_meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    weights = {name: on_meta(tensor) for name, tensor in state.items()}
    hidden = torch.empty((1, 4, width), dtype=dtype, device="meta")
    args, kwargs = tree_map(on_meta, (call.args, call.kwargs))
    try:
        with without(layer, anatomy, "mlp"):
            functional_call(layer, weights, (hidden, *args), kwargs)
    except Exception:  # the code looks at the values of a tensor
        return set()
    finally:
        for handle in handles:
            handle.remove()
    return {*parts} - called


def heads_of(
    model: PreTrainedModel,
    config: PretrainedConfig,
    path: str,
    anatomy: LayerAnatomy | None,
    shapes: Mapping[str, tuple[int, ...]],
) -> Heads | None:
    """The heads of the attention block of the layer at `path`; None if it cannot be divided by head."""
    if anatomy is None or len(anatomy.mixers) != 1:
        return None
    place = f"{path}.{anatomy.mixers[0]}"
    transposed = any(type(module).__name__ == "Conv1D" for module in model.get_submodule(place).modules())
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    return find_heads(place, type(model).__name__, heads, shapes, transposed=transposed)


def router_of(layer: nn.Module, anatomy: LayerAnatomy) -> nn.Module | None:
    """The module of an MLP block with as many outputs as there are experts; None if there are no experts."""
    parts = [module for name in anatomy.mlps for module in layer.get_submodule(name).modules()]
    counts = {len(part) for part in parts if isinstance(part, nn.ModuleList)}
    counts |= {weight.shape[0] for part in parts for weight in part.parameters(recurse=False) if weight.dim() == 3}
    for part in parts:
        weight = getattr(part, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] in counts:
            return part
    return None


def experts_per_token(config: PretrainedConfig) -> int | None:
    """Number of experts that a token is sent to, by the config; None if it does not say."""
    keys = ("num_experts_per_tok", "top_k_experts", "moe_k", "num_experts_per_token", "moe_top_k")
    value = next((value for key in keys if (value := getattr(config, key, None))), None)
    return value[0] if isinstance(value, (list, tuple)) else value  # HunYuan's is per layer
