"""Divide a model's tensors into submodules, for every granularity.

Scope: names and slices only; no tensor is read. Tensor names are those of mergekit's plan.

Rules where the paper is silent:
- `embed` is everything before the first decoder layer, `head` everything after the last.
- With tied embeddings the plan has no tensor for the output projection. The shared table belongs to `embed`, and its
  alpha is solved for both objectives, `embed` and `head`. The final norm belongs to `head`.
- With `head_mlp` a head is a key/value group with its queries. Tensors that cannot be divided by head (norms, the bias
  of the output projection, q/k norms) get the attention block's alpha.
- With `linear`, tensors that are not the weight or bias of a module (fused MoE experts) get the MLP block's alpha.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from mergekit_slta.errors import ModelError, show
from mergekit_slta.models.architectures import Architecture, HeadLayout, is_norm

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
    """A model's structure, with names as in the plan.

    Attributes:
        arch: the entry of the model class in `ARCHITECTURES`.
        config: the base's config.
        layers_path: path of the list of decoder layers (`model.layers`).
        num_layers: number of decoder layers.
        head_weight: name of the output projection's weight; not in the plan if embeddings are tied.
        modules: paths of modules that have a parameter called `weight` or `bias`.
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
    head_prefix = anatomy.head_weight.removesuffix("weight")
    for name in names:
        if name.startswith(anatomy.layers_path + "."):
            index = name[len(anatomy.layers_path) + 1 :].partition(".")[0]
            if not index.isdecimal() or int(index) >= anatomy.num_layers:
                raise _unknown_tensor(name)
            layers[int(index)].append(name)
        else:
            in_head = name.startswith((anatomy.final_norm + ".", head_prefix))
            (after if in_head and not (tied and name == anatomy.head_weight) else before).append(name)
    result = [Submodule("embed", "embed", None, tuple(before), forward_group="embed")]
    divide = {"layer": _whole_layer, "attn_mlp": _blocks, "head_mlp": _heads, "linear": _matrices}[granularity]
    for index, owned in enumerate(layers):
        result += divide(index, owned, anatomy)
    if granularity == "linear":
        norm = tuple(name for name in after if name.startswith(anatomy.final_norm + "."))
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


def _blocks(index: int, tensors: Sequence[str], anatomy: Anatomy) -> list[Submodule]:
    """Attention and MLP with their norms. A norm that feeds both blocks is a submodule of its own, and comes first."""
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
            owner = module if shared else arch.block_name(norms[module])
        else:
            raise _unknown_tensor(name)
        owned.setdefault(owner, []).append(name)
    result = []
    for module, kind in (*((name, "norm") for name in norms), (arch.attention, "attention"), (arch.mlp, "mlp")):
        if module in owned:
            path = prefix + module
            result.append(Submodule(path, kind, index, tuple(owned[module]), forward_group=path))  # type: ignore[arg-type]
    return result


def _heads(index: int, tensors: Sequence[str], anatomy: Anatomy) -> list[Submodule]:
    """As `_blocks`, with the attention block divided by key/value group.

    Tensors that cannot be divided stay in a submodule with the block's name.
    """
    result = []
    for block in _blocks(index, tensors, anatomy):
        if block.kind != "attention":
            result.append(block)
            continue
        layout = anatomy.arch.head_layout(anatomy.config)
        groups = [head_slices(block.name, block.tensors, anatomy.arch, layout, group) for group in range(layout.groups)]
        divided = {part.tensor for part in groups[0]}
        result.append(replace(block, tensors=tuple(name for name in block.tensors if name not in divided)))
        for group, slices in enumerate(groups):
            name = f"{block.name}.heads.{group}"
            owned = tuple(dict.fromkeys(part.tensor for part in slices))
            result.append(Submodule(name, "attention_head", index, owned, tuple(slices), block.forward_group))
    return result


def head_slices(path: str, tensors: Sequence[str], arch: Architecture, layout: HeadLayout, group: int) -> list[Slice]:
    """The slices of an attention block's tensors that belong to one key/value group.

    These are the rows of the input projections for its queries, keys and values, and the columns of the output
    projection for its heads. Rows and columns are swapped if the architecture stores weights as [in, out].

    Args:
        path: path of the attention block.
        tensors: names of its tensors; a tensor that is not among them (a bias) gets no slice.
        arch, layout: the layout and the sizes of the heads.
        group: number of the key/value group, from 0.
    """
    present, projections = set(tensors), arch.projections
    query, width = layout.queries * layout.width, layout.width
    starts = {"q": (group * query, query), "k": (group * width, width), "v": (group * width, width)}
    if projections.packing == "separate":
        rows = [(module, *starts[part]) for module, part in zip(projections.inputs, "qkv", strict=True)]
    elif projections.packing == "stacked":
        offsets = {"q": 0, "k": layout.groups * query, "v": layout.groups * (query + width)}
        rows = [(projections.inputs[0], offsets[part] + start, size) for part, (start, size) in starts.items()]
    else:
        rows = [(projections.inputs[0], group * (query + 2 * width), query + 2 * width)]
    slices = []
    for module, start, size in rows:
        slices.append(Slice(f"{path}.{module}.weight", 1 if arch.transposed else 0, start, start + size))
        slices.append(Slice(f"{path}.{module}.bias", 0, start, start + size))
    column = 0 if arch.transposed else 1
    slices.append(Slice(f"{path}.{projections.output}.weight", column, group * query, (group + 1) * query))
    return [part for part in slices if part.tensor in present]


def _matrices(index: int, tensors: Sequence[str], anatomy: Anatomy) -> list[Submodule]:
    """One submodule per module with a weight or bias; the MLP's other tensors are one submodule, the MLP block."""
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
            raise _unknown_tensor(name)
    kinds = {mlp: "mlp"}
    for module in owned:
        kinds.setdefault(module, "norm" if is_norm(module) else "linear")
    return [
        Submodule(module, kinds[module], index, tuple(names), forward_group=forward_group)  # type: ignore[arg-type]
        for module, names in owned.items()
    ]
