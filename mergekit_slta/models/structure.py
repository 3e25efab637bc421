"""Find the structure of a language model: its decoder layers, what is before and after them, and what they are made of.

Scope: runs the model's code on a few tokens with stand-ins for its weights, which take no memory. `anatomy.py` looks
into one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PretrainedConfig, PreTrainedModel

from mergekit_slta.errors import ModelError, show
from mergekit_slta.libraries.torch import replaced_forwards, tree_leaves, tree_map
from mergekit_slta.models.anatomy import Block, LayerAnatomy, look_at_layer, stand_in
from mergekit_slta.models.architectures import Heads, find_heads
from mergekit_slta.models.running import LayerCall, call_model, enter_layers, take_hidden
from mergekit_slta.models.submodules import Anatomy

_ROWS = ((0, 1, 2, 3), (3, 1, 0, 2))
"""Two rows of token ids, on which the model is run."""
_RETURNS: tuple[Callable[[Tensor], Any], ...] = (lambda h: h, lambda h: (h,), lambda h: (h, None))
"""What a model may expect its layers to return, for hidden states h."""


@dataclass(frozen=True)
class Structure:
    """The structure of a language model.

    Attributes:
        layers: the decoder layers.
        returned: hidden states -> what the model expects a layer to return.
        around: the outermost module that is called, and holds the layers but not the output projection.
        after: the modules inside `around` that are called after the layers, in this order.
        width: d, the size of the hidden states.
        used: the names of the tensors that text runs through, in the order of a forward pass.
        anatomy: names and structure, for `partition`.
        routers: number of a layer -> (router of its experts, how many experts a token is sent to).
    """

    layers: list[nn.Module]
    returned: Callable[[Tensor], Any]
    around: nn.Module
    after: list[nn.Module]
    width: int
    used: tuple[str, ...]
    anatomy: Anatomy
    routers: dict[int, tuple[nn.Module, int]]


def find_structure(model: PreTrainedModel, config: PretrainedConfig, dtype: torch.dtype, name: str) -> Structure:
    """Find the structure of a model.

    Args:
        model: the model, on the meta device, its output projection a tensor of its own.
        config: the config of its language model.
        dtype: precision.
        name: the model's name, for messages.

    Raises:
        ModelError: its layers are not found, or cannot be run one by one.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    saved = {key: tensor for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
    weights = {key: _varied(tensor, dtype) for key, tensor in saved.items()}
    layers, layers_path = _find_layers(model, config, name)
    returned, calls, width = _try_layers(model, layers, weights, name)
    called, after = _trace(model, layers, layers_path, returned, weights)
    head = model.get_output_embeddings()
    head_weight = next(key for key, parameter in model.named_parameters() if parameter is head.weight)
    around = model.get_submodule(_around(layers_path, head_weight, called))
    inside = set(around.modules())
    anatomies = tuple(
        look_at_layer(layer, call.args, call.kwargs, width, dtype) for layer, call in zip(layers, calls, strict=True)
    )
    shapes = {key: tuple(tensor.shape) for key, tensor in saved.items()}
    modules: dict[str, Literal["linear", "norm"]] = {}
    heads = []
    for index, (layer, anatomy) in enumerate(zip(layers, anatomies, strict=True)):
        path = f"{layers_path}.{index}"
        idle = set() if anatomy is None else _idle(layer, anatomy, calls[index], width, dtype)
        modules |= {f"{path}.{each}": kind for each, kind in _modules(layer, idle)}
        heads.append(_heads(model, config, path, anatomy, shapes))
    in_layers = f"{layers_path}."
    used = [key for key in saved if key.startswith(in_layers) or key.rpartition(".")[0] in called or key == head_weight]
    after_layers = (*(f"{paths[id(module)]}." for module in after), head_weight.removesuffix("weight"))

    def place(name: str) -> tuple[int, int, int]:
        """Before the layers, in a layer, or after them; number of the layer; place of its part in the layer."""
        if not name.startswith(in_layers):
            return (2 if name.startswith(after_layers) else 0), 0, 0
        index, _, rest = name[len(in_layers) :].partition(".")
        order = () if (anatomy := anatomies[int(index)]) is None else anatomy.order
        return 1, int(index), next((at for at, part in enumerate(order) if rest.startswith(f"{part}.")), len(order))

    return Structure(
        layers,
        returned,
        around,
        [module for module in after if module in inside],
        width,
        tuple(sorted(used, key=place)),
        Anatomy(
            layers_path, anatomies, head_weight, tuple(paths[id(module)] for module in after), modules, tuple(heads)
        ),
        {
            index: (router, _experts_per_token(config))
            for index, (layer, anatomy) in enumerate(zip(layers, anatomies, strict=True))
            if anatomy is not None and (router := _router(layer, anatomy)) is not None
        },
    )


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


def cannot_run(model: nn.Module, name: str, reason: str) -> ModelError:
    """The error for a model that is no decoder-only language model, or whose layers cannot be run one by one."""
    return ModelError(
        f"{show(name)} is a {type(model).__name__}, which cannot be merged here: {reason}",
        code="unsupported-architecture",
    )


def _varied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A stand-in for a tensor whose rows differ, in a small part of its memory."""
    if tensor.dim() < 2:
        return stand_in(tensor.shape, dtype)
    rows = torch.linspace(0.1, 1.0, tensor.shape[0], dtype=dtype)
    return rows.reshape(-1, *[1] * (tensor.dim() - 1)).expand(tensor.shape)


def _find_layers(model: PreTrainedModel, config: PretrainedConfig, name: str) -> tuple[list[nn.Module], str]:
    """Find the decoder layers: of the lists of modules that are as long as the config says, the nearest to the
    embeddings. Returns them and the path of their list."""
    expected = getattr(config, "num_hidden_layers", None)
    embedding = model.get_input_embeddings()
    place = next(path for path, module in model.named_modules() if module is embedding)
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    while place:
        place = place.rpartition(".")[0]
        found = {path: module for path, module in lists.items() if path.startswith(f"{place}." if place else "")}
        for path, module in sorted(found.items(), key=lambda item: item[0].count(".")):
            if len(module) == expected:
                return list(module), path
    raise ModelError(
        f"no list of {show(expected)} decoder layers found in {show(name)}; please report the model",
        code="unknown-layers",
    )


def _try_layers(
    model: PreTrainedModel, layers: Sequence[nn.Module], weights: Mapping[str, Tensor], name: str
) -> tuple[Callable[[Tensor], Any], list[LayerCall], int]:
    """Find what the model expects its layers to return, and check that they can be run one by one.

    Returns:
        What they return, the arguments of every layer, and the size of the hidden states.
    """
    problem: Exception | str = "they are not called one after another"
    for returned in _RETURNS:
        try:
            found = [enter_layers(model, layers, returned, torch.tensor([ids]), weights) for ids in _ROWS]
        except Exception as error:  # the model unpacks what its layers return
            problem = error
            continue
        if any(len(calls) != len(layers) or hidden.shape[:2] != (1, len(_ROWS[0])) for hidden, calls in found):
            continue
        first, second = (
            [leaf for call in calls for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
            for _, calls in found
        )
        if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            raise cannot_run(model, name, "its layers read the tokens of a row, not only the hidden states")
        for key, value in [item for call in found[0][1] for item in call.kwargs.items()]:
            if isinstance(value, (dict, list)) and not tree_leaves(value):
                raise cannot_run(model, name, f"its layers hand states to later ones ({show(key)})")
        return returned, found[0][1], found[0][0].shape[-1]
    raise cannot_run(model, name, f"its {len(layers)} layers cannot be run one by one: {show(problem)}")


def _trace(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    layers_path: str,
    returned: Callable[[Tensor], Any],
    weights: Mapping[str, Tensor],
) -> tuple[set[str], list[nn.Module]]:
    """Run the model with layers that do nothing; returns the paths of the modules that are called, and the outermost
    ones with tensors that are called after the layers, except the output projection."""
    paths = {id(module): path for path, module in model.named_modules()}
    head = model.get_output_embeddings()
    called: set[str] = set()
    after: list[nn.Module] = []
    passed, inside = [0], [0]

    def layer(*args: Any, **kwargs: Any) -> Any:
        passed[0] += 1
        return returned(take_hidden(args, kwargs)[0])

    def is_after(module: nn.Module) -> bool:
        holds_layers = layers_path.startswith(paths[id(module)])
        has_tensors = any(True for _ in module.parameters())
        return passed[0] == len(layers) and not holds_layers and module is not head and has_tensors

    def enter(module: nn.Module, _: Any) -> None:
        called.add(paths[id(module)])
        if is_after(module):
            if not inside[0]:
                after.append(module)
            inside[0] += 1

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        inside[0] -= is_after(module) and inside[0] > 0

    outside = [module for path, module in model.named_modules() if not path.startswith(f"{layers_path}.")]
    handles = [module.register_forward_pre_hook(enter) for module in outside]
    handles += [module.register_forward_hook(leave) for module in outside]
    forwards: dict[nn.Module, Callable[..., Any]] = dict.fromkeys(layers, layer)
    forwards[head] = lambda hidden: hidden[..., :1]
    try:
        with replaced_forwards(forwards):
            call_model(model, weights, input_ids=torch.tensor([_ROWS[0]]))
    finally:
        for handle in handles:
            handle.remove()
    return called, list(dict.fromkeys(after))


def _around(layers_path: str, head_weight: str, called: set[str]) -> str:
    """Path of the outermost module that is called, and holds the layers but not the output projection."""
    path = found = layers_path.rpartition(".")[0]
    while path and not head_weight.startswith(f"{path}."):
        found = path if path in called else found
        path = path.rpartition(".")[0]
    return found


def _modules(layer: nn.Module, idle: set[nn.Module]) -> Iterator[tuple[str, Literal["linear", "norm"]]]:
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


def _idle(layer: nn.Module, anatomy: LayerAnatomy, call: LayerCall, width: int, dtype: torch.dtype) -> set[nn.Module]:
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
    hidden = torch.empty((1, len(_ROWS[0]), width), dtype=dtype, device="meta")
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


def _heads(
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


def _router(layer: nn.Module, anatomy: LayerAnatomy) -> nn.Module | None:
    """The module of an MLP block with as many outputs as there are experts; None if there are no experts."""
    parts = [module for name in anatomy.mlps for module in layer.get_submodule(name).modules()]
    counts = {len(part) for part in parts if isinstance(part, nn.ModuleList)}
    counts |= {weight.shape[0] for part in parts for weight in part.parameters(recurse=False) if weight.dim() == 3}
    for part in parts:
        weight = getattr(part, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] in counts:
            return part
    return None


def _experts_per_token(config: PretrainedConfig) -> int:
    keys = ("num_experts_per_tok", "top_k_experts", "moe_k", "num_experts_per_token", "moe_top_k")
    return next((int(value) for key in keys if (value := getattr(config, key, None))), 1)


@contextmanager
def without(layer: nn.Module, anatomy: LayerAnatomy, block: Block) -> Iterator[None]:
    """Let the modules and norms of one of a layer's blocks return zeros inside the context."""
    with replaced_forwards(
        {
            layer.get_submodule(part): _zeros_and_none if part in anatomy.tuples else _zeros
            for part in anatomy.parts(block)
        }
    ):
        yield


def _zeros(*args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros_like(take_hidden(args, kwargs)[0])


def _zeros_and_none(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _zeros(*args, **kwargs), None
