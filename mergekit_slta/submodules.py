"""Which tensors make up which submodule: the architectures, and the granularities over them.

Scope: names only; no tensor is read here. Tensor names are those of mergekit's plan.

Where the paper is silent: norms belong to the block that they feed (or, for post-norms, follow); `embed` is everything
before the first decoder layer and `head` everything after the last. With tied embeddings the plan has no tensor for
the output projection: the shared table belongs to `embed` and is solved for both objectives, the final norm to `head`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mergekit_slta.errors import ModelError, listing, show

Block = Literal["attention", "mlp"]
Kind = Literal["embed", "layer", "attention", "mlp", "head"]


@dataclass(frozen=True)
class Architecture:
    """What has to be known of a model class to take it apart; everything else its own forward tells.

    Attributes:
        attention, mlp: names of a decoder layer's two branches.
        norms: the layer's own norms -> the block that each belongs to.
        final_norm: the norm before the output projection, under the base model.
    """

    attention: str = "self_attn"
    mlp: str = "mlp"
    norms: tuple[tuple[str, Block], ...] = (("input_layernorm", "attention"), ("post_attention_layernorm", "mlp"))
    final_norm: str = "norm"

    def branch(self, block: Block) -> str:
        """The name of a block's branch in the layer."""
        return self.attention if block == "attention" else self.mlp


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(),
    "MistralForCausalLM": Architecture(),
    "Qwen2ForCausalLM": Architecture(),
    "Qwen3ForCausalLM": Architecture(),
}


@dataclass(frozen=True)
class Submodule:
    """A part of the model that gets weights of its own.

    Attributes:
        name: the module's path in the plan's terms, or `embed` or `head`.
        kind: what it is.
        layer: the decoder layer's number; None outside of the layers.
        tensors: plan names of the tensors that its alpha merges; empty where another submodule owns them all.
    """

    name: str
    kind: Kind
    layer: int | None
    tensors: tuple[str, ...]


def architecture(class_names: Sequence[str] | None, model: str) -> Architecture:
    """The entry for a config's `architectures`.

    Raises:
        ModelError: the class is not supported; the message lists those that are.
    """
    name = class_names[0] if class_names else "none"
    if name not in ARCHITECTURES:
        raise ModelError(
            f"architecture {show(name)} of {show(model)} is not supported; supported are {listing(ARCHITECTURES, 40)}"
        )
    return ARCHITECTURES[name]


def split(
    tensors: Iterable[str], arch: Architecture, granularity: str, layers_path: str, num_layers: int, head_weight: str
) -> list[Submodule]:
    """Divide a model's tensors among submodules, in the order in which a forward pass meets these.

    Args:
        tensors: names of all tensors of mergekit's plan.
        arch: the model's architecture.
        granularity: "layer" or "attn_mlp".
        layers_path: path of the list of decoder layers, as in `model.layers`.
        num_layers: how many there are.
        head_weight: name of the output projection's weight.

    Raises:
        ModelError: a tensor belongs to no submodule by the rules above.
    """
    groups: dict[str, Submodule] = {"embed": Submodule("embed", "embed", None, ())}
    for layer in range(num_layers):
        path = f"{layers_path}.{layer}"
        if granularity == "layer":
            groups[path] = Submodule(path, "layer", layer, ())
        else:
            for block in ("attention", "mlp"):
                name = f"{path}.{arch.branch(block)}"
                groups[name] = Submodule(name, block, layer, ())
    groups["head"] = Submodule("head", "head", None, ())

    members: dict[str, list[str]] = {name: [] for name in groups}
    final_norm = f"{layers_path.rpartition('.')[0]}.{arch.final_norm}."
    for tensor in tensors:
        members[_owner(tensor, arch, granularity, layers_path, final_norm, head_weight, groups)].append(tensor)
    return [Submodule(group.name, group.kind, group.layer, tuple(members[name])) for name, group in groups.items()]


def _owner(
    tensor: str,
    arch: Architecture,
    granularity: str,
    layers_path: str,
    final_norm: str,
    head_weight: str,
    groups: dict[str, Submodule],
) -> str:
    if not tensor.startswith(layers_path + "."):
        head_prefix = head_weight.removesuffix("weight")
        return "head" if tensor.startswith((final_norm, head_prefix)) else "embed"
    index, _, local = tensor[len(layers_path) + 1 :].partition(".")
    path = f"{layers_path}.{index}"
    owner = path if granularity == "layer" else f"{path}.{_block_branch(local, arch)}"
    if owner not in groups:
        raise ModelError(f"tensor {show(tensor)} belongs to no submodule that is known here; please report the model")
    return owner


def _block_branch(local: str, arch: Architecture) -> str | None:
    """The branch that owns a layer's tensor `local` (a name within the layer); None if no rule covers it."""
    module = local.partition(".")[0]
    if module in (arch.attention, arch.mlp):
        return module
    block = dict(arch.norms).get(module)
    return arch.branch(block) if block else None
