"""Which tensors make up which submodule, at every granularity.

Scope: names and slices only; no tensor is read here. Tensor names are those of mergekit's plan.

Where the paper is silent: `embed` is everything before the first decoder layer and `head` everything after the last.
With tied embeddings the plan has no tensor for the output projection: the shared table belongs to `embed` and is
solved for both objectives, the final norm to `head`. Under `head_mlp` a head is a key/value group with its queries;
what cannot be divided by heads (norms, the output's bias, q/k norms) takes the attention block's weight. Under
`linear` what is no matrix, norm or bias of a module's own (fused MoE experts) takes the MLP block's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from mergekit_slta.errors import ModelError, show
from mergekit_slta.models.architectures import Architecture, HeadLayout, head_layout

Kind = Literal["model", "embed", "layer", "attention", "attention_head", "mlp", "norm", "linear", "head"]


class Slice(NamedTuple):
    """Part of a tensor: [start, stop) along an axis."""

    tensor: str
    axis: int
    start: int
    stop: int


@dataclass(frozen=True)
class Submodule:
    """A part of the model that gets weights of its own.

    Attributes:
        name: the module's path in the plan's terms; `embed`, `head`, or `model`; heads are numbered under their
            attention block.
        kind: what it is.
        layer: the decoder layer's number; None outside of the layers.
        tensors: plan names of the tensors that its alpha merges; empty where another submodule owns them all.
        slices: for tensors of which it owns a part only, which.
        forward_group: submodules of the same group are evaluated by the same forward pass.
    """

    name: str
    kind: Kind
    layer: int | None
    tensors: tuple[str, ...]
    slices: tuple[Slice, ...] = ()
    forward_group: str = ""


@dataclass(frozen=True)
class Anatomy:
    """A model's structure in the plan's terms.

    Attributes:
        arch, config: the model class's entry, and the base's config.
        layers_path: path of the list of decoder layers, as in `model.layers`.
        num_layers: how many there are.
        head_weight: name of the output projection's weight; the plan lacks it where embeddings are tied.
        modules: paths of modules whose own parameters are called `weight` or `bias`.
    """

    arch: Architecture
    config: Any
    layers_path: str
    num_layers: int
    head_weight: str
    modules: frozenset[str]

    @property
    def final_norm(self) -> str:
        """Path of the norm before the output projection."""
        parent = self.layers_path.rpartition(".")[0]
        return f"{parent}.{self.arch.final_norm}" if parent else self.arch.final_norm


def partition(tensors: Iterable[str], anatomy: Anatomy, granularity: str, *, tied: bool = False) -> list[Submodule]:
    """Divide a model's tensors among submodules, in the order in which a forward pass meets these.

    Args:
        tensors: names of all tensors of mergekit's plan.
        anatomy: the model's structure.
        granularity: "model", "layer", "attn_mlp", "head_mlp" or "linear".
        tied: the output projection is the embedding table; a copy of it among the tensors gets the table's weight.

    Raises:
        ModelError: a tensor belongs to no submodule by the rules above.
    """
    names = list(tensors)
    if granularity == "model":
        return [Submodule("model", "model", None, tuple(names), forward_group="model")]
    before, after = [], []
    layers: list[list[str]] = [[] for _ in range(anatomy.num_layers)]
    head_prefix = anatomy.head_weight.removesuffix("weight")
    for name in names:
        if name.startswith(anatomy.layers_path + "."):
            index = name[len(anatomy.layers_path) + 1 :].partition(".")[0]
            if not index.isdecimal() or int(index) >= anatomy.num_layers:
                raise _homeless(name)
            layers[int(index)].append(name)
        else:
            behind = name.startswith((anatomy.final_norm + ".", head_prefix))
            (after if behind and not (tied and name == anatomy.head_weight) else before).append(name)
    result = [Submodule("embed", "embed", None, tuple(before), forward_group="embed")]
    divide = {"layer": _whole_layer, "attn_mlp": _blocks, "head_mlp": _heads, "linear": _matrices}[granularity]
    for index, owned in enumerate(layers):
        result += divide(index, owned, anatomy)
    if granularity == "linear":
        norm = tuple(name for name in after if name.startswith(anatomy.final_norm + "."))
        result.append(Submodule(anatomy.final_norm, "norm", None, norm, forward_group=anatomy.final_norm))
        after = [name for name in after if name not in norm]
    return [*result, Submodule("head", "head", None, tuple(after), forward_group="head")]


def _homeless(tensor: str) -> ModelError:
    return ModelError(f"tensor {show(tensor)} belongs to no submodule that is known here; please report the model")


def _path(index: int, anatomy: Anatomy, local: str = "") -> str:
    return f"{anatomy.layers_path}.{index}" + (f".{local}" if local else "")


def _whole_layer(index: int, tensors: Sequence[str], anatomy: Anatomy) -> list[Submodule]:
    path = _path(index, anatomy)
    return [Submodule(path, "layer", index, tuple(tensors), forward_group=path)]


def _blocks(index: int, tensors: Sequence[str], anatomy: Anatomy) -> list[Submodule]:
    """Attention and MLP with their norms; before them, norms that feed both."""
    arch, prefix = anatomy.arch, _path(index, anatomy) + "."
    norms = dict(arch.norms)
    modules = {name[len(prefix) :].partition(".")[0] for name in tensors}
    shared = not any(norms.get(module) == "mlp" for module in modules)
    owned: dict[str, list[str]] = {}
    for name in tensors:
        module = name[len(prefix) :].partition(".")[0]
        if module in (arch.attention, arch.mlp):
            owner = module
        elif module in norms:
            owner = module if shared else arch.branch(norms[module])
        else:
            raise _homeless(name)
        owned.setdefault(owner, []).append(name)
    result = []
    for module, kind in (*((name, "norm") for name in norms), (arch.attention, "attention"), (arch.mlp, "mlp")):
        if module in owned:
            path = prefix + module
            result.append(Submodule(path, kind, index, tuple(owned[module]), forward_group=path))  # type: ignore[arg-type]
    return result


def _heads(index: int, tensors: Sequence[str], anatomy: Anatomy) -> list[Submodule]:
    """As `_blocks`, with the attention block divided by key/value group; what is left of it keeps the block's name."""
    result = []
    for block in _blocks(index, tensors, anatomy):
        if block.kind != "attention":
            result.append(block)
            continue
        layout = head_layout(anatomy.config)
        groups = [head_slices(block.name, block.tensors, anatomy.arch, layout, group) for group in range(layout.groups)]
        divided = {part.tensor for part in groups[0]}
        result.append(replace(block, tensors=tuple(name for name in block.tensors if name not in divided)))
        for group, slices in enumerate(groups):
            name = f"{block.name}.heads.{group}"
            owned = tuple(dict.fromkeys(part.tensor for part in slices))
            result.append(Submodule(name, "attention_head", index, owned, tuple(slices), block.forward_group))
    return result


