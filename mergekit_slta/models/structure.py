"""Find the structure of a language model: its decoder layers, what is before and after them, and what they are made of.

Scope: runs the model's code on a few tokens with stand-ins for its weights, which take no memory. `anatomy.py` looks
into one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mergekit_slta.errors import ModelError, show
from mergekit_slta.libraries.torch import replaced_forwards, tree_leaves
from mergekit_slta.models.anatomy import look_at_layer, stand_in
from mergekit_slta.models.parts import experts_per_token, heads_of, idle_modules, own_modules, router_of
from mergekit_slta.models.running import (
    BaseOutput,
    LayerCall,
    call_model,
    chained,
    enter_layers,
    looks_ahead,
    take_hidden,
)
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
    called, after, ends = _trace(model, layers, layers_path, returned, weights, width)
    head = model.get_output_embeddings()
    head_weight = next(key for key, parameter in model.named_parameters() if parameter is head.weight)
    around = model.get_submodule(_around(layers_path, head_weight, called))
    inside = set(around.modules())
    trained = tuple(paths[id(module)] for module in after if any(True for _ in module.parameters()))
    anatomies = tuple(
        look_at_layer(layer, call.args, call.kwargs, width, dtype) for layer, call in zip(layers, calls, strict=True)
    )
    inner = [module for module in after if module in inside]
    if not torch.allclose(ends, _after_layers(model, around, inner, width, weights)):
        raise cannot_run(model, name, "it does more after its layers than to call modules")
    shapes = {key: tuple(tensor.shape) for key, tensor in saved.items()}
    modules: dict[str, Literal["linear", "norm"]] = {}
    heads = []
    for index, (layer, anatomy) in enumerate(zip(layers, anatomies, strict=True)):
        path = f"{layers_path}.{index}"
        idle = set() if anatomy is None else idle_modules(layer, anatomy, calls[index], width, dtype)
        modules |= {f"{path}.{each}": kind for each, kind in own_modules(layer, idle)}
        heads.append(heads_of(model, config, path, anatomy, shapes))
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

    count = experts_per_token(config)
    return Structure(
        layers,
        returned,
        around,
        inner,
        width,
        tuple(sorted(used, key=place)),
        Anatomy(layers_path, anatomies, head_weight, trained, modules, tuple(heads)),
        {
            index: (router, count)
            for index, (layer, anatomy) in enumerate(zip(layers, anatomies, strict=True))
            if anatomy is not None and (router := router_of(layer, anatomy)) is not None and count is not None
        },
    )


def cannot_run(model: nn.Module, name: str, reason: str) -> ModelError:
    """The error for a model that is no decoder-only language model, or whose layers cannot be run one by one."""
    return ModelError(
        f"{show(name)} is a {type(model).__name__}, which cannot be merged here: {reason}",
        code="unsupported-architecture",
    )


def _varied(tensor: Tensor, dtype: torch.dtype, moved: int = 0) -> Tensor:
    """A stand-in for a tensor, in a small part of its memory. A matrix has different rows, moved by `moved`."""
    if tensor.dim() != 2:
        return stand_in(tensor.shape, dtype)
    numbers = torch.arange(sum(tensor.shape)).sub(moved).sin().to(dtype)
    return numbers.as_strided(tuple(tensor.shape), (1, 1))


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
    problems: list[Exception] = []
    for returned in _RETURNS:
        try:
            found = [enter_layers(model, layers, returned, torch.tensor([ids]), weights) for ids in _ROWS]
        except Exception as error:  # the model unpacks what its layers return
            problems.append(error)
            continue
        if any(len(calls) != len(layers) or hidden.shape[:2] != (1, len(_ROWS[0])) for hidden, calls in found):
            continue
        first, second = (
            [leaf for call in calls for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
            for _, calls in found
        )
        if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            raise cannot_run(model, name, "its layers read the tokens of a row, not only the hidden states")
        if not _reads_rows_by_number(model, layers, returned, weights):
            raise cannot_run(model, name, "its positions depend on the numbers of the tokens")
        for key, value in [item for call in found[0][1] for item in call.kwargs.items()]:
            if isinstance(value, (dict, list)) and not tree_leaves(value):
                raise cannot_run(model, name, f"its layers hand states to later ones ({show(key)})")
        if any(looks_ahead(*pair) for pair in zip(layers, found[0][1], strict=True)):
            raise cannot_run(model, name, "its attention reads later tokens, as an encoder's does")
        return returned, found[0][1], found[0][0].shape[-1]
    problem = problems[0] if problems else "they are not called one after another"
    raise cannot_run(model, name, f"its {len(layers)} layers cannot be run one by one: {show(problem)}")


def _reads_rows_by_number(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    returned: Callable[[Tensor], Any],
    weights: Mapping[str, Tensor],
) -> bool:
    """Whether token ids only choose rows of the embedding table: if rows and ids are moved by one, the layers' input
    stays the same. Calibration numbers the rows that occur anew."""
    table = model.get_input_embeddings().weight
    name = next(key for key, parameter in model.named_parameters() if parameter is table)
    pad = getattr(model.config, "pad_token_id", None)
    row = [pad if isinstance(pad, int) and 0 <= pad < len(table) - 1 else 0, *_ROWS[0][1:]]
    found = [
        enter_layers(
            model,
            layers,
            returned,
            torch.tensor([row]) + moved,
            {**weights, name: _varied(table, weights[name].dtype, moved)},
        )[0]
        for moved in (0, 1)
    ]
    return torch.allclose(*found)


def _trace(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    layers_path: str,
    returned: Callable[[Tensor], Any],
    weights: Mapping[str, Tensor],
    width: int,
) -> tuple[set[str], list[nn.Module], Tensor]:
    """Run the model with layers that do nothing, the last of which returns `_features`.

    Returns:
        The paths of the modules that are called; the outermost ones that are called after the layers and are to be run
        there, except the output projection; and the input of the output projection.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    head = model.get_output_embeddings()
    called: set[str] = set()
    after: list[nn.Module] = []
    passed, inside = [0], [0]

    def layer(*args: Any, **kwargs: Any) -> Any:
        passed[0] += 1
        hidden = take_hidden(args, kwargs)[0]
        return returned(_features(width, hidden.dtype) if passed[0] == len(layers) else hidden)

    def is_after(module: nn.Module) -> bool:
        holds_layers = layers_path.startswith(paths[id(module)])
        return passed[0] == len(layers) and not holds_layers and module is not head

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
    ends: list[Tensor] = []
    forwards[head] = lambda hidden: ends.append(hidden) or hidden[..., :1]  # type: ignore[func-returns-value]
    try:
        with replaced_forwards(forwards):
            call_model(model, weights, input_ids=torch.tensor([_ROWS[0]]))
    finally:
        for handle in handles:
            handle.remove()
    return called, list(dict.fromkeys(after)), ends[0]


def _features(width: int, dtype: torch.dtype) -> Tensor:
    """Hidden states of the row on which the model is run, [1, s, d]."""
    return torch.arange(len(_ROWS[0]) * width).sin().to(dtype).reshape(1, len(_ROWS[0]), width)


def _after_layers(
    model: PreTrainedModel, around: nn.Module, after: Sequence[nn.Module], width: int, weights: Mapping[str, Tensor]
) -> Tensor:
    """The input of the output projection, if the modules after the layers are all that is between them."""
    features, ends = _features(width, next(iter(weights.values())).dtype), []

    def run(*_: Any, **__: Any) -> BaseOutput:
        return BaseOutput(chained(after, features))

    head = model.get_output_embeddings()
    with replaced_forwards({around: run, head: lambda hidden: ends.append(hidden) or hidden[..., :1]}):
        call_model(model, weights, inputs_embeds=features)
    return ends[0]


def _around(layers_path: str, head_weight: str, called: set[str]) -> str:
    """Path of the outermost module that is called, and holds the layers but not the output projection."""
    path = found = layers_path.rpartition(".")[0]
    while path and not head_weight.startswith(f"{path}."):
        found = path if path in called else found
        path = path.rpartition(".")[0]
    return found
