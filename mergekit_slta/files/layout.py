"""The layout: all fields of an alphas file that are not results of the solve. It is saved with the statistics.

Scope: the fields of the layout, reading and writing it. Statistics with a layout can be solved without any model.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_slta.errors import AlphasError, show
from mergekit_slta.files.alphas_parts import Direction
from mergekit_slta.files.statistics_file import Statistics

KEY = "layout"
"""Key of the layout in the statistics' metadata."""


class LayoutSubmodule(BaseModel):
    """A submodule, as the alphas file lists it (see `alphas_file.SubmoduleAlphas`).

    Attributes:
        objectives: names of the statistics from which its alpha is solved. A tied embedding table is used at both ends
            of the model, so it has two: `embed` and `head`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: str
    layer: int | None
    tensors: tuple[str, ...]
    slices: dict[str, Any]
    objectives: tuple[str, ...] = Field(min_length=1)


class LayoutTask(BaseModel):
    """The calibration rows of one expert.

    Attributes:
        completion_eos: whether the tokenizer's end token follows a completion.
        chat_template: the template that rendered them: a value of the recipe's key; None if the rows are no chats.
        tokens, sha256: None if only some of the rows were solved.
        held_out: numbers of the rows that were not fitted. The first half of them (`acceptance`) chooses among merges
            and gives the evaluation; the second half is for comparisons between methods.
        whole_rows: whether losses are taken over whole rows, because no row says where its answer begins.
        flags: `shared_rows`, `too_few_rows`; see `alphas_file`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    dataset: str
    dataset_config: str | None
    split: str
    text: str | None
    completion: str | None
    completion_eos: bool = True
    chat_template: str | None = None
    rows: tuple[int, ...]
    tokens: int | None
    sha256: str | None
    held_out: tuple[int, ...] = ()
    whole_rows: bool = False
    flags: tuple[str, ...] = ()

    @property
    def acceptance(self) -> tuple[int, ...]:
        """The first half of `held_out`."""
        return self.held_out[: (len(self.held_out) + 1) // 2]


class SolveSettings(BaseModel):
    """The settings that another solve of the same statistics may change.

    Attributes:
        ridge: relative ridge; None if the solve chooses it.
        balance: True for Eq. 33-34, False for Eq. 14.
        importance: model -> w_t.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ridge: float | None
    balance: bool
    importance: dict[str, float]


class Layout(BaseModel):
    """The layout of an alphas file.

    Attributes:
        models: the models in the order of the alphas in the file: experts and directions in the recipe's order.
        canonical: the experts sorted by name, then the directions: the order of the statistics.
        directions: the models without a task.
        settings: the shared settings of the calibration, as the alphas file's `calibration` lists them.
        tasks: the calibration rows of every expert that names a dataset, in the recipe's order; empty if no rows were
            read.
        solve: the settings of the solve.
        solve_dependence: the recipe key that makes the statistics depend on earlier solves, or None; see
            `recipe.settings`.
        products: precision of the products inside the layers in the passes that gathered the statistics, see
            `Job.layer_products`; None if no pass ran.
        far_from_base: model -> distance from the base, for those that are suspiciously far (see
            `alphas_file.describe_far`).
        identity: label -> value, the inputs that the alphas depend on (see `files.identity`).
        versions: versions of this package and of the libraries.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    granularity: str
    objective: str
    base_model: str
    models: tuple[str, ...]
    canonical: tuple[str, ...]
    directions: tuple[Direction, ...] = ()
    submodules: tuple[LayoutSubmodule, ...] = Field(min_length=1)
    copied: tuple[str, ...]
    settings: dict[str, Any]
    tasks: tuple[LayoutTask, ...]
    solve: SolveSettings
    solve_dependence: str | None
    products: str | None = None
    far_from_base: dict[str, float] = {}
    identity: dict[str, str]
    versions: dict[str, str]

    @property
    def order(self) -> list[int]:
        """Index in `canonical` of every model of `models`."""
        return [self.canonical.index(name) for name in self.models]

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts in canonical order: those of the tasks 0 to T - 1."""
        return self.canonical[: len(self.canonical) - len(self.directions)]

    @property
    def closed_form(self) -> str | None:
        """Name of the direction that is computed from the experts; None if there is none."""
        return next((direction.model for direction in self.directions if direction.closed_form), None)

    @property
    def importance(self) -> list[float]:
        """w_t of the experts in canonical order."""
        return [self.solve.importance[name] for name in self.experts]

    def to_metadata(self) -> str:
        """Serialize for the statistics' metadata; the same layout gives the same text."""
        return self.model_dump_json()

    @classmethod
    def of(cls, statistics: Statistics) -> Layout:
        """Read the layout of statistics, and check that it fits them.

        Raises:
            AlphasError: there is none, or it does not fit the statistics.
        """
        try:
            layout = cls.model_validate_json(statistics.metadata.get(KEY, ""))
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(str(part) for part in problem["loc"])
            raise damaged_layout(f"{place}: {problem['msg']}" if place else problem["msg"]) from error
        unread = () if len(statistics.row_task) else layout.experts
        tasks, directions = [task.model for task in layout.tasks], [part.model for part in layout.directions]
        if len(set(layout.models)) != len(layout.models) or not (
            sorted(layout.models) == sorted(layout.canonical) == sorted([*(tasks or unread), *directions])
        ):
            raise damaged_layout("its models are not those of its tasks")
        if not set(layout.experts) == set(tasks or unread) == layout.solve.importance.keys():
            raise damaged_layout("its importances are not those of its experts")
        if len(layout.models) != statistics.num_models:
            raise damaged_layout(
                f"it names {len(layout.models)} models, the statistics are for {statistics.num_models}"
            )
        counts = torch.bincount(statistics.row_task, minlength=statistics.num_models).tolist()
        is_point = statistics.form == "point"
        if is_point and layout.solve_dependence is None:
            raise damaged_layout("it does not say on what measured models depend")
        has_all = all(task.held_out for task in layout.tasks) and len(statistics.row_task) > 0
        for task in layout.tasks:
            rows = (task.acceptance if has_all else ()) if is_point else task.rows
            if len(rows) != counts[layout.canonical.index(task.model)]:
                raise damaged_layout(f"it lists {len(rows)} rows of {task.model}")
        return layout


def damaged_layout(reason: str) -> AlphasError:
    """The error for a layout that cannot be used."""
    return AlphasError(
        f"the statistics' layout is damaged, or was made by an earlier version ({show(reason)}): calibrate again",
        code="damaged-layout",
    )
