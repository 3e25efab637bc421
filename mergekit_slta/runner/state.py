"""The state of a forward pass: every row's features before the next forward group, and how the rows move on.

Scope: shared by `embed_head.py` and `layers.py`. Evaluates no submodule itself; it only finds out how a layer's blocks
are wired.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mergekit_slta.checkpoints.tensors import Checkpoints, Weights
from mergekit_slta.data.batches import Batch
from mergekit_slta.models.skeleton import Skeleton, check_finite
from mergekit_slta.models.submodules import Submodule

Coefficients = tuple[float, ...] | Literal["merged"]
"""Which weights: c_t in theta_0 + sum_t c_t (theta_t - theta_0), or "merged": what the state's `merge` makes."""
MergeGroup = Callable[[Sequence[Submodule], Sequence[Weights]], Weights]
"""(submodules of a forward group, their tensors of every model) -> their merged tensors."""
HEAD_ELEMENTS = 2**21
"""Logits held per model at a time: the vocabulary is evaluated in parts of `HEAD_ELEMENTS / tokens` entries."""


@dataclass(frozen=True)
class Evaluation:
    """A submodule on the features of one batch, or of the batches of a pack.

    Attributes:
        submodule: the submodule. The head comes as one evaluation per part of the vocabulary.
        batch: index of the batch in the state; of a pack, its first batch.
        rows: the rows of the batch or pack.
        lengths: per row, how many entries of the outputs belong to it; the rows follow each other.
        outputs_at: coefficients -> [entries, ...] outputs with the weights there. Whole models have outputs only at the
            state's `coefficients`.
        base_coefficients: the base's.
    """

    submodule: Submodule
    batch: int
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    outputs_at: Callable[[Coefficients], Tensor]
    base_coefficients: Coefficients

    @cached_property
    def base(self) -> Tensor:
        """Outputs with the base's weights, f(x; theta_0)."""
        return self.outputs_at(self.base_coefficients)


