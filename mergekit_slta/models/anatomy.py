"""Find out what a decoder layer is made of by running its code, without its weights.

Scope: one layer's direct children. A child with a matrix is a block: its forward is replaced by one that returns noise,
so that nothing large is computed. Of every tensor it is recorded which children's outputs it was computed from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergekit_slta.errors import ModelError, show
from mergekit_slta.libraries.torch import TorchDispatchMode, replaced_forwards, tree_leaves
from mergekit_slta.models.running import take_hidden

Block = Literal["attention", "mlp"]
_INPUT = "the layer's input"
_NUM_TOKENS = 4
_MOST_BLOCKS = 6
"""Layers with more modules that hold matrices are not looked into: what each returns is found by trying."""


@dataclass(frozen=True)
class LayerAnatomy:
    """What a decoder layer is made of. Names are paths within the layer.

    Attributes:
        mixers: the modules that mix tokens (attention, linear attention, convolution, state space), which together are
            the layer's attention block. Empty if it has none.
        mlps: all other modules with matrices (MLP, experts, their router): the MLP block. Empty if it has none.
        norms: norm -> the block that it belongs to. A norm that feeds a block belongs to it, and so does a norm of a
            block's output. None: it feeds both, and is a submodule of its own.
        parallel: whether both blocks read the layer's input; if not, the MLP block reads the attention block's output.
        entry: the first module of the MLP block that is called, or its norm; its input is the attention block's output
            if the blocks are not parallel. Empty if one of the blocks is missing.
        tuples: the modules that return a tuple, whose first entry is their output -> its length.
        order: blocks and norms in the order in which they are called.
    """

    mixers: tuple[str, ...]
    mlps: tuple[str, ...]
    norms: Mapping[str, Block | None]
    parallel: bool = False
    entry: str = ""
    tuples: Mapping[str, int] = field(default_factory=dict)
    order: tuple[str, ...] = ()

    def block_of(self, name: str) -> Block | None:
        """The block that a parameter (its path within the layer) belongs to; None: it is of a norm that feeds both.

        Parameters of the layer itself belong to its last block.
        """
        for modules, block in ((self.mixers, "attention"), (self.mlps, "mlp")):
            if name.startswith(tuple(f"{module}." for module in modules)):
                return block  # type: ignore[return-value]
        for norm, owner in self.norms.items():
            if name.startswith(f"{norm}."):
                return owner
        return "mlp" if self.mlps else "attention"

    def is_read_by(self, name: str, block: Block) -> bool:
        """Whether a block's forward reads a parameter (its path within the layer): all but the other block's do."""
        other = self.parts("mlp" if block == "attention" else "attention")
        return not name.startswith(tuple(f"{part}." for part in other))

    def parts(self, block: Block) -> list[str]:
        """The modules of a block, and its norms."""
        modules = self.mixers if block == "attention" else self.mlps
        return [*modules, *(norm for norm, owner in self.norms.items() if owner == block)]


@dataclass
class _Call:
    """One call of a child: the sources of its first input, and whether it got an argument of the layer."""

    name: str
    sources: frozenset[str]
    gets_context: bool


class _Sources(TorchDispatchMode):
    """Records the sources of every tensor: the children, and the layer's input, that it was computed from.

    A child's output has only this child as its source.
    """

    def __init__(self) -> None:
        super().__init__()
        self._of: dict[int, tuple[Tensor, frozenset[str]]] = {}  # holds the tensors, so that no id is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        found = self.of((args, kwargs))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self.set(tensor, found | self.of(tensor))
        return output

    def of(self, values: Any) -> frozenset[str]:
        """The sources of all tensors in a nested structure."""
        empty: frozenset[str] = frozenset()
        kept = (self._of.get(id(value)) for value in tree_leaves(values) if isinstance(value, Tensor))
        return empty.union(*(sources for _, sources in filter(None, kept)))

    def set(self, value: Any, sources: frozenset[str]) -> None:
        """Set the sources of all tensors in a nested structure."""
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                self._of[id(tensor)] = (tensor, sources)


@dataclass
class _Look:
    """The calls of a layer's children in one run."""

    calls: list[_Call] = field(default_factory=list)

    def sources(self, name: str) -> frozenset[str]:
        return frozenset().union(*(call.sources for call in self.calls if call.name == name))


