"""The layout: everything of an alphas file that is not a result, kept with the statistics.

Scope: its fields, reading and writing it. With the layout, saved statistics are solved again without any model.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_slta.errors import AlphasError, show
from mergekit_slta.files.statistics_file import Statistics

KEY = "layout"
"""Under which the statistics' metadata hold it."""


class LayoutSubmodule(BaseModel):
    """A submodule, as the alphas file lists it (see `alphas_file.SubmoduleAlphas`).

    Attributes:
        objectives: names of the statistics that its alpha minimises together. A tied embedding table is read at both
            ends of the model, so it has `embed` and `head`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: str
    layer: int | None
    tensors: tuple[str, ...]
    slices: dict[str, Any]
    objectives: tuple[str, ...] = Field(min_length=1)


class LayoutTask(BaseModel):
    """The calibration rows of one expert; `tokens` and `sha256` are None where only some of the rows were solved."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    dataset: str
    dataset_config: str | None
    split: str
    text: str | None
    completion: str | None
    rows: tuple[int, ...]
    tokens: int | None
    sha256: str | None


class SolveSettings(BaseModel):
    """What another solve of the same statistics may change.

    Attributes:
        ridge: relative ridge; None where the solve chooses one.
        balance: Eq. 33-34 or Eq. 14.
        importance: w_t by model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ridge: float | None
    balance: bool
    importance: dict[str, float]


class Layout(BaseModel):
    """See the module.

    Attributes:
        models: the experts in the recipe's order, which is that of the file's alphas.
        canonical: the same, sorted by name, which is the order of the statistics.
        settings: the shared settings of the calibration, as the alphas file's `calibration` lists them.
        tasks: the calibration rows of every expert that names a dataset, in the recipe's order.
        solve: what the weights are solved with.
        solve_dependence: the key by which the statistics depend on earlier solves; see `recipe.settings`.
        identity: what the alphas are valid for, by label.
        versions: of this package and of those that it computes with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    granularity: str
    objective: str
    base_model: str
    models: tuple[str, ...]
    canonical: tuple[str, ...]
    submodules: tuple[LayoutSubmodule, ...] = Field(min_length=1)
    copied: tuple[str, ...]
    settings: dict[str, Any]
    tasks: tuple[LayoutTask, ...]
    solve: SolveSettings
    solve_dependence: str | None
    identity: dict[str, str]
    versions: dict[str, str]

    @property
    def order(self) -> list[int]:
        """For every model of `models`, its place in `canonical`."""
        return [self.canonical.index(name) for name in self.models]

    @property
    def importance(self) -> list[float]:
        """w_t in canonical order."""
        return [self.solve.importance[name] for name in self.canonical]

    def to_metadata(self) -> str:
        """As the statistics' metadata hold it; the same layout gives the same text."""
        return self.model_dump_json()

    @classmethod
    def of(cls, statistics: Statistics) -> Layout:
        """The layout that statistics carry, checked against them.

        Raises:
            AlphasError: there is none, or it does not fit the statistics.
        """
        try:
            layout = cls.model_validate_json(statistics.metadata.get(KEY, ""))
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(str(part) for part in problem["loc"])
            raise damaged_layout(f"{place}: {problem['msg']}" if place else problem["msg"]) from error
        tasks = [task.model for task in layout.tasks]
        if len(set(layout.models)) != len(layout.models) or not (
            sorted(layout.models) == sorted(layout.canonical) == sorted(tasks)
        ):
            raise damaged_layout("its models are not those of its tasks")
        if layout.solve.importance.keys() != set(layout.models):
            raise damaged_layout("its importances are not those of its models")
        if len(layout.models) != statistics.num_models:
            raise damaged_layout(
                f"it names {len(layout.models)} models, the statistics are for {statistics.num_models}"
            )
        counts = torch.bincount(statistics.row_task, minlength=statistics.num_models).tolist()
        for task in layout.tasks:
            if len(task.rows) != counts[layout.canonical.index(task.model)]:
                raise damaged_layout(f"it lists {len(task.rows)} rows of {task.model}")
        return layout


def damaged_layout(reason: str) -> AlphasError:
    """The error for a layout that cannot be used."""
    return AlphasError(
        f"the statistics' layout is damaged, or was made by an earlier version ({show(reason)}): calibrate again",
        code="damaged-layout",
    )
