"""The state of a forward pass: every row's features before the next forward group, and how they are updated.

Scope: shared by `embed_head.py` and `layers.py`, which evaluate the submodules. Only the check that a layer's blocks
add up to it runs the model here.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mergekit_slta.checkpoints.tensors import Checkpoints, Weights
from mergekit_slta.data.batches import Batch
from mergekit_slta.maths.task_arithmetic import all_finite
from mergekit_slta.models.skeleton import Skeleton, check_finite
from mergekit_slta.models.submodules import Submodule
from mergekit_slta.runtime.devices import holds_features

Coefficients = tuple[float, ...] | Literal["merged"]
"""The weights to evaluate: c_t in theta_0 + sum_t c_t (theta_t - theta_0), or "merged": the result of `merge`."""
MergeGroup = Callable[[Sequence[Submodule], Sequence[Weights]], Weights]
"""(submodules of a forward group, their tensors in every model) -> their merged tensors."""
HEAD_ELEMENTS = 2**21
"""Logits in memory per model: the vocabulary is evaluated in parts of `HEAD_ELEMENTS / tokens` entries."""


@dataclass(frozen=True)
class Evaluation:
    """Evaluates a submodule on the features of one batch, or of the batches of a pack.

    Attributes:
        submodule: the submodule. The head has one evaluation per part of the vocabulary.
        batch: index of the batch in the state; for a pack, of its first batch.
        rows: the rows of the batch or pack.
        lengths: per row, the number of entries of the outputs that belong to it; the rows are in order.
        outputs_at: coefficients -> [entries, ...] outputs. Whole models can be evaluated only at the state's
            `coefficients`.
        base_coefficients: the coefficients of the base.
    """

    submodule: Submodule
    batch: int
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    outputs_at: Callable[[Coefficients], Tensor]
    base_coefficients: Coefficients

    @cached_property
    def base(self) -> Tensor:
        """[entries, ...] outputs with the base's weights, f(x; theta_0)."""
        return self.outputs_at(self.base_coefficients)


