"""The evaluation in an alphas file: how far the merge is from the experts, on rows that were not fitted.

Scope: its fields, the lines that describe it, and what the statistics say of measured models.
`calibration.evaluate` and `calibration.assemble` compute it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mergekit_slta.errors import AlphasError, show

if TYPE_CHECKING:
    from mergekit_slta.files.statistics_file import Statistics

SEARCH = "search"
"""Key of the `SearchRecord` in the statistics' metadata."""
WORSE_THAN_BASE = "worse_than_base"
"""Flag of a task: the merge is farther from its expert than the base is."""
WEAK_EXPERT = "weak_expert"
"""Flag of a task: its expert hardly differs from the base, see `maths.divergence.WEAK_SHARE`."""

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Measure(BaseModel):
    """A mean over rows.

    Attributes:
        mean: the mean.
        stderr: its standard error over rows; None if there is one row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: Finite
    stderr: Finite | None


class MeasuredPoint(BaseModel):
    """A merged model that was measured and taken.

    Attributes:
        name: "base", "average", "features", "step N" or "merge".
        ridge: the ridge of a step.
        divergence: KL(expert || model) per task, in the order of `Evaluation.tasks`; in nats, summed over the answer.
        weighted: sum_a w_a D_a / c_a / sum_a w_a, what `objective: joint` minimises; see `maths.divergence`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    ridge: Finite | None = None
    divergence: tuple[Measure, ...]
    weighted: Finite


class Trial(BaseModel):
    """A model that a step tried.

    Attributes:
        name, ridge, weighted: see `MeasuredPoint`; `weighted` is None if it is not finite.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    ridge: Finite
    weighted: Finite | None


class PointName(BaseModel):
    """What a measured model is; see `MeasuredPoint`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    ridge: Finite | None = None


class SearchRecord(BaseModel):
    """What statistics of the form "point" say of their models, in the metadata.

    Attributes:
        points: what each model is; the first is the base.
        trials: see `Evaluation.trials`.
        unchanged: submodule -> indices, in canonical order, of the models that equal the base there, or get no weight.
        optimism: per task in canonical order, by how many nats per row the divergence of the result is too small, since
            the same rows chose it; see `maths.divergence.choice_optimism`. Empty if nothing was chosen.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    points: tuple[PointName, ...]
    trials: tuple[Trial, ...] = ()
    optimism: tuple[Finite, ...] = ()
    unchanged: dict[str, tuple[int, ...]] = {}

    @classmethod
    def of(cls, statistics: Statistics) -> SearchRecord:
        """Read the record of statistics, and check that it fits them.

        Raises:
            AlphasError: there is none, or it does not fit the statistics.
        """
        counts = {len(alphas) for alphas in statistics.by_submodule.values()}
        try:
            record = cls.model_validate_json(statistics.metadata.get(SEARCH, ""))
        except ValidationError:
            record = None
        tasks = range(1 + int(statistics.row_task.max()) if len(statistics.row_task) else 0, 1 + statistics.num_models)
        if record is None or counts != {len(record.points)} or len(record.optimism) not in (0, *tasks):
            raise AlphasError(
                "the statistics and the list of their measured models do not fit together; calibrate again",
                code="damaged-file",
            )
        return record


class TaskEvaluation(BaseModel):
    """One task.

    Attributes:
        model: its expert.
        rows: numbers of the held-out rows that were measured.
        divergence_base, divergence: of base and merge from the expert, KL(expert || model) in nats, summed over the
            answer; means over rows. The error of `divergence` includes what the choice of the merge by the same rows is
            estimated to flatter it.
        share: ratio of the two; 0 is the expert, 1 is no better than the base. None if the base equals the expert.
        loss_base, loss_expert, loss: mean loss of base, expert and merge over the answer, in nats per token.
        flags: `WORSE_THAN_BASE`, `WEAK_EXPERT`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    rows: tuple[int, ...]
    divergence_base: Measure
    divergence: Measure
    share: Measure | None
    loss_base: Measure
    loss_expert: Measure
    loss: Measure
    flags: tuple[str, ...] = ()


