"""The state of a forward pass: the rows' features between groups of submodules, how they move on, with which weights.

Scope: shared by the steps of `ends.py` and `layers.py`; evaluates nothing itself but the wiring of a layer's blocks.
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
from mergekit_slta.models.skeleton import Skeleton, finite
from mergekit_slta.models.submodules import Submodule

Coefficients = tuple[float, ...] | Literal["merged"]
"""Where in weight space: coefficients c_t of theta_0 + sum_t c_t tau_t, or what the state's `merge` makes."""
MergeGroup = Callable[[Sequence[Submodule], Sequence[Weights]], Weights]
"""(submodules of a step, their tensors of every model) -> the merged tensors."""
HEAD_ELEMENTS = 2**21
"""Logits held per model at a time; the vocabulary is walked in chunks of `HEAD_ELEMENTS / tokens` rows."""


@dataclass(frozen=True)
class Evaluation:
    """A submodule at the features of one batch.

    Attributes:
        submodule: which one. The head comes in several parts of the vocabulary, as evaluations of its own.
        batch: which batch of the state; where several run together, the first of these.
        rows, lengths: the batches' rows, and how many of the outputs' leading entries belong to each.
        outputs_at: coefficients -> [entries, ...] outputs with the weights there. For whole models only the state's
            `points`.
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
    """Where the calibration rows are in the model, and with what they go on.

    Attributes:
        skeleton: the model's code.
        checkpoints: the models' tensors.
        batches: the calibration rows; of one row each where single matrices are evaluated.
        points: per batch, where whole models are evaluated; at every model if None.
        packs: numbers of batches that what works token by token takes together; each alone if empty.
        widest: tokens of the largest pack, where some of them are another process's.
        merge: makes the merged tensors of a step.
        merged_inputs: the rows move on behind each step through its merged tensors instead of the base's; these are
            asked for when all batches of the step have been handed out.
        done: names of steps that only move the rows on, and are not handed out.
        folder: where features of whole models are kept; in memory if None.
        head_elements: see `HEAD_ELEMENTS`.
        announce: called with the name of what a long evaluation is at.
        hidden: per batch, [tokens, d] on the CPU: the features before the next step.
        parallel: whether attention and MLP both read the layer's input; found out on the base's first layer.
        norms: merged norms that feed both blocks of a layer: the rows move on through these.
    """

    skeleton: Skeleton
    checkpoints: Checkpoints
    batches: Sequence[Batch]
    points: Sequence[Sequence[Coefficients]] | None = None
    packs: Sequence[Sequence[int]] = ()
    widest: int = 0
    merge: MergeGroup | None = None
    merged_inputs: bool = False
    done: Container[str] = ()
    folder: Path | None = None
    head_elements: int = HEAD_ELEMENTS
    announce: Callable[[str], None] = lambda _: None
    hidden: list[Tensor] = field(default_factory=list)
    parallel: bool | None = None
    norms: Weights = field(default_factory=dict)
    _attended: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.packs = self.packs or [[number] for number in range(len(self.batches))]
        self.widest = self.widest or max(
            sum(sum(self.batches[number].lengths) for number in pack) for pack in self.packs
        )

    @property
    def vocabulary_part(self) -> int:
        """Rows of the output projection that are evaluated at a time; the same in every process."""
        return max(1, self.head_elements // self.widest)

    def gather_pack(
        self, pack: Sequence[int], parts: Sequence[Tensor]
    ) -> tuple[tuple[int, ...], tuple[int, ...], Tensor]:
        """Rows, their lengths and features [tokens, d] of the batches of a pack, from the features of each."""
        rows = tuple(row for number in pack for row in self.batches[number].rows)
        lengths = tuple(length for number in pack for length in self.batches[number].lengths)
        together = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return rows, lengths, together.to(self.skeleton.device)

    @property
    def num_models(self) -> int:
        """T + 1."""
        return len(self.checkpoints.plan.models)

    @property
    def base_coefficients(self) -> Coefficients:
        """The base's point."""
        return (0.0,) * (self.num_models - 1)

    def model(self, number: int) -> Coefficients:
        """The point of a model: the base is number 0, the experts follow."""
        return tuple(float(place == number) for place in range(1, self.num_models))

    def advance(self, submodule: Submodule, number: int, hidden: Tensor, output: Tensor) -> None:
        """Move a batch behind a submodule. Parallel blocks both take the layer's input, and their changes add up."""
        if not self.parallel or submodule.kind == "layer":
            self.hidden[number] = output.cpu()
        elif submodule.kind == "attention":
            self._attended.append(output.cpu())
        else:
            self.hidden[number] = (self._attended.pop(0).to(output.device) + (output - hidden)).cpu()

    def context(self, *group: Submodule) -> Weights:
        """The base's tensors that a block's forward touches without owning them: norms of the silenced branch, and
        norms that are a submodule of their own."""
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
        """Which wiring reproduces the base's layer: the MLP behind attention, or both on the layer's input.

        Raises:
            ModelError: neither does, so that the blocks would not be what the model computes.
        """
        assert submodule.layer is not None
        skeleton, index = self.skeleton, submodule.layer
        prefix = f"{skeleton.layers_path}.{index}."
        names = [name for name in self.checkpoints.plan.tensors if name.startswith(prefix)]
        weights = self.checkpoints.load(names, models=[0])[0]
        hidden = self.batches[0].pad(self.hidden[0].to(skeleton.device))
        return skeleton.has_parallel_blocks(index, hidden, weights)

    def check_finite(self, features: Tensor, submodule: Submodule, point: Coefficients) -> Tensor:
        """The features themselves. Those of other points than the base's are the caller's to look at.

        Raises:
            RunError: the base's hold NaN or Inf.
        """
        return finite(features, submodule.name) if point == self.base_coefficients else features


class InterpolatedWeights:
    """The tensors of a step at any point of weight space; every model's are loaded when they are first needed.

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
        self._own: dict[int, Weights] = {}
        self._merged: Weights | None = None

    def __call__(self, point: Coefficients, names: Sequence[str] | None = None) -> Weights:
        """The tensors at a point (only the named ones may be needed); a model's own are handed out as they are."""
        if point == "merged":
            if self._merged is None:
                assert self._state.merge is not None
                self._merged = self._state.merge(self._group, self._models(range(self._state.num_models)))
            return self._merged
        changed = {place + 1: weight for place, weight in enumerate(point) if weight}
        if len(changed) <= 1 and set(changed.values()) <= {1.0}:
            return self._models([next(iter(changed), 0)])[0]
        base, *experts = self._models([0, *changed])
        mixed = {}
        for name in base if names is None else names:
            origin = base[name]
            mixed[name] = origin.clone()
            for own, weight in zip(experts, changed.values(), strict=True):
                mixed[name].add_(own[name] - origin, alpha=weight)
        return mixed

    def _models(self, numbers: Sequence[int]) -> list[Weights]:
        wanted = [number for number in numbers if number not in self._own]
        if wanted:
            # An expert is not asked for alone: reading all of a step's tensors at once is one pass over the shards.
            if wanted != [0]:
                wanted = [number for number in range(self._state.num_models) if number not in self._own]
            self._own |= zip(wanted, self._load(wanted), strict=True)
        return [self._own[number] for number in numbers]
