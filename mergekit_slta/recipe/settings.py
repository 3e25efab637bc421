"""The keys of a recipe: their names, types and defaults, and the method's name.

Scope: pydantic models. mergekit is not imported, so that registering the method stays cheap. `objectives.py` has the
own keys of each objective.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny

METHOD = "submodule_linear"
Granularity = Literal["model", "layer", "attn_mlp", "head_mlp", "linear"]
Dtype = Literal["float32", "float64", "bfloat16", "float16"]
ComputeDtype = Literal["auto", "tf32", Dtype]


def to_number(value: object) -> object:
    """Convert text to a number: YAML reads "1e-3" as text.

    Raises:
        ValueError: the value is a boolean (a number in Python), or text that is not a number.
    """
    if isinstance(value, bool):
        raise ValueError("must be a number")
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError("must be a number") from error


def _to_count(value: object) -> object:
    """Convert a quoted whole number; the strict type `Count` then refuses fractions and booleans."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


Number = Annotated[float, BeforeValidator(to_number), Field(allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_to_count), Field(strict=True)]


class TaskSettings(BaseModel):
    """The keys of one model: the calibration rows of its task, and the task's importance in the objective.

    Attributes:
        role: "direction": a model without a task. It has no other keys; its weights are found from the others' rows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["task", "direction"] = "task"
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    text: str | None = None
    completion: str | None = None
    completion_eos: Annotated[bool, Field(strict=True)] = True
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    importance: Annotated[Number, Field(gt=0)] = 1.0


class ObjectiveSettings(BaseModel):
    """Base class for the own keys of an objective: the keys that only this objective reads.

    Attributes:
        needs_answers: whether the statistics are made of losses over the rows' answers; a row without one is of no use.
        uses_seed: whether `seed` also affects the statistics of given rows.
        measures_residuals: whether the residual after the merge can be measured (`--verify`).
        needs_rows: whether the weights depend on calibration rows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    needs_answers: ClassVar[bool] = False
    uses_seed: ClassVar[bool] = False
    measures_residuals: ClassVar[bool] = False
    needs_rows: ClassVar[bool] = True

    @property
    def row_groups(self) -> int:
        """Number of groups of `num_samples` rows that are drawn for each task."""
        return 1

    @property
    def inputs_are_merged(self) -> bool:
        """Whether a submodule's inputs are the features of the merged submodules before it, and not the base's."""
        return False

    @property
    def solve_dependence(self) -> str | None:
        """The key that makes the statistics depend on earlier solves. New weights then need a new calibration.

        None if saved statistics can be solved again with another ridge, balance or importance.
        """
        return None

    def effective(self) -> dict[str, object]:
        """The keys and values that affect the weights."""
        return self.model_dump()

    def check_shared(self, shared: Settings) -> None:
        """Check that the shared settings are compatible with these keys.

        Raises:
            RecipeError: two keys conflict.
        """


class Settings(BaseModel):
    """The keys shared by all models, except `lambda`, which mergekit resolves for each tensor at merge time.

    Attributes:
        ridge: relative ridge; None if the solve chooses it.
        evaluate: whether rows are held out, and the merge is measured on them.
        direction: closed form of the experts that is one model more; "none" for no such model. A default applies to
            two experts or more.
        uncalibrated: what becomes of tensors that text does not run through (a vision tower) if they differ between the
            models: "error" refuses the merge, "base" keeps the base's, "average" averages the experts'.
        own: the objective's own keys.
        stated: the keys that the recipe states; all others have their defaults.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    objective: str = "features"
    granularity: Granularity = "attn_mlp"
    num_samples: Annotated[Count, Field(ge=1)] = 30
    max_seq_length: Annotated[Count, Field(ge=2)] = 512
    seed: Annotated[Count, Field(ge=0, lt=2**63)] = 42
    balance: Annotated[bool, Field(strict=True)] = True
    ridge: Annotated[Number, Field(ge=0)] | None = 0.0
    evaluate: Annotated[bool, Field(strict=True)] = False
    direction: Literal["none", "swudi_a"] = "none"
    uncalibrated: Literal["error", "base", "average"] = "error"
    compute_dtype: ComputeDtype = "auto"
    alphas: Annotated[str, Field(min_length=1)] | None = None
    own: SerializeAsAny[ObjectiveSettings] = ObjectiveSettings()
    stated: frozenset[str] = frozenset()

    @property
    def needs_rows(self) -> bool:
        """Whether rows are read at all."""
        return self.own.needs_rows or self.evaluate

    @property
    def tensor_dtype(self) -> Dtype:
        """Name of the dtype of weights and features in the forward passes."""
        return "float32" if self.compute_dtype in ("auto", "tf32") else self.compute_dtype

    @property
    def allows_bfloat16(self) -> bool:
        """Whether the layers' products may be computed in bfloat16, and all others on a GPU in TF32: no outputs are
        subtracted."""
        return self.compute_dtype == "auto" and self.own.needs_answers


TASK_KEYS = tuple(TaskSettings.model_fields)
SHARED_KEYS = (*(key for key in Settings.model_fields if key not in ("own", "stated")), "lambda")
"""Keys that every objective reads; `objectives.all_shared_keys` also has the own keys of the objectives."""
