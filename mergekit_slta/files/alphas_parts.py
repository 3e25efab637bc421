"""The parts of an alphas file: the weights of a submodule, and models without a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mergekit_slta.errors import ModelError, show
from mergekit_slta.files.evaluation import Finite

if TYPE_CHECKING:
    from torch import Tensor


Part = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
"""[axis, start, stop)"""


class Direction(BaseModel):
    """A model of the file that has no task.

    Attributes:
        model: its name among the file's models.
        closed_form: how it is computed from the base and the experts, see `maths.directions`; None for a checkpoint.
        transposed: its matrices that are stored as [in, out].
        averaged: its tensors of two or three dimensions that are averaged.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    closed_form: Literal["swudi_a"] | None = None
    transposed: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ()

    def combine(self, name: str, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        """A tensor of the closed form, from that of the base and of every expert; see `maths.directions.combine`.

        Raises:
            ModelError: a tensor holds NaN or Inf.
        """
        from mergekit_slta.maths.directions import combine  # imports torch, which reading a file does not need
        from mergekit_slta.maths.task_arithmetic import all_finite

        if not all(map(all_finite, (base, *experts))):
            raise ModelError(
                f"{show(name)} of {'the base' if not all_finite(base) else 'an expert'} holds NaN or Inf: fetch that "
                "checkpoint again, or leave the model out",
                code="not-finite-weights",
            )
        return combine(
            self.closed_form, base, experts,
            is_transposed=name in self.transposed, is_averaged=name in self.averaged,
        )  # fmt: skip


class SubmoduleAlphas(BaseModel):
    """One submodule of the file.

    Attributes:
        name, kind, layer, tensors: see `submodules.Submodule`; tensor names are those of the merged model.
        alpha: one weight per model of the file.
        stderr: jackknife standard errors of `alpha` over the calibration rows; None if a task has a single row, and
            after steps of `objective: joint`.
        condition: condition number of the linear system; None if it is rank-deficient.
        rank: rank of that system; None if no system was solved.
        residual: predicted share of the experts' changes that the merge loses; under `objective: joint` see its
            documentation. None if it is not known.
        residual_measured: the same share, measured on the merged submodule's features; None if it was not measured.
        slices: for tensors of which the submodule owns a part: [axis, start, stop], or a list of such parts.
        flags: "unchanged", "rank_deficient", "ill_conditioned" (see `closed_form.Solution`); "extreme": a weight is
            outside the expected range; "nonlinear": the measured residual differs from the predicted one.
        unchanged: models whose submodule equals the base's, and closed forms that only average the experts there; their
            alpha is 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: str
    layer: int | None
    tensors: tuple[str, ...]
    slices: dict[str, Part | tuple[Part, ...]] = {}
    alpha: tuple[Finite, ...]
    stderr: tuple[Finite, ...] | None
    condition: Finite | None
    rank: int | None
    residual: Finite | None
    residual_measured: Finite | None = None
    flags: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"SubmoduleAlphas({self.name!r}, alpha=({', '.join(f'{alpha:.3g}' for alpha in self.alpha)}))"

    __str__ = __repr__

    def parts(self, tensor: str) -> tuple[Part, ...]:
        """The slices of a tensor that the submodule owns; empty if it owns the whole tensor."""
        slices = self.slices.get(tensor, ())
        return (slices,) if slices and isinstance(slices[0], int) else slices  # type: ignore[return-value]