class Evaluation(BaseModel):
    """How good a merge is on held-out rows.

    Attributes:
        scale: the `lambda` that was used.
        points: the models that were measured and taken; the first is the base. Under `objective: joint` the starting
            points, then one for each step that was taken.
        merge: index in `points` of the merge.
        trials: what the steps tried, taken or not.
        tasks: the tasks, in the order of the file's experts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    scale: Annotated[Finite, Field(alias="lambda")] = 1.0
    points: tuple[MeasuredPoint, ...]
    merge: int
    trials: tuple[Trial, ...] = ()
    tasks: tuple[TaskEvaluation, ...]

    @model_validator(mode="after")
    def _check(self) -> Evaluation:
        if not 0 <= self.merge < len(self.points):
            raise ValueError("the evaluation's merge is none of its points")
        if any(len(point.divergence) != len(self.tasks) for point in self.points):
            raise ValueError("the evaluation's points are not for its tasks")
        return self


EVALUATION_HEADER = ("rows", "divergence", "base's div.", "share left", "loss", "base's loss", "expert's loss")
"""Columns of `evaluation_cells`."""


def evaluation_cells(task: TaskEvaluation) -> list[str]:
    """The cells of a task in a table, without its model."""
    return [
        str(len(task.rows)),
        _cell(task.divergence),
        _cell(task.divergence_base),
        percent_left(task),
        *map(_cell, (task.loss, task.loss_base, task.loss_expert)),
    ]


def percent_left(task: TaskEvaluation) -> str:
    """The share of the base's divergence that is left, with its error; "-" if the base equals the expert."""
    return "-" if task.share is None else f"{_cell(percent(task.share))}%"


FEW_ROWS = 5
"""With fewer measured rows of a task, neither the choice of the merge nor the errors can be relied on."""


def evaluation_note(evaluation: Evaluation) -> str:
    """How the evaluation was measured."""
    chosen = ", and counts that these rows chose the merge" if evaluation.merge > 1 or evaluation.trials else ""
    return f"± is one standard error over rows{chosen}; measured at lambda {evaluation.scale:g}"


def percent(share: Measure) -> Measure:
    """A share in percent."""
    return Measure(mean=100 * share.mean, stderr=share.stderr and 100 * share.stderr)


def _cell(measure: Measure) -> str:
    return f"{measure.mean:.3g}" + ("" if measure.stderr is None else f" ± {measure.stderr:.2g}")


def describe_flags(
    evaluation: Evaluation | None, name: Callable[[str], str] = show, *, fitted: bool = True
) -> list[str]:
    """Lines about a merge that is the base, about few measured rows, and about each flagged task, for a warning or a
    card. `name` formats the name of a model; `fitted` tells whether the weights are from rows."""
    if evaluation is None:
        return []
    lines = []
    if evaluation.points[evaluation.merge].name == "base":
        lines.append(
            "the merge is the base: no other model was nearer to the experts on held-out rows; give more rows, or "
            "leave an expert out"
        )
    if few := [task for task in evaluation.tasks if len(task.rows) < FEW_ROWS]:
        lines.append(
            f"{', '.join(name(task.model) for task in few)}: measured on {min(len(task.rows) for task in few)} rows: "
            "neither the choice of the merge nor the errors can be relied on; give 50 or more rows"
        )
    for task in evaluation.tasks:
        if WORSE_THAN_BASE in task.flags and WEAK_EXPERT not in task.flags and task.share is not None:
            lines.append(
                f"{name(task.model)}: the merge is worse than the base at this task: {_cell(percent(task.share))}% of "
                "the base's divergence from the expert is left on held-out rows; "
                + ("raise its `importance`, give more rows, or" if fitted else "take an objective that uses rows, or")
                + " leave an expert out"
            )
        if WEAK_EXPERT in task.flags:
            lines.append(
                f"{name(task.model)} hardly differs from the base (divergence {task.divergence_base.mean:.3g} nats per "
                "row): its task gets the mean weight of the others; is it the right checkpoint?"
            )
    return lines
