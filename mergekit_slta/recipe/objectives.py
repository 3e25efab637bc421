"""The table of objectives: each one's keys, defaults and granularities, and its explanation in model cards.

Scope: the keys that a recipe may have. The code that gathers and solves statistics is in the folder `objectives`:
`ObjectiveRow.module` names the file, and `objectives.registry` loads it. To add an objective, add a row here and that
file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from mergekit_slta.errors import RecipeError
from mergekit_slta.maths.ridges import SMALLEST_RIDGE
from mergekit_slta.recipe.settings import SHARED_KEYS, Count, Granularity, ObjectiveSettings, Settings

FEATURES, JOINT, DATA_FREE = "features", "joint", "data_free"
MAX_STEPS = 12
"""Largest number of steps with `steps: auto`."""


class FeaturesSettings(ObjectiveSettings):
    """The keys of `objective: features`."""

    measures_residuals = True

    inputs: Literal["base", "merged"] = "base"
    """Features that enter a submodule: those of the base (`base`, the paper), or those of the submodules merged
    before it (`merged`, A.5.3)."""

    @property
    def inputs_are_merged(self) -> bool:
        return self.inputs == "merged"

    @property
    def solve_dependence(self) -> str | None:
        return "inputs" if self.inputs_are_merged else None


class JointSettings(ObjectiveSettings):
    """The keys of `objective: joint`."""

    needs_answers = True
    uses_seed = True

    label_samples: Annotated[Count, Field(ge=0)] = 2
    """Labels sampled from the expert at each position of an answer. 0 takes the row's own tokens; this needs `steps:
    0`."""
    steps: Literal["auto"] | Annotated[Count, Field(ge=0)] = "auto"
    """Number of Gauss-Newton steps. `auto` stops when two steps together gain less than the standard error of their
    gain, and after 12 at the latest. 0 solves once, from derivatives at the experts."""
    fresh_rows: Annotated[bool, Field(strict=True)] = True
    """Every step has `num_samples` rows of its own, and keeps what earlier rows gave. With false all steps have the
    same `num_samples` rows."""

    @property
    def max_steps(self) -> int:
        """Largest number of steps."""
        return MAX_STEPS if self.steps == "auto" else self.steps

    @property
    def row_groups(self) -> int:
        return self.max_steps if self.fresh_rows and self.max_steps else 1

    @property
    def solve_dependence(self) -> str | None:
        return "steps" if self.max_steps else None

    def effective(self) -> dict[str, object]:
        """Without `fresh_rows` if it has no effect: there is only one group of rows."""
        values = self.model_dump()
        if self.row_groups == 1:
            del values["fresh_rows"]
        return values

    def check_shared(self, shared: Settings) -> None:
        if self.max_steps and not self.label_samples:
            raise RecipeError(
                f"`label_samples` is 0 and `steps` is {self.steps}: steps learn from the experts, not from the rows' "
                "own tokens; set `steps: 0`, or draw labels",
                code="conflicting-keys",
            )
        if self.max_steps and not shared.evaluate:
            raise RecipeError(
                f"`evaluate` is false and `steps` is {self.steps}: each step is measured on rows that are held out; "
                "drop `evaluate`, or set `steps: 0`",
                code="conflicting-keys",
            )
        if self.max_steps and shared.ridge is not None and shared.ridge < SMALLEST_RIDGE:
            raise RecipeError(
                f"`ridge` is {shared.ridge:g} and `steps` is {self.steps}: a step needs {SMALLEST_RIDGE:g} or more; "
                "drop `ridge` to have it chosen, or set `steps: 0`",
                code="conflicting-keys",
            )


class DataFreeSettings(ObjectiveSettings):
    """The keys of `objective: data_free`: there are none."""

    needs_rows = False

    @property
    def solve_dependence(self) -> str | None:
        return "direction"

    def check_shared(self, shared: Settings) -> None:
        if shared.direction == "none":
            raise RecipeError(
                "`direction` is 'none' and `objective` is 'data_free', which merges by a direction alone: drop "
                "`direction`",
                code="conflicting-keys",
            )


@dataclass(frozen=True)
class ObjectiveRow:
    """One objective.

    Attributes:
        name: value of the recipe's `objective`.
        module: the module that defines its `OBJECTIVE` (gather, solve, estimate).
        settings: its own keys.
        granularities: the granularities that it supports.
        defaults: shared key -> default, if it differs from that in `Settings`.
        residual: explanation of the residuals in a model card.
    """

    name: str
    module: str
    settings: type[ObjectiveSettings] = ObjectiveSettings
    granularities: tuple[Granularity, ...] = get_args(Granularity)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    residual: str = "The residual is the share of the objective that remains."


OBJECTIVES: dict[str, ObjectiveRow] = {}
"""name -> row; `register_objective` adds to it."""


def register_objective(row: ObjectiveRow) -> None:
    """Add an objective to `OBJECTIVES`."""
    OBJECTIVES[row.name] = row


def with_objective(settings: Settings, name: str) -> Settings:
    """Settings of another objective, with its defaults."""
    row = OBJECTIVES[name]
    return settings.model_copy(update={**row.defaults, "objective": name, "own": row.settings()})


def all_shared_keys() -> tuple[str, ...]:
    """The shared keys, including the own keys of every objective."""
    own = (key for row in OBJECTIVES.values() for key in row.settings.model_fields)
    return tuple(dict.fromkeys((*SHARED_KEYS, *own)))


def owners_of(key: str) -> list[str]:
    """Names of the objectives that have `key` as an own key."""
    return [row.name for row in OBJECTIVES.values() if key in row.settings.model_fields]


register_objective(
    ObjectiveRow(
        name=FEATURES,
        module="mergekit_slta.objectives.features",
        settings=FeaturesSettings,
        residual="The residual is the share of the experts' change of the features that the merged submodule misses: 0 "
        "keeps every expert whole, 1 is no better than the base.",
    )
)
register_objective(
    ObjectiveRow(
        name=JOINT,
        module="mergekit_slta.objectives.joint",
        settings=JointSettings,
        # A joint solve is better with smaller submodules, and with a direction: see examples/reproduce. The solve
        # chooses the ridge.
        defaults={"granularity": "linear", "ridge": None, "evaluate": True, "direction": "swudi_a"},
        residual="All were solved together. The residual is the share of the base's divergence from the experts that "
        "remains: measured on held-out rows, or with `steps: 0` predicted for each row by the others.",
    )
)
register_objective(
    ObjectiveRow(
        name=DATA_FREE,
        module="mergekit_slta.objectives.data_free",
        settings=DataFreeSettings,
        defaults={"granularity": "model", "direction": "swudi_a"},
        residual="There is no residual, because no row was fitted.",
    )
)
