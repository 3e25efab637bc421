"""The type of a validated recipe: base, experts with their tasks, settings, and names of the models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
        tasks: the experts in the recipe's order, base and directions left out.
        directions: the models with `role: direction`, in the recipe's order.
        settings: the shared keys.
        config: mergekit's own configuration, local model paths made absolute.
        names: model -> its name as written in the recipe; used in messages.
        labels: model -> its name in files: as in the recipe, but local paths have no `./` and no trailing slash. Also
            of the models that only the `tokenizer` section names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: ModelReference
    tasks: tuple[Task, ...]
    directions: tuple[ModelReference, ...] = ()
    settings: Settings
    config: MergeConfiguration
    names: dict[ModelReference, str]
    labels: dict[ModelReference, str]

    def label(self, model: ModelReference) -> str:
        """A model's name in files (see `labels`)."""
        return self.labels[model]

    @property
    def models(self) -> tuple[ModelReference, ...]:
        """Base first, then the experts and the directions in the recipe's order."""
        return (self.base, *(task.model for task in self.tasks), *self.directions)

    @property
    def closed_form(self) -> str | None:
        """The closed form that is one model more; None if there is none. It is that model's name, too."""
        return None if self.settings.direction == "none" else self.settings.direction

    @property
    def model_labels(self) -> tuple[str, ...]:
        """Names in files of all models that get weights: the experts, the directions, the closed form."""
        return (*(self.label(model) for model in self.models[1:]), *filter(None, [self.closed_form]))

    def replaced(self, changes: Mapping[ModelReference, ModelReference]) -> Recipe:
        """A copy with other references to some of its models; their names and labels stay."""

        def change(model: ModelReference) -> ModelReference:
            return changes.get(model, model)

        return self.model_copy(
            update={
                "base": change(self.base),
                "tasks": tuple(task.model_copy(update={"model": change(task.model)}) for task in self.tasks),
                "directions": tuple(map(change, self.directions)),
                "config": map_models(self.config, change),
                "names": {change(model): name for model, name in self.names.items()},
                "labels": {change(model): label for model, label in self.labels.items()},
            }
        )


def map_models(config: MergeConfiguration, change: Callable[[ModelReference], ModelReference]) -> MergeConfiguration:
    """Copy mergekit's configuration with every reference to a model changed, also those in its `tokenizer` section."""
    changed = config.model_copy(deep=True)
    if changed.base_model is not None:
        changed.base_model = change(changed.base_model)
    for entry in changed.models or []:
        entry.model = change(entry.model)
    if isinstance(changed.tokenizer_source, ModelReference):
        changed.tokenizer_source = change(changed.tokenizer_source)
    section = changed.tokenizer
    if section is None:
        return changed
    updates: dict[str, Any] = {}
    if isinstance(section.source, ModelReference):
        updates["source"] = change(section.source)
    if section.tokens:
        updates["tokens"] = {}
        for token, embedding in section.tokens.items():
            source = embedding.source
            if isinstance(source, ModelReference):
                source = change(source)
            elif isinstance(model := getattr(source, "model", None), ModelReference):
                source = source.model_copy(update={"model": change(model)})
            updates["tokens"][token] = embedding.model_copy(update={"source": source})
    changed.tokenizer = section.model_copy(update=updates)
    return changed
