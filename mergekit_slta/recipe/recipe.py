"""The type of a validated recipe: base, experts with their tasks, settings, and names of the models."""

from __future__ import annotations

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from pydantic import BaseModel, ConfigDict

from mergekit_slta.recipe.settings import Settings, TaskSettings


class Task(TaskSettings):
    """One expert, and the keys of its task."""

    model: ModelReference


class Recipe(BaseModel):
    """A validated recipe.

    Attributes:
        base: the base model.
        tasks: the experts in the recipe's order, base left out.
        settings: the shared keys.
        config: mergekit's own configuration, local model paths made absolute.
        names: model -> its name as written in the recipe; used in messages.
        labels: model -> its name in files: as in the recipe, but local paths have no `./` and no trailing slash.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: ModelReference
    tasks: tuple[Task, ...]
    settings: Settings
    config: MergeConfiguration
    names: dict[ModelReference, str]
    labels: dict[ModelReference, str]

    def label(self, model: ModelReference) -> str:
        """A model's name in files (see `labels`)."""
        return self.labels[model]

    @property
    def models(self) -> tuple[ModelReference, ...]:
        """Base first, then the experts in the recipe's order."""
        return (self.base, *(task.model for task in self.tasks))
