"""The model's code without its weights: transformers runs each part of it, with tensors handed in for each call.

Scope: the only file that calls a model's forward. Parameters are on the meta device and buffers are real, so the
skeleton of a 70B model takes next to no memory. A block is computed by the layer's own forward, whatever the
architecture: a decoder layer whose other block returns zeros is the block, with its residual and norms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PretrainedConfig

from mergekit_slta.errors import ModelError, RunError, show
from mergekit_slta.libraries.torch import replaced_forwards
from mergekit_slta.libraries.transformers import layer_classes
from mergekit_slta.models.architectures import Architecture, Block, architecture
from mergekit_slta.models.hooks import record_calls
from mergekit_slta.models.submodules import Anatomy


class _Stop(Exception):  # noqa: N818 - control flow, never seen outside this file
    """Ends a model's forward once every decoder layer has been called."""


@dataclass(frozen=True)
class _LayerCall:
    """What a decoder layer is given besides the hidden states: masks, position embeddings."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _BaseOutput:
    """A base model's output as any head reads it: features, and None for everything else (router logits, caches)."""

    def __init__(self, features: Tensor) -> None:
        self.last_hidden_state = features

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


class Skeleton:
    """A causal language model with its parameters on the meta device. Tensors have the names of mergekit's plan.

    Args:
        config: the base model's config. Tying is ignored: the output projection is always a tensor of its own here.
        name: the base model's name, for messages.
        dtype: precision of the forward passes and of buffers. The model is built in it, since a later cast would round
            what a model computes at construction (Gemma's embedding scale).
        device: of buffers and inputs.
        trust_remote_code: the user's own flag.

    Attributes:
        arch: what is known of the model class.
        model: the transformers model.
        layers, layers_path, num_layers: the decoder layers, the path of their list, and how many there are.
        renamed: name in the plan -> name in transformers, where the two differ.
        shapes: name -> shape of every parameter.
        head_weight, embedding_weight: names of the output projection's and of the embedding's weight.
        anatomy: names and structure, for `partition`.

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
            for key, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, key, buffer.to(self.device))
        self.config = config
        self.layers, self.layers_path = _find_layers(self.model, name)
        self.num_layers = len(self.layers)
        built = dict(self.model.named_parameters())
        self.renamed = {plan_name: name for plan_name, name in self.arch.renamed if name in built}
        planned = {name: plan_name for plan_name, name in self.renamed.items()}
        self.shapes = {planned.get(key, key): tuple(parameter.shape) for key, parameter in built.items()}
        names = {id(parameter): planned.get(key, key) for key, parameter in built.items()}
        self.head_weight = names[id(self.model.get_output_embeddings().weight)]
        self.embedding_weight = names[id(self.model.get_input_embeddings().weight)]
        self._base_model = self.model.get_submodule(self.layers_path.rpartition(".")[0])
        modules = [
            path
            for path, module in self.model.named_modules()
            if {"weight", "bias"} & {key for key, _ in module.named_parameters(recurse=False)}
        ]
        self.anatomy = Anatomy(
            self.arch, config, self.layers_path, self.num_layers, self.head_weight, frozenset(modules)
        )
        self._calls: dict[tuple[int, int], list[_LayerCall]] = {}
        self._layers_return_tuples = False  # found out by `embed`

    def embed(self, ids: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Run everything before the first layer.

        Args:
            ids: [b, s] int64 positions in the embedding table given in `weights`, which may hold only the rows that
                occur.
            weights: the tensors that are used there.

        Returns:
            [b, s, d]. No attention mask is needed: rows are padded on the right, and attention is causal.
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
                raise _Stop  # the model took [0] of a tensor: its layers return tuples
            inputs.append(hidden)
            calls.append(_LayerCall(rest, named))
            if len(calls) == self.num_layers:
                raise _Stop
            return (hidden,) if self._layers_return_tuples else hidden

        with replaced_forwards(dict.fromkeys(self.layers, recorder)), suppress(_Stop):
            self._call_model(weights, input_ids=ids)
        return inputs[0], calls

    def layer(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """A decoder layer's output for its input, both [b, s, d]; `embed` must have run for the same (b, s) before."""
        call = self._calls[(hidden.shape[0], hidden.shape[1])][index]
        return self._run_layer(index, hidden, weights, call)

    def block(self, index: int, block: Block, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """A layer's output, [b, s, d], with its other block returning zeros: `x + attention(norm(x))` and the like.

        Args:
            index: the decoder layer.
            block: which block is kept.
            hidden: [b, s, d]. For the attention block `embed` must have run for the same (b, s) before; the MLP block
                takes any.
            weights: the block's tensors, and the norms of the other block, which run without effect.
        """
        layer = self.layers[index]
        if block == "attention":
            with replaced_forwards({layer.get_submodule(self.arch.mlp): _zeros}):
                return self.layer(index, hidden, weights)
        call = next(iter(self._calls.values()))[index]  # of any shape: only attention reads positions and masks
        with replaced_forwards({layer.get_submodule(self.arch.attention): _no_attention}):
            return self._run_layer(index, hidden, weights, call)

    def has_parallel_blocks(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> bool:
        """Whether a layer's MLP reads the layer's input, beside attention, and not attention's output.

        Both ways are computed from the blocks and compared with the layer's own output.

        Args:
            index: the decoder layer.
            hidden: [b, s, d] its input.
            weights: its tensors.

        Raises:
            ModelError: neither way gives the layer's output, so the blocks are not what the model computes.
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
                "use `granularity: layer`, and please report the model",
                code="unknown-blocks",
            )
        return bool(errors[1] < errors[0])

    def _run_layer(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor], call: _LayerCall) -> Tensor:
        prefix = f"{self.layers_path}.{index}."
        local = {key.removeprefix(prefix): tensor for key, tensor in weights.items()}
        output = functional_call(self.layers[index], local, (hidden, *call.args), call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def head(self, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Everything after the last layer: logits [1, n, v] of hidden states [1, n, d].

        `weights` may hold only some rows of the output projection and of its bias; v is their number.
        """
        norm = self._base_model.get_submodule(self.arch.final_norm)

        def after_layers(*_: Any, **__: Any) -> _BaseOutput:
            return _BaseOutput(norm(hidden))

        with replaced_forwards({self._base_model: after_layers}):
            return self._call_model(weights, inputs_embeds=hidden).logits

    def _call_model(self, weights: Mapping[str, Tensor], **inputs: Tensor) -> Any:
        named = {self.renamed.get(key, key): tensor for key, tensor in weights.items()}
        # No parameters are tied in the skeleton, and none must be tied in this call.
        return functional_call(self.model, named, (), {**inputs, "use_cache": False}, tie_weights=False)

    def module(self, path: str, inputs: tuple[Any, ...], weights: Mapping[str, Tensor]) -> Tensor:
        """One module's output for inputs of its own; the first one where it has several (a router's logits)."""
        local = {key.removeprefix(path + "."): tensor for key, tensor in weights.items() if key.startswith(path + ".")}
        output = functional_call(self.model.get_submodule(path), local, inputs)
        return output[0] if isinstance(output, tuple) else output

    def layer_with_inputs(
        self, index: int, hidden: Tensor, weights: Mapping[str, Tensor], modules: Sequence[str]
    ) -> tuple[Tensor, dict[str, tuple[Any, ...]]]:
        """A decoder layer's output, [b, s, d], and name -> positional inputs of each of the named modules in it."""
        with record_calls({path: self.model.get_submodule(path) for path in modules}) as seen:
            output = self.layer(index, hidden, weights)
        return output, {path: calls[-1].inputs for path, calls in seen.items() if calls}

    def attention_with_heads(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The attention block's output, [b, s, d], and the heads' outputs that it projects, [b, s, heads * width]."""
        path = f"{self.layers_path}.{index}.{self.arch.attention}.{self.arch.projections.output}"
        with record_calls({path: self.model.get_submodule(path)}) as seen:
            output = self.block(index, "attention", hidden, weights)
        return output, seen[path][-1].inputs[0]


def _find_layers(model: nn.Module, name: str) -> tuple[list[nn.Module], str]:
    """The decoder layers, found by their class, and the path of their list."""
    classes = layer_classes(model)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(type(m).__name__ in classes for m in module):
            return list(module), path
    raise ModelError(
        f"no decoder layers ({show(sorted(classes))}) found in {show(name)}; please report the model",
        code="unknown-layers",
    )


def _take_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states among a layer's or a block's arguments, then the other arguments."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def _zeros(*args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros_like(_take_hidden(args, kwargs)[0])


def _no_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _zeros(*args, **kwargs), None


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf."""
    # A sum is finite only if every element is, and needs no mask. Elements are looked at where the sum overflows.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def check_finite(features: Tensor, where: str) -> Tensor:
    """The features (or gradients) as they are given, after a check.

    Args:
        features: of any shape.
        where: the submodule or layer that they come from, for the message.

    Raises:
        RunError: they hold NaN or Inf.
    """
    if not all_finite(features):
        raise RunError(
            f"the features behind {show(where)} hold NaN or Inf in {str(features.dtype).removeprefix('torch.')}: "
            "use `compute_dtype: float32`, or check the models",
            code="not-finite",
        )
    return features
