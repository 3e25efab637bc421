"""The model's code without its weights: transformers runs each part, tensors are handed in call by call.

Scope: the only file that calls into a model's forward. Parameters live on the meta device and buffers are real, so a
70B model's skeleton weighs nothing. Blocks come from the layer's own forward, generic over architectures: a decoder
layer whose other branch returns zeros *is* the block, residual and norms included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PretrainedConfig

from mergekit_slta.errors import ModelError, RunError, show
from mergekit_slta.models.architectures import Architecture, Block, architecture
from mergekit_slta.models.hooks import record_calls
from mergekit_slta.models.submodules import Anatomy


class _Stop(Exception):  # noqa: N818 - control flow, never seen outside this file
    """Everything before the decoder layers has run."""


@dataclass(frozen=True)
class _LayerCall:
    """What a decoder layer was given besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _BaseOutput:
    """What a base model returns, for any head: features, and None for whatever else one asks (routers, caches)."""

    def __init__(self, features: Tensor) -> None:
        self.last_hidden_state = features

    def __getitem__(self, place: int) -> Tensor | None:
        return self.last_hidden_state if place == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


class Skeleton:
    """A causal language model with its parameters on the meta device. Tensors go by the names of mergekit's plan.

    Args:
        config: the base model's config; tying is ignored, the output projection is always a tensor of its own here.
        name: the base model's name, for messages.
        dtype: precision of the forward passes and of real buffers. Given to the constructor: a later cast would round
            what a model computes at construction (Gemma's embedding scale).
        device: where buffers are put and inputs are expected.
        trust_remote_code: the user's own flag.

    Raises:
        ModelError: the architecture is not supported, or the model's layers cannot be found.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        name: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        self.arch: Architecture = architecture(config.architectures, name)
        config = type(config).from_dict({**config.to_dict(), "tie_word_embeddings": False})
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        self.model.eval()
        self.model.requires_grad_(False)
        self.device = torch.device(device)
        for module in self.model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = buffer.to(self.device)
        self.config = config
        self.layers, self.layers_path = _find_layers(self.model, name)
        self.num_layers = len(self.layers)
        built = dict(self.model.named_parameters())
        # Plan's name -> transformers', where its version has another.
        self.renamed = {theirs: ours for theirs, ours in self.arch.renamed if ours in built}
        planned = {ours: theirs for theirs, ours in self.renamed.items()}
        self.shapes = {planned.get(key, key): tuple(parameter.shape) for key, parameter in built.items()}
        names = {id(parameter): planned.get(key, key) for key, parameter in built.items()}
        self.head_weight = names[id(self.model.get_output_embeddings().weight)]
        self.embedding_weight = names[id(self.model.get_input_embeddings().weight)]
        self._base_model = self.model.get_submodule(self.layers_path.rpartition(".")[0])
        modules = [
            path for path, module in self.model.named_modules() if module._parameters.keys() & {"weight", "bias"}
        ]
        self.anatomy = Anatomy(
            self.arch, config, self.layers_path, self.num_layers, self.head_weight, frozenset(modules)
        )
        self._calls: dict[tuple[int, int], list[_LayerCall]] = {}
        self._layers_return_tuples = False

    def embed(self, ids: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Run everything before the first layer.

        Args:
            ids: [b, s] int64 positions in the given embedding table (which may hold only the rows that occur).
            weights: the tensors that are used there.

        Returns:
            [b, s, d]. No attention mask is needed: rows are padded on the right, and no token looks to its right.
        """
        shape = (ids.shape[0], ids.shape[1])
        hidden, calls = self._enter(ids, weights)
        if hidden.shape[:2] != shape or len(calls) != self.num_layers:
            self._layers_return_tuples = True
            hidden, calls = self._enter(ids, weights)
        self._calls[shape] = calls
        return hidden

    def _enter(self, ids: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor, list[_LayerCall]]:
        inputs: list[Tensor] = []
        calls: list[_LayerCall] = []

        def recorder(*args: Any, **kwargs: Any) -> Any:
            hidden, rest, named = _take_hidden(args, kwargs)
            if calls and hidden.shape != inputs[0].shape:
                raise _Stop  # the model took [0] of what it was given: its layers return tuples
            inputs.append(hidden)
            calls.append(_LayerCall(rest, named))
            if len(calls) == self.num_layers:
                raise _Stop
            return (hidden,) if self._layers_return_tuples else hidden

        with _replaced_forwards(dict.fromkeys(self.layers, recorder)), suppress(_Stop):
            self._call_model(weights, input_ids=ids)
        return inputs[0], calls

    def layer(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """A decoder layer's output for its input, both [b, s, d]; (b, s) must have been embedded before."""
        call = self._calls[(hidden.shape[0], hidden.shape[1])][index]
        return self._run_layer(index, hidden, weights, call)

    def block(self, index: int, block: Block, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """A layer's output, [b, s, d], with its other branch returning zeros: `x + attention(norm(x))` and the like.

        Args:
            index: the decoder layer.
            block: which branch is kept.
            hidden: [b, s, d]; for the attention block (b, s) must have been embedded before, the MLP takes any.
            weights: the block's tensors, and the base's norms of the other branch (they run, and come to nothing).
        """
        layer = self.layers[index]
        if block == "attention":
            with _replaced_forwards({layer.get_submodule(self.arch.mlp): _zeros}):
                return self.layer(index, hidden, weights)
        call = next(iter(self._calls.values()))[index]  # the branch that used positions and masks is silent
        with _replaced_forwards({layer.get_submodule(self.arch.attention): _no_attention}):
            return self._run_layer(index, hidden, weights, call)

    def has_parallel_blocks(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> bool:
        """Which wiring reproduces a layer on its input [b, s, d]: the MLP behind attention, or both on that input.

        Raises:
            ModelError: neither does, so that the blocks would not be what the model computes.
        """
        whole = self.layer(index, hidden, weights)
        attended = self.block(index, "attention", hidden, weights)
        sequential = self.block(index, "mlp", attended, weights)
        parallel = attended + (self.block(index, "mlp", hidden, weights) - hidden)
        tolerance = 1e-3 * (whole - hidden).norm() + 64 * torch.finfo(whole.dtype).eps * whole.norm()
        errors = [(whole - sequential).norm(), (whole - parallel).norm()]
        if min(errors) > tolerance:
            raise ModelError(
                f"the attention and MLP blocks of {show(f'{self.layers_path}.{index}')} do not add up to the layer: "
                "use `granularity: layer`, and please report the model"
            )
        return bool(errors[1] < errors[0])

    def _run_layer(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor], call: _LayerCall) -> Tensor:
        prefix = f"{self.layers_path}.{index}."
        local = {key.removeprefix(prefix): tensor for key, tensor in weights.items()}
        output = functional_call(self.layers[index], local, (hidden, *call.args), call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def head(self, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Everything after the last layer: logits [1, n, v] of hidden states [1, n, d].

        The output projection (and its bias) may be given by some of its rows: v is then their number.
        """
        norm = self._base_model.get_submodule(self.arch.final_norm)

        def after_layers(*_: Any, **__: Any) -> _BaseOutput:
            return _BaseOutput(norm(hidden))

        with _replaced_forwards({self._base_model: after_layers}):
            return self._call_model(weights, inputs_embeds=hidden).logits

    def _call_model(self, weights: Mapping[str, Tensor], **inputs: Tensor) -> Any:
        named = {self.renamed.get(key, key): tensor for key, tensor in weights.items()}
        # Tied parameters of the skeleton's own (none are left) must not be tied again here.
        return functional_call(self.model, named, (), {**inputs, "use_cache": False}, tie_weights=False)

    def module(self, path: str, inputs: tuple[Any, ...], weights: Mapping[str, Tensor]) -> Tensor:
        """One module's output for inputs of its own; a router's are its logits."""
        local = {key.removeprefix(path + "."): tensor for key, tensor in weights.items() if key.startswith(path + ".")}
        output = functional_call(self.model.get_submodule(path), local, inputs)
        return output[0] if isinstance(output, tuple) else output

    def layer_with_inputs(
        self, index: int, hidden: Tensor, weights: Mapping[str, Tensor], modules: Sequence[str]
    ) -> tuple[Tensor, dict[str, tuple[Any, ...]]]:
        """A decoder layer's output, and what each of the named modules in it was given."""
        with record_calls({path: self.model.get_submodule(path) for path in modules}) as seen:
            output = self.layer(index, hidden, weights)
        return output, {path: calls[-1].inputs for path, calls in seen.items() if calls}

    def attention_with_heads(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The attention block's output, [b, s, d], and the heads' own before the output projection, [b, s, heads]."""
        path = f"{self.layers_path}.{index}.{self.arch.attention}.{self.arch.projections.output}"
        with record_calls({path: self.model.get_submodule(path)}) as seen:
            output = self.block(index, "attention", hidden, weights)
        return output, seen[path][-1].inputs[0]


def _find_layers(model: nn.Module, name: str) -> tuple[list[nn.Module], str]:
    """The decoder layers and the path of their list, by the class names that transformers keeps for device maps."""
    classes = set(model._no_split_modules or ())
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(type(m).__name__ in classes for m in module):
            return list(module), path
    raise ModelError(f"no decoder layers ({show(sorted(classes))}) found in {show(name)}; please report the model")


def _take_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def _zeros(*args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros_like(_take_hidden(args, kwargs)[0])


def _no_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _zeros(*args, **kwargs), None


@contextmanager
def _replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Put other functions in the place of modules' `forward`, for a while."""
    try:
        for module, forward in forwards.items():
            module.forward = forward  # type: ignore[method-assign] - the instance's attribute hides the class's
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)


def finite(features: Tensor, where: str) -> Tensor:
    """The features (or gradients) themselves.

    Raises:
        RunError: they hold NaN or Inf.
    """
    # A sum is finite only if every element is, and costs no mask; a sum that overflows is looked at twice.
    if not torch.isfinite(features.sum()) and not torch.isfinite(features).all():
        raise RunError(
            f"the features behind {show(where)} hold NaN or Inf in {str(features.dtype).removeprefix('torch.')}: "
            "use `compute_dtype: float32`, or check the models"
        )
    return features