@dataclass
class ForwardState:
    """The rows of a forward pass: their current features, and the weights that compute the next ones.

    Attributes:
        skeleton: the model's code.
        checkpoints: the models' tensors.
        batches: the calibration rows; one row per batch if single matrices are evaluated.
        coefficients: per batch, the coefficients at which whole models are evaluated; None: base and experts.
        packs: lists of indices of batches that token-wise submodules run on together; empty: every batch alone.
        max_pack_tokens: tokens of the largest pack of all processes; 0: of `packs`.
        merge: computes the merged tensors of a forward group.
        merged_inputs: whether the next features are computed with merged tensors instead of the base's. `merge` is then
            called after all evaluations of the group have been yielded.
        skip: names of forward groups that are not evaluated; only the next features are computed.
        folder: folder for the features of whole models; None keeps them in memory.
        head_elements: see `HEAD_ELEMENTS`.
        announce: called with the name of the current part of a long evaluation.
        beside: index of a model -> the state of rows that also run through this model alone, with the tensors that the
            pass has loaded; one row per batch. Not for whole models.
        take_logits: called with a row of `beside`, the index of its model, and logits [tokens, v], part by part of the
            vocabulary.
        hidden: per batch, [tokens, d]: the input of the next forward group; see `keep`.
        norms: merged norms that feed both blocks of a layer; used to compute the next features.
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
    beside: Mapping[int, ForwardState] = field(default_factory=dict)
    take_logits: Callable[[int, int, Tensor], None] = lambda *_: None
    hidden: list[Tensor] = field(default_factory=list)
    norms: Weights = field(default_factory=dict)
    _attention_outputs: list[Tensor] = field(default_factory=list)
    _checked: int = -1
    _unchecked: list[tuple[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.packs = self.packs or [[index] for index in range(len(self.batches))]
        self.max_pack_tokens = self.max_pack_tokens or max(
            sum(sum(self.batches[index].lengths) for index in pack) for pack in self.packs
        )

    @property
    def vocabulary_part(self) -> int:
        """Number of vocabulary entries that are evaluated at a time; the same in every process."""
        return max(1, self.head_elements // self.max_pack_tokens)

    def gather_pack(
        self, pack: Sequence[int], features: Sequence[Tensor]
    ) -> tuple[tuple[int, ...], tuple[int, ...], Tensor]:
        """Concatenate a pack's batches; returns its rows, their lengths, and features [tokens, d] on the device.

        Args:
            pack: indices of the batches.
            features: [tokens, d] per batch of the pack.
        """
        rows = tuple(row for index in pack for row in self.batches[index].rows)
        lengths = tuple(length for index in pack for length in self.batches[index].lengths)
        packed = features[0] if len(features) == 1 else torch.cat(list(features))
        return rows, lengths, packed.to(self.skeleton.device)

    @property
    def num_models(self) -> int:
        """The base, the experts and the directions."""
        return self.checkpoints.num_models

    @property
    def base_coefficients(self) -> Coefficients:
        """The base's coefficients: all 0."""
        return (0.0,) * (self.num_models - 1)

    def model_coefficients(self, model: int) -> Coefficients:
        """A model's coefficients; the base is model 0, then the experts."""
        return tuple(float(expert == model) for expert in range(1, self.num_models))

    def advance(self, submodule: Submodule, index: int, hidden: Tensor, output: Tensor) -> None:
        """Update the features of batch `index` after a submodule; its input `hidden` and `output` are [tokens, d].

        Parallel blocks both read the layer's input, and their changes to it are summed.
        """
        assert submodule.layer is not None
        if submodule.kind == "layer" or not self.skeleton.layer_anatomy(submodule.layer).parallel:
            self.hidden[index] = self.keep(output)
        elif submodule.kind == "attention":
            self._attention_outputs.append(self.keep(output))
        else:
            self.hidden[index] = self.keep(self._attention_outputs.pop(0).to(output.device) + (output - hidden))

    def context(self, *group: Submodule) -> Weights:
        """Load the base's tensors that a block's forward needs and that are not the block's own.

        These are norms that feed both blocks, which are submodules of their own, and parameters of the layer itself.
        """
        index = group[0].layer
        if index is None or group[0].kind not in ("attention", "mlp"):
            return {}
        prefix = f"{self.skeleton.layers_path}.{index}."
        layer, block = self.skeleton.layer_anatomy(index), group[0].kind
        parts = {name: name[len(prefix) :] for name in self.checkpoints.plan.tensors if name.startswith(prefix)}
        names = [
            name for name, part in parts.items() if layer.block_of(part) != block and layer.is_read_by(part, block)
        ]
        return self.checkpoints.load(names, models=[0])[0]

    def check_blocks(self, layer: int) -> None:
        """Check that the blocks of the base's layer add up to it, on the first batch; once for each layer.

        Raises:
            ModelError: they do not.
        """
        if layer == self._checked:
            return
        skeleton, prefix = self.skeleton, f"{self.skeleton.layers_path}.{layer}."
        names = [name for name in self.checkpoints.plan.tensors if name.startswith(prefix)]
        weights = self.checkpoints.load(names, models=[0])[0]
        skeleton.check_blocks(layer, self.batches[0].pad(self.hidden[0].to(skeleton.device)), weights)
        self._checked = layer

    @cached_property
    def _keeps_on_device(self) -> bool:
        batches = [*self.batches, *(batch for beside in self.beside.values() for batch in beside.batches)]
        tokens = sum(sum(batch.lengths) for batch in batches)
        # Twice: parallel blocks keep the outputs of attention, too.
        return holds_features(self.skeleton.device, 2 * tokens * self.skeleton.width * self.checkpoints.dtype.itemsize)

    def keep(self, features: Tensor) -> Tensor:
        """Features of a batch for the next forward group: on the device where all fit, else on the CPU."""
        return features if self._keeps_on_device else features.cpu()

    def check_finite(self, features: Tensor, submodule: Submodule, coefficients: Coefficients) -> Tensor:
        """Note the base's features for `finish_checks`, and return the features. The caller checks those of other
        models."""
        if coefficients == self.base_coefficients:
            self._unchecked.append((submodule.name, torch.stack(features.aminmax())))
        return features

    def finish_checks(self) -> None:
        """Check the base's features of a forward group, all batches at once.

        Raises:
            RunError: they hold NaN or Inf.
        """
        unchecked, self._unchecked = self._unchecked, []
        if unchecked and not all_finite(torch.stack([extremes for _, extremes in unchecked])):
            for name, extremes in unchecked:
                check_finite(extremes, name)


class InterpolatedWeights:
    """Computes the tensors of a forward group at any coefficients. A model's tensors are loaded at the first use.

    Args:
        state: its number of models and its `merge` are used.
        group: the submodules of the forward group.
        load: indices of models -> their tensors.
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
        """The tensors at the coefficients. If `names` is given, others may be missing. A model's own tensors are not
        copied."""
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
            # The first use of an expert loads all models, so that each shard is read only once for the group.
            if missing != [0]:
                missing = [number for number in range(self._state.num_models) if number not in self._loaded]
            self._loaded |= zip(missing, self._load(missing), strict=True)
        return [self._loaded[number] for number in numbers]
