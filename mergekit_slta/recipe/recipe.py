"""A validated recipe: the base, the experts with their tasks, the settings, and the names of the models."""

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
        names: how the recipe spells base and experts; used in messages.
        labels: the models' names in files: as the recipe spells them, local paths without `./` and trailing slashes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: ModelReference
    tasks: tuple[Task, ...]
    settings: Settings
    config: MergeConfiguration
    names: dict[ModelReference, str]
    labels: dict[ModelReference, str]

    def label(self, model: ModelReference) -> str:
        """A model's name in files."""
        return self.labels[model]

    @property
    def models(self) -> tuple[ModelReference, ...]:
        """Base first, then the experts in the recipe's order."""
        return (self.base, *(task.model for task in self.tasks))
