"""The state of a walk through the model: the rows' features between steps, and how they move on.

Scope: shared by the steps of `ends.py` and `layers.py`; evaluates nothing itself but the wiring of a layer's blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_slta.batches import Batch
from mergekit_slta.checkpoints import Checkpoints, Weights
from mergekit_slta.errors import ModelError, RunError, show
from mergekit_slta.skeleton import Skeleton
from mergekit_slta.submodules import Submodule

Carry = Callable[[Sequence[Submodule], Sequence[Weights]], Weights]
"""(submodules of a step, their tensors of every model) -> the tensors with which the rows move on behind the step."""


@dataclass(frozen=True)
class Evaluation:
    """A submodule at the features of one batch.

    Attributes:
        submodule: which one. The head comes in several parts of the vocabulary, as evaluations of its own.
        rows, lengths: the batch's rows, and how many of the outputs' leading entries belong to each.
        base: [entries, ...] outputs with the base's weights, f(x; theta_0).
        weights: the submodule's tensors of every model, base first.
        run: one of `weights` (or, but for whole models, any others) -> outputs with those, f(x; theta).
    """

    submodule: Submodule
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    base: Tensor
    weights: Sequence[Weights]
    run: Callable[[Weights], Tensor]


class Walk:
    """Where the calibration rows are in the model, and with what they go on.

    Args:
        skeleton: the model's code.
        checkpoints: the models' tensors.
        batches: the calibration rows; of one row each where single matrices are evaluated.
        carry: with which tensors the rows move on behind each step; the base's if None. Called when all batches of
            the step have been handed out.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        checkpoints: Checkpoints,
        batches: Sequence[Batch],
        carry: Carry | None = None,
    ) -> None:
        self.skeleton = skeleton
        self.checkpoints = checkpoints
        self.batches = batches
        self.carry = carry
        self.hidden: list[Tensor] = []
        """Per batch, [tokens, d] on the CPU: the features before the next step."""
        self.parallel: bool | None = None
        """Whether attention and MLP both read the layer's input; found out on the base's first layer."""
        self.norms: Weights = {}
        """Merged norms that feed both blocks of a layer: the rows move on through these."""
        self._attended: list[Tensor] = []

    def advance(self, submodule: Submodule, number: int, hidden: Tensor, output: Tensor) -> None:
        """Move a batch behind a submodule. Parallel blocks both take the layer's input, and their changes add up."""
        if not self.parallel or submodule.kind == "layer":
            self.hidden[number] = output.cpu()
        elif submodule.kind == "attention":
            self._attended.append(output.cpu())
        else:
            self.hidden[number] = (self._attended.pop(0).to(output.device) + (output - hidden)).cpu()

    def context(self, *step: Submodule) -> Weights:
        """The base's tensors that a block's forward touches without owning them: norms of the silenced branch, and
        norms that are a submodule of their own."""
        prefix = f"{self.skeleton.layers_path}.{step[0].layer}."
        arch = self.skeleton.arch
        branches = (f"{prefix}{arch.attention}.", f"{prefix}{arch.mlp}.")
        owned = {name for submodule in step for name in submodule.tensors}
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
        batch = self.batches[0]
        packed = self.hidden[0].to(skeleton.device)
        whole = batch.pack(skeleton.layer(index, batch.pad(packed), weights))
        attended = batch.pack(skeleton.block(index, "attention", batch.pad(packed), weights))
        sequential = skeleton.block(index, "mlp", attended[None], weights)[0]
        parallel = attended + (skeleton.block(index, "mlp", packed[None], weights)[0] - packed)
        tolerance = 1e-3 * (whole - packed).norm() + 64 * torch.finfo(whole.dtype).eps * whole.norm()
        errors = [(whole - sequential).norm(), (whole - parallel).norm()]
        if min(errors) > tolerance:
            raise ModelError(
                f"the attention and MLP blocks of {show(prefix[:-1])} do not add up to the layer: "
                "use `granularity: layer`, and please report the model"
            )
        return bool(errors[1] < errors[0])

    def finite(self, features: Tensor, submodule: Submodule) -> Tensor:
        """The features themselves.

        Raises:
            RunError: they hold NaN or Inf.
        """
        if not torch.isfinite(features.sum()) and not torch.isfinite(features).all():
            raise RunError(
                f"the features behind {show(submodule.name)} hold NaN or Inf in "
                f"{str(features.dtype).removeprefix('torch.')}: use `compute_dtype: float32`, or check the models"
            )
        return features
