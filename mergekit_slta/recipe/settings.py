"""The keys of a recipe: their names, types and defaults, and the method's name.

Scope: pydantic models, nothing of mergekit's, so that registering the method costs no import. What an objective has as
keys of its own is in `objectives.py`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny

METHOD = "submodule_linear"
Granularity = Literal["model", "layer", "attn_mlp", "head_mlp", "linear"]
ComputeDtype = Literal["float32", "float64", "bfloat16", "float16"]


def to_number(value: object) -> object:
    """Read "1e-3" as a number, as YAML does not.

    Raises:
        ValueError: the value is a boolean, which Python counts as a number, or text that is no number.
    """
    if isinstance(value, bool):
        raise ValueError("must be a number")
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError("must be a number") from error


def _to_count(value: object) -> object:
    """Read a quoted whole number; the strict type behind it refuses fractions and booleans."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


Number = Annotated[float, BeforeValidator(to_number), Field(allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_to_count), Field(strict=True)]


class TaskSettings(BaseModel):
    """The keys of one expert: where its task's calibration rows come from, and the task's share in the objective."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    text: str | None = None
    completion: str | None = None
    importance: Annotated[Number, Field(gt=0)] = 1.0


class ObjectiveSettings(BaseModel):
    """The keys that only one objective reads; each objective derives its own model from this one.

    Attributes:
        needs_answers: whether the loss over a row's answer matters, so that rows mark where their answer begins.
        uses_seed: whether `seed` matters once the rows are drawn.
        measures_residuals: whether the residual that remains after the merge can be measured (`--verify`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    needs_answers: ClassVar[bool] = False
    uses_seed: ClassVar[bool] = False
    measures_residuals: ClassVar[bool] = False

    @property
    def row_groups(self) -> int:
        """How many times `num_samples` rows of each task are drawn."""
        return 1

    @property
    def inputs_are_merged(self) -> bool:
        """Whether a submodule sees the features of the submodules merged before it, in place of the base's."""
        return False

    @property
    def solve_dependence(self) -> str | None:
        """The key by which the statistics depend on earlier solves, so that new weights need a new calibration; None
        where saved statistics can be solved again with another ridge, balance or importance."""
        return None

    def effective(self) -> dict[str, object]:
        """The keys and values that move the weights."""
        return self.model_dump()

    def check_shared(self, shared: Settings) -> None:
        """Refuse shared values that do not go with this objective's.

        Raises:
            RecipeError: with the key, its value and the remedy.
        """


class Settings(BaseModel):
    """The keys shared by all models. `lambda` is left out: mergekit resolves it for every tensor at merge time.

    Attributes:
        ridge: None where the solve chooses one.
        own: the keys of the objective.
        stated: the keys that the recipe states; the others have their defaults.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    objective: str = "features"
    granularity: Granularity = "attn_mlp"
    num_samples: Annotated[Count, Field(ge=1)] = 30
    max_seq_length: Annotated[Count, Field(ge=2)] = 512
    seed: Annotated[Count, Field(ge=0, lt=2**63)] = 42
    balance: Annotated[bool, Field(strict=True)] = True
    ridge: Annotated[Number, Field(ge=0)] | None = 0.0
    compute_dtype: ComputeDtype = "float32"
    alphas: Annotated[str, Field(min_length=1)] | None = None
    own: SerializeAsAny[ObjectiveSettings] = ObjectiveSettings()
    stated: frozenset[str] = frozenset()


TASK_KEYS = tuple(TaskSettings.model_fields)
SHARED_KEYS = (*(key for key in Settings.model_fields if key not in ("own", "stated")), "lambda")
"""Keys that every objective reads; `objectives.all_shared_keys` has those of the objectives, too."""
