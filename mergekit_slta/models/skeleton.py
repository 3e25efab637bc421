"""The model's code without its weights: runs parts of a transformers model with given tensors.

Scope: the only file that calls a model's forward. Parameters are on the meta device and buffers are real, so the
skeleton of a 70B model takes almost no memory. A block is computed with the layer's own forward, for any architecture:
the layer's other block is replaced by zeros, which leaves the block with its residual connection and norms.
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
from mergekit_slta.maths.task_arithmetic import all_finite
from mergekit_slta.models.architectures import Architecture, Block, architecture
from mergekit_slta.models.hooks import record_calls
from mergekit_slta.models.submodules import Anatomy


class _Stop(Exception):  # noqa: N818 - control flow, never seen outside this file
    """Ends a model's forward once every decoder layer has been called."""


@dataclass(frozen=True)
class _LayerCall:
    """The arguments of a decoder layer besides the hidden states: masks, position embeddings."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _BaseOutput:
    """Stands for a base model's output: the features, and None for everything else (router logits, caches)."""

    def __init__(self, features: Tensor) -> None:
        self.last_hidden_state = features

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


class Skeleton:
    """A causal language model with its parameters on the meta device. Tensor names are those of mergekit's plan.

    Args:
        config: the base model's config. Weight tying is ignored: the output projection always is a separate tensor
            here.
        name: the base model's name, for messages.
        dtype: precision of the forward passes and of buffers. The model is built in this dtype, because a later cast
            would round values that the model computes when it is built (Gemma's embedding scale).
        device: device of buffers and inputs.
        trust_remote_code: as in transformers.

    Attributes:
        arch: the entry of the model class in `ARCHITECTURES`.
        model: the transformers model.
        layers, layers_path, num_layers: the decoder layers, the path of their list, and their number.
        renamed: name in the plan -> name in transformers, for names that differ.
        shapes: name -> shape of every parameter.
        head_weight, embedding_weight: names of the output projection's and of the embedding's weight.
        max_positions: number of positions, if the model has learned an embedding for each; None if it has not.
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
        try:
            with init_empty_weights(include_buffers=False):
                self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        except Exception as error:  # assertions, missing keys and the like: configs are not validated before
            raise ModelError(
                f"transformers makes no model from the config of {show(name)} ({type(error).__name__}: "
                f"{show(error)}): correct its config.json",
                code="unreadable-config",
            ) from error
        if not _can_group_experts(self.model, dtype):
            self.model.set_experts_implementation("eager")
        self.model.eval()
        self.model.requires_grad_(False)
        self.device = torch.device(device)
        for module in self.model.modules():
            if isinstance(module, nn.Embedding):
                # The table that `embed` gets holds only the rows that occur, so a padding row has another number there;
                # and torch gives it no gradient, though a calibration row may hold the padding token.
                module.padding_idx = None
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
        self.max_positions = learned_positions(self.model, config)
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
        self._layers_return_tuples = False  # set by `embed`

    def embed(self, ids: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Run everything before the first layer.

        Args:
            ids: [b, s] int64 indices of rows of the embedding table in `weights`, which may hold only the rows that
                occur.
            weights: the tensors before the first layer.

        Returns:
            [b, s, d] input of the first layer. No attention mask is needed: rows are padded on the right, and attention
            is causal.
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
                raise _Stop  # the model took [0] of a tensor, so it expects layers that return tuples
            inputs.append(hidden)
            calls.append(_LayerCall(rest, named))
            if len(calls) == self.num_layers:
                raise _Stop
            return (hidden,) if self._layers_return_tuples else hidden

        with replaced_forwards(dict.fromkeys(self.layers, recorder)), suppress(_Stop):
            self._call_model(weights, input_ids=ids)
        return inputs[0], calls

    def layer(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Run a decoder layer, [b, s, d] -> [b, s, d]; `embed` must have run before with the same (b, s)."""
        call = self._calls[(hidden.shape[0], hidden.shape[1])][index]
        return self._run_layer(index, hidden, weights, call)

    def block(self, index: int, block: Block, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Run a layer without its other block: `x + attention(norm(x))` or `x + mlp(norm(x))`, [b, s, d].

        Args:
            index: the decoder layer.
            block: the block to run.
            hidden: [b, s, d] input. For the attention block, `embed` must have run before with the same (b, s); the MLP
                block takes any shape.
            weights: the block's tensors, and the norms of the other block, which run but have no effect.
        """
        layer = self.layers[index]
        if block == "attention":
            with replaced_forwards({layer.get_submodule(self.arch.mlp): _zeros}):
                return self.layer(index, hidden, weights)
        call = next(iter(self._calls.values()))[index]  # any shape will do: only attention reads positions and masks
        with replaced_forwards({layer.get_submodule(self.arch.attention): _no_attention}):
            return self._run_layer(index, hidden, weights, call)

    def has_parallel_blocks(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> bool:
        """Whether attention and MLP of a layer run in parallel: the MLP reads the layer's input, not attention's
        output.

        Computes the layer from its blocks in both ways, and compares the results with the layer's own output.

        Args:
            index: the decoder layer.
            hidden: [b, s, d] the layer's input.
            weights: the layer's tensors.

        Raises:
            ModelError: neither way gives the layer's output.
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
        """Run everything after the last layer: hidden states [1, n, d] -> logits [1, n, v].

        `weights` may hold only some rows of the output projection and of its bias; v is the number of these rows.
        """
        norm = self._base_model.get_submodule(self.arch.final_norm)

        def after_layers(*_: Any, **__: Any) -> _BaseOutput:
            return _BaseOutput(norm(hidden))

        with replaced_forwards({self._base_model: after_layers}):
            return self._call_model(weights, inputs_embeds=hidden).logits

    def _call_model(self, weights: Mapping[str, Tensor], **inputs: Tensor) -> Any:
        named = {self.renamed.get(key, key): tensor for key, tensor in weights.items()}
        # The skeleton has no tied parameters, and this call must not tie any.
        return functional_call(self.model, named, (), {**inputs, "use_cache": False}, tie_weights=False)

    def module(self, path: str, inputs: tuple[Any, ...], weights: Mapping[str, Tensor]) -> Tensor:
        """Run one module on given inputs; returns its first output if it has several (a router's logits)."""
        local = {key.removeprefix(path + "."): tensor for key, tensor in weights.items() if key.startswith(path + ".")}
        output = functional_call(self.model.get_submodule(path), local, inputs)
        return output[0] if isinstance(output, tuple) else output

    def layer_with_inputs(
        self, index: int, hidden: Tensor, weights: Mapping[str, Tensor], modules: Sequence[str]
    ) -> tuple[Tensor, dict[str, tuple[Any, ...]]]:
        """Run a decoder layer; returns its output [b, s, d], and name -> positional inputs of the named modules."""
        with record_calls({path: self.model.get_submodule(path) for path in modules}) as seen:
            output = self.layer(index, hidden, weights)
        return output, {path: calls[-1].inputs for path, calls in seen.items() if calls}

    def attention_with_heads(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Run the attention block; returns its output [b, s, d] and the input of its output projection
        [b, s, heads * width]."""
        path = f"{self.layers_path}.{index}.{self.arch.attention}.{self.arch.projections.output}"
        with record_calls({path: self.model.get_submodule(path)}) as seen:
            output = self.block(index, "attention", hidden, weights)
        return output, seen[path][-1].inputs[0]


def _can_group_experts(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `grouped_mm`, which transformers uses for MoE experts unless told otherwise, has a kernel for a model.

    It has none for float64, nor for matrices whose rows are no multiple of 16 bytes.
    """
    experts = [parameter.shape[1:] for parameter in model.parameters() if parameter.dim() == 3]
    aligned = all(size * dtype.itemsize % 16 == 0 for shape in experts for size in shape)
    return not experts or (dtype != torch.float64 and aligned)


def _find_layers(model: nn.Module, name: str) -> tuple[list[nn.Module], str]:
    """Find the decoder layers by their class; returns them and the path of their list."""
    classes = layer_classes(model)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(type(m).__name__ in classes for m in module):
            return list(module), path
    raise ModelError(
        f"no decoder layers ({show(sorted(classes))}) found in {show(name)}; please report the model",
        code="unknown-layers",
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


def _take_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Split the arguments of a layer or block into the hidden states and the rest."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def _zeros(*args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros_like(_take_hidden(args, kwargs)[0])


def _no_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _zeros(*args, **kwargs), None


def check_finite(features: Tensor, where: str) -> Tensor:
    """Check features or gradients for NaN and Inf, and return them.

    Args:
        features: any shape.
        where: their submodule or layer, for the message.

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
