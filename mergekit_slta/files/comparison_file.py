"""The comparison file: scores of merged models, of the base and of the experts on held-out rows, row by row.

Scope: the fields of the file, reading and writing it. The format is JSON. `comparison.results` computes its `results`
and `verdict` from the rows' scores.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mergekit_slta.errors import AlphasError
from mergekit_slta.files.evaluation import Measure
from mergekit_slta.files.json_file import OTHER_VERSION, DocumentType, read_document, write_with_rows

FORMAT = "mergekit-slta/comparison"
VERSION = 1
DOCUMENT = DocumentType(
    noun="comparison file",
    article="a",
    format=FORMAT,
    version=VERSION,
    largest_bytes=256 * 2**20,
    command="mergekit-slta compare",
    remedy="name the file that `mergekit-slta compare` wrote",
)
NO_BETTER = "no_better_than_base"
"""Flag of a task: its expert's loss is not clearly below the base's, so that there is no gap to recover."""

Number = Annotated[float, Field(allow_inf_nan=False)] | None


class ComparedTask(BaseModel):
    """The rows of one task.

    Attributes:
        model, dataset: its expert, and its dataset.
        rows: numbers of the rows in the dataset.
        answer_tokens: tokens of each row's answer.
        is_short: whether a row counts for the exact answers: it has a prompt, and a short answer that is not cut.
        flags: `NO_BETTER`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    dataset: str
    rows: tuple[int, ...]
    answer_tokens: tuple[int, ...]
    is_short: tuple[bool, ...]
    flags: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> ComparedTask:
        if not len(self.rows) == len(self.answer_tokens) == len(self.is_short) > 0:
            raise ValueError("a task has no rows, or other numbers of rows and of answers")
        return self


class ScoredModel(BaseModel):
    """A model and its scores; each list has one entry for each task of the file, and in it one for each row.

    Attributes:
        name: "base", an expert's name, or the name of a method.
        kind: what the model is.
        label: the name in tables.
        settings: the merge's settings.
        fingerprint: hash of all that the scores depend on.
        losses: mean cross-entropy over the answer, in nats per token; None if it is not finite.
        divergences: KL(expert of the row's task || model) in nats, summed over the answer; None if it is not finite.
        exact: whether every token of the answer is the most likely one, given the prompt and the tokens before it.
        fitted_rows: numbers of the rows that the merge's calibration used; empty without a calibration.
        seconds: how long calibration, merge and scoring took.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Literal["base", "expert", "merge"]
    label: str
    settings: dict[str, Any] = {}
    fingerprint: str
    losses: tuple[tuple[Number, ...], ...]
    divergences: tuple[tuple[Number, ...], ...]
    exact: tuple[tuple[bool, ...], ...]
    fitted_rows: tuple[tuple[int, ...], ...] = ()
    seconds: dict[str, float] = {}


class TaskResult(BaseModel):
    """A model on one task; means over rows with their standard errors.

    Attributes:
        loss: nats per token; None if a row's loss is not finite.
        recovered: share of the gap between base and expert that the model recovers: 0 is the base, 1 the expert. None
            if there is no gap, see `NO_BETTER`.
        divergence_share: the divergence from the expert as a share of the base's; 0 is the expert, 1 the base. None if
            the base equals the expert.
        exact: share of the rows with a short answer that the model answers exactly; None without such rows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: Measure | None
    recovered: Measure | None
    divergence_share: Measure | None
    exact: Measure | None


class Difference(BaseModel):
    """How much better the best merge is than another model: a mean over tasks of differences paired by row.

    Attributes:
        mean, stderr: share of the gap; nats per token if no task has a gap.
        half_width: of the 95% interval around `mean`; None if a task has one row.
        is_level: whether the interval includes 0. True without an interval.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    stderr: float | None
    half_width: float | None
    is_level: bool


class ModelResult(BaseModel):
    """A model on all tasks.

    Attributes:
        name: see `ScoredModel`.
        tasks: in the order of the file's tasks.
        loss: mean over the tasks.
        recovered: mean over the tasks that have a gap.
        difference_from_best: None for the best merge, and for a model whose loss is not finite.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    tasks: tuple[TaskResult, ...]
    loss: Measure | None
    recovered: Measure | None
    difference_from_best: Difference | None = None


class Comparison(BaseModel):
    """A comparison file.

    Attributes:
        base_model, models: the base, and the experts in the recipe's order.
        tasks: the compared rows, in the order of `models`.
        scored: the models: the base, the experts, then the merges.
        results: the same models in the same order, summarized.
        best: name of the best merge; None if none was scored.
        verdict: which merge is best, and by how much, in one line.
        settings: `rows`, `max_seq_length`, `seed`, `compute_dtype` and the `date` that chat templates saw.
        provenance: versions, and the fingerprint of rows and models.

    Examples:
        >>> comparison = mergekit_slta.Comparison.load("compared/slta_compare.json")
        >>> comparison.best
        'average'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["mergekit-slta/comparison"] = FORMAT
    version: Literal[1] = VERSION
    base_model: str
    models: tuple[str, ...]
    tasks: tuple[ComparedTask, ...]
    scored: tuple[ScoredModel, ...]
    results: tuple[ModelResult, ...] = ()
    best: str | None = None
    verdict: str = ""
    settings: dict[str, Any]
    provenance: dict[str, Any]

    @model_validator(mode="after")
    def _check(self) -> Comparison:
        lengths = [len(task.rows) for task in self.tasks]
        for model in self.scored:
            for scores in (model.losses, model.divergences, model.exact):
                if [len(own) for own in scores] != lengths:
                    raise ValueError(f"the scores of {model.name} are not for these rows")
        if [model.name for model in self.scored] != [result.name for result in self.results]:
            raise ValueError("the results are of other models than the scores")
        if any(len(result.tasks) != len(self.tasks) for result in self.results):
            raise ValueError("the results are of other tasks")
        return self

    def of(self, name: str) -> ModelResult:
        """The result of a model.

        Raises:
            KeyError: the file has no such model.
        """
        return {result.name: result for result in self.results}[name]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file atomically.

        Raises:
            OutputError: it cannot be written.
        """
        write_with_rows(path, self.model_dump(mode="json"), "scored")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Read a comparison file.

        Raises:
            AlphasError: it is missing, unreadable, too large, or not such a file.
        """
        return read_document(path, cls, DOCUMENT)


def is_comparison_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a comparison file of any version."""
    try:
        Comparison.load(path)
    except AlphasError as error:
        return error.code == OTHER_VERSION
    return True