def stand_in(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of any size whose entries share one number in memory."""
    return torch.full((), 0.5, dtype=dtype).expand(tuple(shape))


def look_at_layer(
    layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], width: int, dtype: torch.dtype
) -> LayerAnatomy | None:
    """Find a layer's blocks and norms.

    Args:
        layer: the layer; its parameters are on the meta device.
        args, kwargs: what the model passes to it besides the hidden states, for 4 tokens.
        width: size of the hidden states.
        dtype: precision.

    Returns:
        What was found; None if the layer does not show how its modules are connected.
    """
    children = dict(_called_children(layer))
    blocks = [name for name, child in children.items() if any(part.dim() > 1 for part in child.parameters())]
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    weights = {name: stand_in(tensor.shape, dtype) for name, tensor in state.items() if tensor.device.type == "meta"}
    context = {name for name, value in kwargs.items() if not isinstance(value, bool)}
    values = [value for value in tree_leaves((args, dict(kwargs))) if isinstance(value, Tensor)]
    hidden = torch.randn((1, _NUM_TOKENS, width), dtype=dtype, generator=torch.Generator().manual_seed(0))
    if len(blocks) > _MOST_BLOCKS:
        return None
    for kinds in product(("first guess", "other", "own"), repeat=len(blocks)):
        look, sources = _Look(), _Sources()
        forwards = {}
        tuples: dict[str, int] = {}
        for name, child in children.items():
            kind = kinds[blocks.index(name)] if name in blocks else "own"
            forwards[child] = _recorder(name, child.forward, kind, look, sources, context, values, tuples)
        try:
            with torch.no_grad(), replaced_forwards(forwards), sources:
                given = hidden.clone()
                sources.set(given, frozenset({_INPUT}))
                output = functional_call(layer, weights, (given, *args), dict(kwargs))
        except Exception:  # a block returns something else: try the next
            continue
        output = output[0] if isinstance(output, (tuple, list)) else output
        called = [call.name for call in look.calls]
        if isinstance(output, Tensor) and output.shape == hidden.shape and all(called.count(n) == 1 for n in blocks):
            return _describe(look, blocks, [name for name in children if name not in blocks], tuples)
    return None


def _called_children(layer: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Direct children with parameters, and norms without; those of a list in its place: a list is not called."""
    for name, child in layer.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _called_children(child, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()) or "norm" in type(child).__name__.lower():
            yield prefix + name, child


def _recorder(
    name: str,
    own: Callable[..., Any],
    kind: str,
    look: _Look,
    sources: _Sources,
    context: set[str],
    values: Sequence[Tensor],
    tuples: dict[str, int],
) -> Callable[..., Any]:
    """A forward that records its call; see `look_at_layer`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        others = [*args[1:], *(value for key, value in kwargs.items() if args or value is not first)]
        gets_context = bool(context & kwargs.keys() - {"hidden_states"}) or any(
            value is other for value in values for other in tree_leaves(others)
        )
        look.calls.append(_Call(name, sources.of(first), gets_context))
        if kind == "own":
            output = own(*args, **kwargs)
            if isinstance(output, tuple):
                tuples[name] = len(output)
        else:
            output = torch.full_like(first, 0.5)
            if gets_context == (kind == "first guess"):  # attention returns a tuple, an MLP a tensor
                output = (output, None)
                tuples[name] = len(output)
        sources.set(output, frozenset({name}))
        return output

    return forward


def _describe(look: _Look, blocks: list[str], others: list[str], tuples: Mapping[str, int]) -> LayerAnatomy | None:
    """Assign blocks and norms; None if the modules are connected in another way."""
    order = [call.name for call in look.calls if call.name in blocks]
    mixers = [name for name in order if any(call.name == name and call.gets_context for call in look.calls)]
    if not mixers and len(order) > 1:
        mixers = order[:1]
    elif len(mixers) == len(order) > 1:
        mixers = mixers[:-1]
    mlps = [name for name in order if name not in mixers]
    owner: dict[str, Block] = dict.fromkeys(mixers, "attention") | dict.fromkeys(mlps, "mlp")  # type: ignore[dict-item]
    feeds: dict[str, set[str]] = {name: set() for name in (*blocks, *others)}
    for call in look.calls:
        if _INPUT not in call.sources:
            for source in call.sources:
                feeds[source].add(call.name)
    norms: dict[str, Block | None] = {}

    def reached(name: str) -> set[Block]:
        """The blocks that a norm's output enters, through other norms if not directly."""
        return {block for other in feeds[name] for block in ({owner[other]} if other in owner else reached(other))}

    def made_by(name: str) -> set[Block]:
        """The blocks that a norm's input comes from."""
        found = look.sources(name) - {_INPUT}
        return {block for other in found for block in ({owner[other]} if other in owner else made_by(other))}

    calls = tuple(call.name for call in look.calls)
    for name in others:
        last: Block = "mlp" if mlps else "attention"
        if name not in calls:
            norms[name] = last
            continue
        found = reached(name) if _INPUT in look.sources(name) else made_by(name) or reached(name)
        shared = len(found) == 2 and found == reached(name)
        norms[name] = None if shared else last if len(found) == 2 else next(iter(found), last)
    first = {"attention": "", "mlp": ""}
    for call in look.calls:
        block = owner.get(call.name) or norms.get(call.name)
        if block and not first[block] and _INPUT in call.sources | _through(call, norms, look):
            first[block] = call.name
    if not mixers or not mlps:
        return LayerAnatomy(tuple(mixers), tuple(mlps), norms, tuples=tuples, order=calls)
    if not first["mlp"] or not first["attention"]:
        return None
    from_attention = {*mixers, *(name for name, block in norms.items() if block == "attention")}

    def entering(block: Block) -> list[frozenset[str]]:
        own = {name for name, other in {**owner, **norms}.items() if other == block}
        return [call.sources - own for call in look.calls if call.name in own and _INPUT in call.sources]

    reads = [bool(found & from_attention) for found in entering("mlp")]
    if any(found & set(mlps) for found in entering("attention")) or len(set(reads)) > 1:
        return None
    return LayerAnatomy(tuple(mixers), tuple(mlps), norms, not any(reads), first["mlp"], tuples, calls)


def _through(call: _Call, norms: Mapping[str, Block | None], look: _Look) -> frozenset[str]:
    """The sources of the shared norms that feed a call."""
    shared = [name for name in call.sources if name in norms and norms[name] is None]
    return frozenset().union(*(look.sources(name) for name in shared))


@contextmanager
def without(layer: nn.Module, anatomy: LayerAnatomy, block: Block) -> Iterator[None]:
    """Let the modules and norms of one of a layer's blocks return zeros inside the context."""
    with replaced_forwards(
        {layer.get_submodule(part): partial(_zeros, anatomy.tuples.get(part, 0)) for part in anatomy.parts(block)}
    ):
        yield


def _zeros(length: int, *args: Any, **kwargs: Any) -> Any:
    """Zeros in the shape of the hidden states; in a tuple with Nones, if its length is not 0."""
    zeros = torch.zeros_like(take_hidden(args, kwargs)[0])
    return (zeros, *[None] * (length - 1)) if length else zeros


def unknown_blocks(path: str) -> ModelError:
    """The error for a layer whose blocks were not found, or do not add up to it."""
    return ModelError(
        f"the attention and MLP blocks of {show(path)} cannot be told apart, or do not add up to the layer: "
        "use `granularity: layer`, and please report the model",
        code="unknown-blocks",
    )
