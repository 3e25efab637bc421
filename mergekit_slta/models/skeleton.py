"""The model's code without its weights: runs parts of a transformers model with given tensors.

Scope: the only file that calls a model's forward. Parameters are on the meta device and buffers are real, so the
skeleton of a 70B model takes almost no memory. A block is computed with the layer's own forward: the modules of the
layer's other block return zeros, which leaves the block with its residual connection and norms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PretrainedConfig

from mergekit_slta.errors import ModelError, RunError, listing, show
from mergekit_slta.libraries.torch import NoMeta, attention_kernel, replaced_forwards
from mergekit_slta.libraries.transformers import make_model
from mergekit_slta.maths.task_arithmetic import all_finite
from mergekit_slta.models.anatomy import Block, LayerAnatomy, unknown_blocks, without
from mergekit_slta.models.hooks import ModuleCall, cast_linear_maps, record_calls
from mergekit_slta.models.running import (
    BaseOutput,
    LayerCall,
    Stop,
    call_model,
    chained,
    enter_layers,
    learned_positions,
    take_hidden,
)
from mergekit_slta.models.structure import cannot_run, find_structure


class Skeleton:
    """A causal language model with its parameters on the meta device. Tensor names are those of transformers.

    A model may have more than a language model (a vision tower): the skeleton's tensors are those that text runs
    through.

    Args:
        config: the base model's config. Weight tying is ignored: the output projection always is a separate tensor
            here.
        name: the base model's name, for messages.
        dtype: precision of the forward passes and of buffers. The model is built in this dtype, because a later cast
            would round values that the model computes when it is built (Gemma's embedding scale).
        device: device of buffers and inputs.
        trust_remote_code: as in transformers.
        products: dtype of the matrix products inside the layers, with weights from `for_products`; None means `dtype`.
            Routers are left out, since rounding sends tokens to other experts.

    Attributes:
        model: the transformers model.
        config: the config of the language model.
        layers, layers_path, num_layers: the decoder layers, the path of their list, and their number.
        vocabulary_key: key of the size of the vocabulary in the config of the whole model.
        width: d, the size of the hidden states.
        ties: whether the model class ties the output projection to the embeddings, by the config.
        shapes: name -> shape of every tensor that text runs through: parameters, and buffers that are saved.
        unused: names of all other tensors of the model.
        head_weight, embedding_weight: names of the output projection's and of the embedding's weight.
        max_positions: number of positions, if the model has learned an embedding for each; None if it has not.
        anatomy: names and structure, for `partition`.
        routers: see `Structure`.
        products: as given.
        calls: (b, s) -> the layers' masks and positions, from `embed`.

    Raises:
        ModelError: transformers makes no model of the config, it is no decoder-only language model, or its layers are
            not found or cannot be run one by one.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        name: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
        products: torch.dtype | None = None,
    ) -> None:
        try:
            with init_empty_weights(include_buffers=False):
                self.model = make_model(type(config).from_dict(config.to_dict()), dtype, trust_remote_code)
        except Exception as error:  # assertions, missing keys and the like: configs are not validated before
            raise ModelError(
                f"transformers makes no model from the config of {show(name)} ({type(error).__name__}: "
                f"{show(error)}): correct its config.json",
                code="unreadable-config",
            ) from error
        whole = self.model.config
        self.config = whole.get_text_config()
        inner = [key for key, value in vars(whole).items() if value is self.config]
        self.vocabulary_key = ".".join([*inner[:1], "vocab_size"])
        self.dtype = dtype
        heads = getattr(self.config, "num_attention_heads", None) or 1
        self._num_heads = heads if isinstance(heads, int) else max(heads)
        try:
            embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        except NotImplementedError:
            embedding = head = None
        if embedding is None or head is None or getattr(self.config, "is_encoder_decoder", False):
            raise cannot_run(self.model, name, "it has no output projection over a vocabulary, or an encoder")
        self.ties = head.weight is embedding.weight
        head.weight = nn.Parameter(torch.empty_like(head.weight), requires_grad=False)
        if not _can_group_experts(self.model, dtype):
            self.model.set_experts_implementation("eager")
        self.model.eval()
        self.model.requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, nn.Embedding):
                # The table that `embed` gets holds only the rows that occur, so a padding row has another number there;
                # and torch gives it no gradient, though a calibration row may hold the padding token.
                module.padding_idx = None
        found = find_structure(self.model, self.config, dtype, name)
        self.layers, self.width, self.anatomy = found.layers, found.width, found.anatomy
        self.layers_path, self.num_layers = found.anatomy.layers_path, len(found.layers)
        self._structure, self.routers = found, found.routers
        names = {id(parameter): key for key, parameter in self.model.named_parameters()}
        self.head_weight, self.embedding_weight = found.anatomy.head_weight, names[id(embedding.weight)]
        state = self.model.state_dict()
        self.shapes = {key: tuple(state[key].shape) for key in found.used}
        self.unused = tuple(key for key in state if key not in self.shapes)
        self.max_positions = learned_positions(self.model, self.config)
        self.calls: dict[tuple[int, int], list[LayerCall]] = {}
        self.device = torch.device(device)
        for module in self.model.modules():
            for key, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, key, buffer.to(self.device))
        self.products, self._linear_maps = products, frozenset[str]()
        if products is not None:
            routers = {part for router, _ in self.routers.values() for part in router.modules()}
            called = {path: self.model.get_submodule(path) for path in self.anatomy.modules}
            maps = {path: part for path, part in called.items() if type(part) is nn.Linear and part not in routers}
            self._linear_maps = cast_linear_maps(maps, dtype)

    def for_products(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cast the linear maps' weights to the dtype in which the layers' products are computed, if there is one."""
        return {
            name: tensor.to(self.products) if name in self._linear_maps else tensor for name, tensor in weights.items()
        }

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
        found = self._structure
        hidden, calls = enter_layers(self.model, found.layers, found.returned, ids, weights)
        self.calls[ids.shape[0], ids.shape[1]] = calls
        return hidden

    def layer(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Run a decoder layer, [b, s, d] -> [b, s, d]; `embed` must have run before with the same (b, s)."""
        call = self.calls[(hidden.shape[0], hidden.shape[1])][index]
        return self._run_layer(index, hidden, weights, call)

    def layer_anatomy(self, index: int) -> LayerAnatomy:
        """What a layer is made of.

        Raises:
            ModelError: its code does not show it.
        """
        found = self.anatomy.layers[index]
        if found is None:
            raise unknown_blocks(f"{self.layers_path}.{index}")
        return found

    def block(self, index: int, block: Block, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Run a layer without its other block: `x + attention(norm(x))` or `x + mlp(norm(x))`, [b, s, d].

        Args:
            index: the decoder layer.
            block: the block to run.
            hidden: [b, s, d] input. For the attention block, `embed` must have run before with the same (b, s); the MLP
                block takes any shape.
            weights: the block's tensors, and those of a norm that feeds both blocks.
        """
        layer = self.layer_anatomy(index)
        if block == "mlp":
            if not layer.mixers:
                return self._any_call(index, hidden, weights)
            with without(self.layers[index], layer, "attention"):
                return self._any_call(index, hidden, weights)
        if not layer.mlps:
            return self.layer(index, hidden, weights)
        if layer.parallel:
            with without(self.layers[index], layer, "mlp"):
                return self.layer(index, hidden, weights)
        seen: list[Tensor] = []

        def enter(*args: Any, **kwargs: Any) -> None:
            seen.append(take_hidden(args, kwargs)[0])
            raise Stop

        with replaced_forwards({self.layers[index].get_submodule(layer.entry): enter}), suppress(Stop):
            self.layer(index, hidden, weights)
        return seen[0].reshape(hidden.shape)

    def _any_call(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Run a layer with the arguments of rows of any shape: only attention reads positions and masks."""
        return self._run_layer(index, hidden, weights, next(iter(self.calls.values()))[index])

    def check_blocks(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Compute a layer from its blocks, and compare the result with the layer's own output.

        Args:
            index: the decoder layer.
            hidden: [b, s, d] the layer's input.
            weights: the layer's tensors.

        Raises:
            ModelError: the blocks do not give the layer's output.
        """
        layer = self.layer_anatomy(index)
        if not layer.mixers or not layer.mlps:
            return
        whole = self.layer(index, hidden, weights)

        def block(kind: Block, given: Tensor) -> Tensor:
            start = len(f"{self.layers_path}.{index}.")
            own = {name: tensor for name, tensor in weights.items() if layer.is_read_by(name[start:], kind)}
            return self.block(index, kind, given, own)

        try:
            with NoMeta():
                attended = block("attention", hidden)
                before = hidden if layer.parallel else attended
                composed = attended + (block("mlp", before) - before)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # a block returns something else
            raise unknown_blocks(f"{self.layers_path}.{index}") from error
        tolerance = 1e-3 * (whole - hidden).norm() + 64 * torch.finfo(whole.dtype).eps * whole.norm()
        if (whole - composed).norm() > tolerance:
            raise unknown_blocks(f"{self.layers_path}.{index}")

    def layer_with_routes(
        self, index: int, hidden: Tensor, weights: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Run a decoder layer; returns its output, and the experts of every token in order, [tokens, k] int64.

        None if the layer has no experts.
        """
        if index not in self.routers:
            return self.layer(index, hidden, weights), None
        router, count = self.routers[index]
        seen: list[Any] = []
        handle = router.register_forward_hook(lambda _, __, output: seen.append(output))
        try:
            output = self.layer(index, hidden, weights)
        finally:
            handle.remove()
        found = seen[-1] if isinstance(seen[-1], tuple) else (seen[-1],)
        chosen = [each for each in found if isinstance(each, Tensor) and not each.is_floating_point()]
        experts = chosen[0] if chosen else found[0].flatten(0, -2).topk(count).indices
        return output, experts.flatten(0, -2).sort(-1).values

    def _run_layer(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor], call: LayerCall) -> Tensor:
        prefix = f"{self.layers_path}.{index}."
        local = {key.removeprefix(prefix): tensor for key, tensor in weights.items()}
        with attention_kernel(hidden, self._num_heads):
            output = functional_call(self.layers[index], local, (hidden, *call.args), call.kwargs)
        return output[0] if isinstance(output, (tuple, list)) else output

    def head(self, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Run everything after the last layer: hidden states [1, n, d] -> logits [1, n, v].

        `weights` may hold only some rows of the output projection and of its bias; v is the number of these rows.
        """

        def after_layers(*_: Any, **__: Any) -> BaseOutput:
            return BaseOutput(chained(self._structure.after, hidden))

        with replaced_forwards({self._structure.around: after_layers}):
            return call_model(self.model, weights, inputs_embeds=hidden).logits

    def module(self, path: str, call: ModuleCall, weights: Mapping[str, Tensor]) -> Tensor:
        """Run one module on recorded inputs; returns its first output if it has several (a router's logits)."""
        local = {key.removeprefix(path + "."): tensor for key, tensor in weights.items() if key.startswith(path + ".")}
        output = functional_call(self.model.get_submodule(path), local, call.inputs, call.named)
        return output[0] if isinstance(output, tuple) else output

    def layer_with_inputs(
        self, index: int, hidden: Tensor, weights: Mapping[str, Tensor], modules: Sequence[str]
    ) -> tuple[Tensor, dict[str, ModuleCall]]:
        """Run a decoder layer; returns its output [b, s, d], and name -> last call of the named modules.

        Raises:
            ModelError: a module is not called.
        """
        with record_calls({path: self.model.get_submodule(path) for path in modules}) as seen:
            output = self.layer(index, hidden, weights)
        idle = [path for path, calls in seen.items() if not calls]
        if idle:
            raise ModelError(
                f"{listing(idle, 3)} of {show(f'{self.layers_path}.{index}')} is used without being called: "
                "use `granularity: attn_mlp`, and please report the model",
                code="unknown-blocks",
            )
        return output, {path: calls[-1] for path, calls in seen.items()}

    def attention_with_heads(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Run the attention block; returns its output [b, s, d] and the input of its output projection
        [b, s, heads * width]."""
        heads = self.anatomy.heads[index]
        assert heads is not None
        with record_calls({"output": self.model.get_submodule(heads.output)}) as seen:
            output = self.block(index, "attention", hidden, weights)
        return output, seen["output"][-1].inputs[0]


def _can_group_experts(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `grouped_mm`, which transformers uses for MoE experts unless told otherwise, has a kernel for a model.

    It has none for float64, nor for matrices whose rows are no multiple of 16 bytes.
    """
    experts = [parameter.shape[1:] for parameter in model.parameters() if parameter.dim() == 3]
    aligned = all(size * dtype.itemsize % 16 == 0 for shape in experts for size in shape)
    return not experts or (dtype != torch.float64 and aligned)


def check_finite(features: Tensor, where: str, model: str | None = None) -> Tensor:
    """Check features or gradients for NaN and Inf, and return them.

    Args:
        features: any shape.
        where: their submodule or layer, for the message.
        model: name of the model, for the message.

    Raises:
        RunError: they hold NaN or Inf.
    """
    if not all_finite(features):
        raise RunError(
            f"the features {f'of {show(model)} ' if model else ''}behind {show(where)} hold NaN or Inf in "
            f"{str(features.dtype).removeprefix('torch.')}: use `compute_dtype: float32`, or check the models",
            code="not-finite",
        )
    return features