def head_slices(path: str, tensors: Sequence[str], arch: Architecture, layout: HeadLayout, group: int) -> list[Slice]:
    """The parts of an attention branch's tensors that belong to one key/value group: rows that make its queries, keys
    and values, and columns that read them."""
    present, place = set(tensors), arch.projections
    query, width = layout.queries * layout.width, layout.width
    starts = {"q": (group * query, query), "k": (group * width, width), "v": (group * width, width)}
    if place.packing == "separate":
        rows = [(module, *starts[part]) for module, part in zip(place.inputs, "qkv", strict=True)]
    elif place.packing == "stacked":
        offsets = {"q": 0, "k": layout.groups * query, "v": layout.groups * (query + width)}
        rows = [(place.inputs[0], offsets[part] + start, size) for part, (start, size) in starts.items()]
    else:
        rows = [(place.inputs[0], group * (query + 2 * width), query + 2 * width)]
    slices = []
    for module, start, size in rows:
        slices.append(Slice(f"{path}.{module}.weight", 1 if place.transposed else 0, start, start + size))
        slices.append(Slice(f"{path}.{module}.bias", 0, start, start + size))
    column = 0 if place.transposed else 1
    slices.append(Slice(f"{path}.{place.output}.weight", column, group * query, (group + 1) * query))
    return [part for part in slices if part.tensor in present]


def _matrices(index: int, tensors: Sequence[str], anatomy: Anatomy) -> list[Submodule]:
    """Every module with a weight by itself; what is left of the MLP takes the block's weight."""
    forward_group = _path(index, anatomy)
    owned: dict[str, list[str]] = {}
    mlp = _path(index, anatomy, anatomy.arch.mlp)
    for name in tensors:
        module, _, parameter = name.rpartition(".")
        if module in anatomy.modules and parameter in ("weight", "bias"):
            owned.setdefault(module, []).append(name)
        elif name.startswith(mlp + "."):
            owned.setdefault(mlp, []).append(name)
        else:
            raise _homeless(name)
    kinds = {mlp: "mlp"}
    for module in owned:
        kinds.setdefault(module, "norm" if "norm" in module.rpartition(".")[2] or _is_norm(module) else "linear")
    return [
        Submodule(module, kinds[module], index, tuple(names), forward_group=forward_group)  # type: ignore[arg-type]
        for module, names in owned.items()
    ]


def _is_norm(module: str) -> bool:
    """GPT-2's `ln_1`, Falcon's `ln_attn`, StableLM's `norms.0`."""
    last, before = module.rpartition(".")[2], module.split(".")[-2]
    return last.startswith("ln_") or before == "norms"