@dataclass
class ForwardState:
    """The rows of a forward pass: where they are in the model, and with which weights they move on.

    Attributes:
        skeleton: the model's code.
        checkpoints: the models' tensors.
        batches: the calibration rows; one row each where single matrices are evaluated.
        coefficients: per batch, the coefficients at which whole models are evaluated; every model's if None.
        packs: indices of batches that token-wise submodules take together; every batch alone if empty.
        max_pack_tokens: tokens of the largest pack; given where that pack belongs to another process.
        merge: makes the merged tensors of a forward group.
        merged_inputs: the rows pass each group through its merged tensors instead of the base's. `merge` is called once
            all evaluations of the group have been yielded.
        skip: names of forward groups that the rows only pass; their evaluations are not yielded.
        folder: holds the features of whole models; in memory if None.
        head_elements: see `HEAD_ELEMENTS`.
        announce: called with the name of the part that a long evaluation works on.
        hidden: per batch, [tokens, d] on the CPU: the input of the next forward group.
        parallel: whether attention and MLP both read the layer's input; found out on the base's first layer.
        norms: merged norms that feed both blocks of a layer, for the rows to pass through.
    """

    skeleton: Skeleton
    checkpoints: Checkpoints
    batches: Sequence[Batch]
    coefficients: Sequence[Sequence[Coefficients]] | None = None
    packs: Sequence[Sequence[int]] = ()
    max_pack_tokens: int = 0
    merge: MergeGroup | None = None
    merged_inputs: bool = False
    skip: Container[str] = ()
    folder: Path | None = None
    head_elements: int = HEAD_ELEMENTS
    announce: Callable[[str], None] = lambda _: None
    hidden: list[Tensor] = field(default_factory=list)
    parallel: bool | None = None
    norms: Weights = field(default_factory=dict)
    _attention_outputs: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.packs = self.packs or [[index] for index in range(len(self.batches))]
        self.max_pack_tokens = self.max_pack_tokens or max(
            sum(sum(self.batches[index].lengths) for index in pack) for pack in self.packs
        )

    @property
    def vocabulary_part(self) -> int:
        """Entries of the vocabulary that are evaluated at a time; the same in every process."""
        return max(1, self.head_elements // self.max_pack_tokens)

    def gather_pack(
        self, pack: Sequence[int], features: Sequence[Tensor]
    ) -> tuple[tuple[int, ...], tuple[int, ...], Tensor]:
        """Rows, their lengths, and features [tokens, d] on the device, of a pack; from the features of its batches."""
        rows = tuple(row for index in pack for row in self.batches[index].rows)
        lengths = tuple(length for index in pack for length in self.batches[index].lengths)
        packed = features[0] if len(features) == 1 else torch.cat(list(features))
        return rows, lengths, packed.to(self.skeleton.device)

    @property
    def num_models(self) -> int:
        """T + 1."""
        return len(self.checkpoints.plan.models)

    @property
    def base_coefficients(self) -> Coefficients:
        """The base's coefficients: all 0."""
        return (0.0,) * (self.num_models - 1)

    def model_coefficients(self, model: int) -> Coefficients:
        """A model's coefficients: the base is model 0, the experts follow."""
        return tuple(float(expert == model) for expert in range(1, self.num_models))

    def advance(self, submodule: Submodule, index: int, hidden: Tensor, output: Tensor) -> None:
        """Move batch `index` past a submodule, from the submodule's input and output, both [tokens, d].

        Of parallel blocks, both read the layer's input, and the layer's output is the sum of their changes to it.
        """
        if not self.parallel or submodule.kind == "layer":
            self.hidden[index] = output.cpu()
        elif submodule.kind == "attention":
            self._attention_outputs.append(output.cpu())
        else:
            self.hidden[index] = (self._attention_outputs.pop(0).to(output.device) + (output - hidden)).cpu()

    def context(self, *group: Submodule) -> Weights:
        """The base's tensors that a block's forward needs but that are not the block's own: the norm of the silenced
        branch, and norms that are submodules of their own."""
        prefix = f"{self.skeleton.layers_path}.{group[0].layer}."
        arch = self.skeleton.arch
        branches = (f"{prefix}{arch.attention}.", f"{prefix}{arch.mlp}.")
        owned = {name for submodule in group for name in submodule.tensors}
        names = [
            name
            for name in self.checkpoints.plan.tensors
            if name.startswith(prefix) and not name.startswith(branches) and name not in owned
        ]
        return self.checkpoints.load(names, models=[0])[0]

    def has_parallel_blocks(self, submodule: Submodule) -> bool:
        """Whether the MLP of the base's layer reads the layer's input, as attention does, and not attention's output.

        Raises:
            ModelError: neither reproduces the layer, so the blocks are not what the model computes.
        """
        assert submodule.layer is not None
        skeleton, layer = self.skeleton, submodule.layer
        prefix = f"{skeleton.layers_path}.{layer}."
        names = [name for name in self.checkpoints.plan.tensors if name.startswith(prefix)]
        weights = self.checkpoints.load(names, models=[0])[0]
        hidden = self.batches[0].pad(self.hidden[0].to(skeleton.device))
        return skeleton.has_parallel_blocks(layer, hidden, weights)

    def check_finite(self, features: Tensor, submodule: Submodule, coefficients: Coefficients) -> Tensor:
        """The features unchanged; checked where they are the base's. The caller checks all others.

        Raises:
            RunError: the base's features hold NaN or Inf.
        """
        return check_finite(features, submodule.name) if coefficients == self.base_coefficients else features


class InterpolatedWeights:
    """The tensors of a forward group at any coefficients. A model's tensors are loaded when they are first needed.

    Args:
        state: for its models and its `merge`.
        group: the submodules whose tensors these are.
        load: numbers of models -> their tensors.
    """

    def __init__(
        self, state: ForwardState, group: Sequence[Submodule], load: Callable[[Sequence[int]], list[Weights]]
    ) -> None:
        self._state = state
        self._group = group
        self._load = load
        self._loaded: dict[int, Weights] = {}
        self._merged: Weights | None = None

    def __call__(self, coefficients: Coefficients, names: Sequence[str] | None = None) -> Weights:
        """The tensors at the coefficients; at least the named ones if `names` is given. A model's own tensors are
        returned without a copy."""
        if coefficients == "merged":
            if self._merged is None:
                assert self._state.merge is not None
                self._merged = self._state.merge(self._group, self._models(range(self._state.num_models)))
            return self._merged
        nonzero = {expert + 1: weight for expert, weight in enumerate(coefficients) if weight}
        if len(nonzero) <= 1 and set(nonzero.values()) <= {1.0}:
            return self._models([next(iter(nonzero), 0)])[0]
        base, *experts = self._models([0, *nonzero])
        interpolated = {}
        for name in base if names is None else names:
            interpolated[name] = base[name].clone()
            for expert, weight in zip(experts, nonzero.values(), strict=True):
                interpolated[name].add_(expert[name] - base[name], alpha=weight)
        return interpolated

    def _models(self, numbers: Sequence[int]) -> list[Weights]:
        missing = [number for number in numbers if number not in self._loaded]
        if missing:
            # With the first expert all models are loaded: one pass over the shards for all tensors of the group.
            if missing != [0]:
                missing = [number for number in range(self._state.num_models) if number not in self._loaded]
            self._loaded |= zip(missing, self._load(missing), strict=True)
        return [self._loaded[number] for number in numbers]
