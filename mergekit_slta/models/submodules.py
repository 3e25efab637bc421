"""Divide a model's tensors into submodules, for every granularity.

Scope: names and slices only; no tensor is read. Tensor names are those of mergekit's plan.

Rules where the paper is silent:
- `embed` is everything before the first decoder layer, `head` everything after the last.
- With tied embeddings the plan has no tensor for the output projection. The shared table belongs to `embed`, and its
  alpha is solved for both objectives, `embed` and `head`. The final norm belongs to `head`.
- With `head_mlp` a head is a key/value group with its queries. Tensors that cannot be divided by head (norms, the bias
  of the output projection, q/k norms) get the attention block's alpha.
- With `linear`, tensors that are not of one matrix or norm (MoE experts, convolutions, a state space's decay rates) get
  the alpha of their block. A router is a matrix of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from mergekit_slta.errors import ModelError, show
from mergekit_slta.models.anatomy import Block, LayerAnatomy, unknown_blocks
from mergekit_slta.models.architectures import Heads

Kind = Literal["model", "embed", "layer", "attention", "attention_head", "mlp", "norm", "linear", "head"]


class Slice(NamedTuple):
    """Part of a tensor: [start, stop) along an axis."""

    tensor: str
    axis: int
    start: int
    stop: int


@dataclass(frozen=True)
class Submodule:
    """A part of the model that has its own alpha for each expert.

    Attributes:
        name: the module's path, as in the plan, or `embed`, `head`, `model`. Attention head n has the path
            `BLOCK.heads.n`.
        kind: type of the submodule.
        layer: number of the decoder layer; None outside the layers.
        tensors: plan names of the tensors that it owns, completely or in part; empty if other submodules own them all.
        slices: the parts that it owns of tensors that it shares with other submodules.
        forward_group: name of its group. Submodules of one group are in memory and evaluated together.
    """

    name: str
    kind: Kind
    layer: int | None
    tensors: tuple[str, ...]
    slices: tuple[Slice, ...] = ()
    forward_group: str = ""


@dataclass(frozen=True)
class Anatomy:
    """A model's structure.

    Attributes:
        layers_path: path of the list of decoder layers (`model.layers`).
        layers: what each decoder layer is made of; None if its code does not show it.
        head_weight: name of the output projection's weight; not among the tensors if embeddings are tied.
        after: paths of the modules after the layers, in the order of a forward pass: the final norm, then whatever is
            between it and the output projection.
        modules: path -> kind of the modules in layers that can be evaluated by themselves: of matrices and norms.
        heads: per layer, the heads of its attention; None if it cannot be divided.
    """

    layers_path: str
    layers: tuple[LayerAnatomy | None, ...]
    head_weight: str
    after: tuple[str, ...]
    modules: Mapping[str, Literal["linear", "norm"]]
    heads: tuple[Heads | None, ...]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def final_norm(self) -> str:
        """Path of the norm before the output projection."""
        return self.after[0] if self.after else ""

    @property
    def head_prefixes(self) -> tuple[str, ...]:
        """Beginnings of the names of all tensors after the layers."""
        return (*(f"{path}." for path in self.after), self.head_weight.removesuffix("weight"))

    def block_path(self, layer: int, block: Block) -> str:
        """Name of a layer's attention or MLP block: its module's path; of several modules, joined by `+`."""
        found = self.layers[layer]
        names = () if found is None else found.mixers if block == "attention" else found.mlps
        return f"{self.layers_path}.{layer}." + "+".join(names)


def partition(tensors: Iterable[str], anatomy: Anatomy, granularity: str, *, tied: bool = False) -> list[Submodule]:
    """Divide a model's tensors among submodules; returns these in the order of a forward pass.

    Args:
        tensors: names of all tensors of mergekit's plan.
        anatomy: the model's structure.
        granularity: "model", "layer", "attn_mlp", "head_mlp" or "linear".
        tied: whether the output projection is the embedding table. A copy of the table in `tensors` then goes to
            `embed`.

    Raises:
        ModelError: a tensor belongs to no submodule.
    """
    names = list(tensors)
    if granularity == "model":
        return [Submodule("model", "model", None, tuple(names), forward_group="model")]
    before, after = [], []
    layers: list[list[str]] = [[] for _ in range(anatomy.num_layers)]
    for name in names:
        if name.startswith(anatomy.layers_path + "."):
            index = name[len(anatomy.layers_path) + 1 :].partition(".")[0]
            if not index.isdecimal() or int(index) >= anatomy.num_layers:
                raise _unknown_tensor(name)
            layers[int(index)].append(name)
        else:
            in_head = name.startswith(anatomy.head_prefixes)
            (after if in_head and not (tied and name == anatomy.head_weight) else before).append(name)
    result = [Submodule("embed", "embed", None, tuple(before), forward_group="embed")]
    divide = {"layer": _whole_layer, "attn_mlp": _blocks, "head_mlp": _heads, "linear": _matrices}[granularity]
    for index, owned in enumerate(layers):
        result += divide(index, owned, anatomy)
    norm = tuple(name for name in after if name.startswith(anatomy.final_norm + "."))
    if granularity == "linear" and norm:
        result.append(Submodule(anatomy.final_norm, "norm", None, norm, forward_group=anatomy.final_norm))
        after = [name for name in after if name not in norm]
    return [*result, Submodule("head", "head", None, tuple(after), forward_group="head")]


def _unknown_tensor(tensor: str) -> ModelError:
    return ModelError(
        f"tensor {show(tensor)} belongs to no submodule that is known here; please report the model",
        code="unknown-tensor",
    )


def _path(index: int, anatomy: Anatomy, local: str = "") -> str:
    return f"{anatomy.layers_path}.{index}" + (f".{local}" if local else "")


def _whole_layer(index: int, tensors: Sequence[str], anatomy: Anatomy) -> list[Submodule]:
    path = _path(index, anatomy)
    return [Submodule(path, "layer", index, tuple(tensors), forward_group=path)]


def _layer(index: int, anatomy: Anatomy) -> LayerAnatomy:
    found = anatomy.layers[index]
    if found is None:
        raise unknown_blocks(_path(index, anatomy))
    return found


def _blocks(index: int, tensors: Sequence[str], anatomy: Anatomy) -> list[Submodule]:
    """Attention and MLP with their norms. A norm that feeds both blocks is a submodule of its own, and comes first."""
    layer, prefix = _layer(index, anatomy), _path(index, anatomy) + "."
    owned: dict[str, list[str]] = {}
    kinds: dict[str, Kind] = {}
    for name in tensors:
        block = layer.block_of(name[len(prefix) :])
        path = anatomy.block_path(index, block) if block else name.rpartition(".")[0]
        owned.setdefault(path, []).append(name)
        kinds[path] = block or "norm"
    order = sorted(owned, key=lambda path: ("norm", "attention", "mlp").index(kinds[path]))
    return [Submodule(path, kinds[path], index, tuple(owned[path]), forward_group=path) for path in order]


def _heads(index: int, tensors: Sequence[str], anatomy: Anatomy) -> list[Submodule]:
    """As `_blocks`, with the attention block divided by key/value group, if its heads were found.

    Tensors that cannot be divided stay in a submodule with the block's name.
    """
    result = []
    heads = anatomy.heads[index]
    for block in _blocks(index, tensors, anatomy):
        if block.kind != "attention" or heads is None:
            result.append(block)
            continue
        groups = [head_slices(heads, block.tensors, group) for group in range(heads.groups)]
        divided = {part.tensor for part in groups[0]}
        result.append(replace(block, tensors=tuple(name for name in block.tensors if name not in divided)))
        for group, slices in enumerate(groups):
            name = f"{block.name}.heads.{group}"
            owned = tuple(dict.fromkeys(part.tensor for part in slices))
            result.append(Submodule(name, "attention_head", index, owned, tuple(slices), block.forward_group))
    return result


def head_slices(heads: Heads, tensors: Collection[str], group: int) -> list[Slice]:
    """The slices of an attention block's tensors that belong to one key/value group.

    These are the rows of the input projections for its queries, keys and values, and the columns of the output
    projection for its heads. Rows and columns are swapped if weights are stored as [in, out].

    Args:
        heads: the block's heads.
        tensors: names of its tensors; a tensor that is not among them (a bias) gets no slice.
        group: number of the key/value group, from 0.
    """
    query, width = heads.queries * heads.width, heads.width
    starts = {"q": (group * query, query), "k": (group * width, width), "v": (group * width, width)}
    if heads.packing == "separate":
        rows = [(module, *starts[part]) for module, part in zip(heads.inputs, "qkv", strict=True)]
    elif heads.packing == "stacked":
        offsets = {"q": 0, "k": heads.groups * query, "v": heads.groups * (query + width)}
        rows = [(heads.inputs[0], offsets[part] + start, size) for part, (start, size) in starts.items()]
    else:
        rows = [(heads.inputs[0], group * (query + 2 * width), query + 2 * width)]
    slices = []
    for module, start, size in rows:
        slices.append(Slice(f"{module}.weight", 1 if heads.transposed else 0, start, start + size))
        slices.append(Slice(f"{module}.bias", 0, start, start + size))
    column = 0 if heads.transposed else 1
    slices.append(Slice(f"{heads.output}.weight", column, group * query, (group + 1) * query))
    return [part for part in slices if part.tensor in tensors]


def _matrices(index: int, tensors: Sequence[str], anatomy: Anatomy) -> list[Submodule]:
    """One submodule per matrix and norm; all other tensors of a block are one submodule, the block."""
    forward_group = _path(index, anatomy)
    owned: dict[str, list[str]] = {}
    kinds: dict[str, Kind] = {}
    for name in tensors:
        path = name.rpartition(".")[0]
        if path in anatomy.modules:
            kinds[path] = anatomy.modules[path]
        else:
            block = _layer(index, anatomy).block_of(name[len(forward_group) + 1 :])
            if block is None:
                raise _unknown_tensor(name)
            path = anatomy.block_path(index, block)
            kinds[path] = block
        owned.setdefault(path, []).append(name)
    return [
        Submodule(path, kinds[path], index, tuple(names), forward_group=forward_group) for path, names in owned.items()
    ]
