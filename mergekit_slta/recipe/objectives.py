"""The objectives: one row for each, with its keys, defaults and granularities, and how a model card explains it.

Scope: what a recipe can say. How an objective gathers statistics and solves them is one file in the folder
`objectives`, which `module` names and `objectives.registry` loads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from mergekit_slta.errors import RecipeError
from mergekit_slta.maths.ridges import SMALLEST_RIDGE
from mergekit_slta.recipe.settings import SHARED_KEYS, Count, Granularity, ObjectiveSettings, Settings


class FeaturesSettings(ObjectiveSettings):
    """The keys of `objective: features`.

    Attributes:
        inputs: whose features enter a submodule: the base's (the paper), or those of the submodules merged before it
            (A.5.3).
    """

    measures_residuals = True

    inputs: Literal["base", "merged"] = "base"

    @property
    def inputs_are_merged(self) -> bool:
        return self.inputs == "merged"

    @property
    def solve_dependence(self) -> str | None:
        return "inputs" if self.inputs_are_merged else None


class JointSettings(ObjectiveSettings):
    """The keys of `objective: joint`.

    Attributes:
        steps: Gauss-Newton steps at the merged model.
        label_samples: label draws per row; 0 takes the row's own tokens.
        fresh_rows: every step has rows of its own.
    """

    needs_answers = True
    uses_seed = True

    label_samples: Annotated[Count, Field(ge=0)] = 2
    steps: Annotated[Count, Field(ge=0)] = 6
    fresh_rows: Annotated[bool, Field(strict=True)] = True

    @property
    def row_groups(self) -> int:
        return self.steps if self.fresh_rows and self.steps else 1

    @property
    def solve_dependence(self) -> str | None:
        return "steps" if self.steps else None

    def effective(self) -> dict[str, object]:
        """With at most one step, every row is the step's own whatever `fresh_rows` says."""
        values = self.model_dump()
        if self.row_groups == 1:
            del values["fresh_rows"]
        return values

    def check_shared(self, shared: Settings) -> None:
        if self.steps and not self.label_samples:
            raise RecipeError(
                f"`label_samples` is 0 and `steps` is {self.steps}: steps learn from the experts, not from the rows' "
                "own tokens; set `steps: 0`, or draw labels",
                code="conflicting-keys",
            )
        if self.steps and shared.ridge is not None and shared.ridge < SMALLEST_RIDGE:
            raise RecipeError(
                f"`ridge` is {shared.ridge:g} and `steps` is {self.steps}: a step needs {SMALLEST_RIDGE:g} or more; "
                "drop `ridge` to have it chosen, or set `steps: 0`",
                code="conflicting-keys",
            )


@dataclass(frozen=True)
class ObjectiveRow:
    """One objective.

    Attributes:
        name: the value of the recipe's `objective`.
        module: the file that gathers, solves and estimates costs.
        settings: the keys of its own.
        granularities: those that it can be used with.
        defaults: shared keys whose default is another than that of `Settings`.
        num_solves: from an alphas file's calibration settings, how many solves the weights took.
        residual: how a model card explains the residuals.
    """

    name: str
    module: str
    settings: type[ObjectiveSettings] = ObjectiveSettings
    granularities: tuple[Granularity, ...] = get_args(Granularity)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    num_solves: Callable[[Mapping[str, Any]], int] = lambda calibration: 1
    residual: str = "The residual is the share of the objective that remains."


OBJECTIVES: dict[str, ObjectiveRow] = {}
"""name -> row; `register_objective` adds to it."""


def register_objective(row: ObjectiveRow) -> None:
    """Make an objective known to recipes, under its name."""
    OBJECTIVES[row.name] = row


def all_shared_keys() -> tuple[str, ...]:
    """Shared keys of every objective."""
    own = (key for row in OBJECTIVES.values() for key in row.settings.model_fields)
    return tuple(dict.fromkeys((*SHARED_KEYS, *own)))


def owners_of(key: str) -> list[str]:
    """Names of the objectives that have a key as their own."""
    return [row.name for row in OBJECTIVES.values() if key in row.settings.model_fields]


register_objective(
    ObjectiveRow(
        name="features",
        module="mergekit_slta.objectives.features",
        settings=FeaturesSettings,
        residual="The residual is the share of the experts' change of the features that the merged submodule misses: 0 "
        "keeps every expert whole, 1 is no better than the base.",
    )
)
register_objective(
    ObjectiveRow(
        name="joint",
        module="mergekit_slta.objectives.joint",
        settings=JointSettings,
        # What is solved together gains from smaller submodules: see examples/reproduce. The ridge is chosen.
        defaults={"granularity": "linear", "ridge": None},
        num_solves=lambda calibration: 1 + int(calibration.get("steps") or 0),
        residual="All were solved together. The residual is the share of the base's loss against the experts that "
        "remains, each row predicted by the others.",
    )
)
