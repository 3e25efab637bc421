"""Search for the weights of `objective: joint`: measure some starting points, then make Gauss-Newton steps.

Scope: which passes to make, and which merged model to take. `gradient_passes` runs the passes, `maths.gauss_newton`
computes the steps.

Every merged model is measured on held-out rows: its weighted divergence from the experts, see `maths.divergence`. The
quadratic form of a step cannot tell how far it holds, so each step is tried with several ridges, and the best is taken
if it is better than the model before. The result is the last model; it is the best starting point if all steps together
gain less than the standard error of their gain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergekit_slta.data.rows import Example
from mergekit_slta.files.evaluation import SEARCH, SearchRecord
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.job.job import Job
from mergekit_slta.job.layout import layout_of
from mergekit_slta.maths.divergence import choice_optimism, paired_error, task_scales, weighted_divergence
from mergekit_slta.maths.gauss_newton import STEPS_KEPT, gauss_newton_steps, rebase_quadratics
from mergekit_slta.maths.ridges import FAILED_FACTOR, FIRST_RIDGES, RIDGE_FACTORS
from mergekit_slta.objectives.gradient_passes import Passes, answer_tokens, row_tasks
from mergekit_slta.objectives.merging import Point
from mergekit_slta.objectives.starts import equal_models, features_point, starting_points
from mergekit_slta.recipe.objectives import JointSettings
from mergekit_slta.runner.lanes import Measured
from mergekit_slta.runner.row_losses import measured_rows
from mergekit_slta.runtime.distributed import Ranks
from mergekit_slta.runtime.progress import Progress
from mergekit_slta.runtime.resume import ResumeStore

PATIENCE = 2
"""`steps: auto` ends after so many steps in turn that together gain less than their standard error."""
CONVERGED = 1e-4
"""No step is made if less than this share of the base's divergence is left."""


@torch.no_grad()
def gather_at_experts(job: Job, resume: ResumeStore | None, ranks: Ranks) -> Statistics:
    """Compute the derivatives of every row's losses along each submodule's task vectors, at the row's expert.

    Also the losses of base and expert on the first rows of each task.

    Raises:
        DataError: an expert without rows.
        ModelError, RunError: NaN or Inf in weights or features, out of memory, or another process has ended.
        OutputError: no disk space for the activations of all layers.
    """
    own, settings = _settings(job), job.recipe.settings
    examples = job.examples()
    first = [examples[row] for row in measured_rows(examples)]
    quiet = job.options.quiet or not ranks.is_first
    with (
        job.computing(),
        Progress("rows at their experts", 1, quiet=quiet, num_layers=job.skeleton.num_layers) as progress,
        Passes(job, resume, ranks, progress) as passes,
    ):
        with job.clock.phase("steps"):
            slopes = passes.derivatives(
                "experts-", examples, None, label_samples=own.label_samples, seed=settings.seed,
                title="rows at their experts",
            )  # fmt: skip
        with job.clock.phase("measuring"):
            measured = passes.measure("losses-", first, [None], title="losses of the base")
    losses = torch.full((len(examples), 2), float("nan"), dtype=torch.float64)
    losses[measured_rows(examples)] = measured.losses_per_token(first)
    numbers: dict[tuple[int, ...], int] = {}
    row_group = torch.tensor([numbers.setdefault(example.row.ids, len(numbers)) for example in examples])
    return Statistics(
        row_tasks(examples), len(job.labels), slopes, form="slope", row_group=row_group, losses=losses
    )  # fmt: skip


@torch.no_grad()
def search(job: Job, resume: ResumeStore | None, ranks: Ranks) -> Statistics:
    """Measure the starting points, make the steps, and return all measured models.

    Without held-out rows nothing can be measured: the only model is that of `features`; `calibration.evaluate` says so.

    Args:
        job: the recipe, prepared; its objective is `joint`.
        resume: the finished layers of an earlier run; this run adds to them. None stores nothing.
        ranks: the processes that share the rows; each process gets all results.

    Raises:
        DataError, ModelError, RunError, OutputError: see `gather_at_experts`.
    """
    features, changed = features_point(job, resume, ranks)
    held_out = job.held_out_examples()
    if not held_out:
        found = _Found(job, held_out)
        found.names, found.points = [{"name": "features"}], [features]
        found.divergences, found.losses = (torch.zeros((0, width), dtype=torch.float64) for width in (1, 2))
        return found.statistics(changed)
    quiet = job.options.quiet or not ranks.is_first
    with (
        job.computing(),
        Progress("starting points", 1, quiet=quiet, num_layers=job.skeleton.num_layers) as progress,
        Passes(job, resume, ranks, progress) as passes,
    ):
        return _Search(job, passes, progress, held_out, features, changed).run()


class _Found:
    """The models that were measured on the held-out rows and taken: starting points, and one model for each step that
    was taken.

    Attributes:
        names: name and ridge of each.
        points: their alphas.
        divergences, losses: [rows, P] and [rows, P + 1] float64, see `Statistics`.
        trials: name, ridge and weighted divergence of every model that a step tried.
        optimism: [T] float64, see `SearchRecord`.
    """

    def __init__(self, job: Job, held_out: Sequence[Example]) -> None:
        self._job, self._held_out = job, held_out
        self.task = row_tasks(held_out)
        self.names: list[dict[str, object]] = []
        self.points: list[Point] = []
        self.divergences = torch.zeros((len(held_out), 0), dtype=torch.float64)
        self.losses = torch.zeros((len(held_out), 1), dtype=torch.float64)
        self.optimism = torch.zeros(len(job.experts), dtype=torch.float64)
        self.trials: list[dict[str, object]] = []

    def add(self, name: dict[str, object], point: Point, measured: Measured, column: int) -> None:
        """Add a model: column `column` of what was measured."""
        losses = measured.losses_per_token(self._held_out)
        self.names.append(name)
        self.points.append(point)
        self.divergences = torch.cat([self.divergences, measured.divergences[:, [column]]], dim=1)
        self.losses = torch.cat([self.losses[:, :-1], losses[:, [column, -1]]], dim=1)

    def keep_starts(self) -> None:
        """Forget the models of the steps."""
        count = sum("ridge" not in name for name in self.names)
        self.names, self.points = self.names[:count], self.points[:count]
        self.divergences = self.divergences[:, :count]
        self.losses = self.losses[:, [*range(count), -1]]

    def statistics(self, changed: Mapping[str, Tensor]) -> Statistics:
        """All models, with alpha 0 where an expert equals the base.

        Args:
            changed: submodule -> [K] bool, where a row has shown a change; a submodule that is not there counts as
                changed. What no row has shown is looked up in the weights: tokens that are in no row may have changed.
        """
        names = [submodule.name for submodule in self._job.submodules]
        stacked = {name: torch.stack([point[name] for point in self.points]) for name in names}  # [P, K]
        equal = dict(equal_models(self._job, changed))
        for name, places in equal.items():
            stacked[name][:, places] = 0
        record = SearchRecord(
            points=self.names, trials=self.trials, unchanged=equal, optimism=self.optimism.clamp(min=0).tolist()
        )
        return Statistics(
            self.task, len(self._job.labels), stacked, form="point", divergences=self.divergences, losses=self.losses,
            tokens=answer_tokens(self._held_out), metadata={SEARCH: record.model_dump_json()},
        )  # fmt: skip


@dataclass
class _Quadratics:
    """The quadratic forms of all rows so far, at one point.

    Attributes:
        point: the point.
        slopes: submodule -> [rows, 1 + S, K], see `gauss_newton_steps`.
        task, step: [rows] int64, task of each row, and the step that added it.
    """

    point: Point = field(default_factory=dict)
    slopes: dict[str, Tensor] = field(default_factory=dict)
    task: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    step: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def add(self, step: int, point: Point, task: Tensor, slopes: dict[str, Tensor]) -> None:
        """Move to `point`, and add rows whose forms were taken there."""
        if self.slopes:
            kept = self.step > step - STEPS_KEPT
            self.task, self.step = self.task[kept], self.step[kept]
            moved = rebase_quadratics(point, {name: part[kept] for name, part in self.slopes.items()}, self.point)
            slopes = {name: torch.cat([moved[name], part]) for name, part in slopes.items()}
        self.point, self.slopes = point, slopes
        self.task = torch.cat([self.task, task])
        self.step = torch.cat([self.step, torch.full_like(task, step)])


class _Search:
    """The search of a job that has held-out rows."""

    def __init__(
        self,
        job: Job,
        passes: Passes,
        progress: Progress,
        held_out: Sequence[Example],
        features: Point,
        changed: Mapping[str, Tensor],
    ) -> None:
        self._job, self._passes, self._held_out, self._changed = job, passes, held_out, changed
        self._say = progress.say
        self._settings = job.recipe.settings
        self._importance = layout_of(job).importance
        start = starting_points(job, features)
        with job.clock.phase("measuring"):
            measured = passes.measure(
                "start-", held_out, [None, *list(start.values())[1:]], title=f"measuring {len(start)} starting points"
            )
        self._found = _Found(job, held_out)
        for column, (name, point) in enumerate(start.items()):
            if measured.is_finite[column]:
                self._found.add({"name": name}, point, measured, column)
        self._scales, _ = task_scales(
            measured.divergences[:, 0],
            self._found.task,
            len(job.experts),
            tokens=answer_tokens(held_out),
            balance=self._settings.balance,
        )

    def run(self) -> Statistics:
        """Make the steps; returns the models that were taken."""
        own, found, quadratics = _settings(self._job), self._found, _Quadratics()
        given = self._settings.ridge
        ridges = FIRST_RIDGES if given is None else (given,)
        path = [int(self._weighted(found.divergences.T).argmin())]  # the model before each step, then the last one
        self._count_choice(found.divergences)
        self._report("starting point", found.names[path[0]]["name"])
        for step in range(1, own.max_steps + 1):
            point, before = found.points[path[-1]], found.divergences[:, path[-1]]
            if self._weighted(before) <= CONVERGED * self._weighted(found.divergences[:, 0]):
                break
            examples = self._job.examples(step - 1)
            title = f"step {step} of {'at most ' * (own.steps == 'auto')}{own.max_steps}"
            with self._job.clock.phase("steps"):
                slopes = self._passes.derivatives(
                    f"step-{step}-", examples, point, label_samples=own.label_samples, seed=self._settings.seed + step,
                    title=title,
                )  # fmt: skip
                quadratics.add(step, point, row_tasks(examples), slopes)
                trials = gauss_newton_steps(
                    quadratics.slopes, quadratics.task, point, self._scales, ridges=ridges, row_step=quadratics.step,
                    importance=self._importance,
                )  # fmt: skip
            with self._job.clock.phase("measuring"):
                measured = self._passes.measure(
                    f"trials-{step}-", self._held_out, trials, title=f"{title}, measuring {len(trials)} tries"
                )
            finite = torch.tensor(measured.is_finite)
            values = self._weighted(measured.divergences.T).masked_fill(~finite, torch.inf)
            new, name = int(values.argmin()), f"step {step}"
            found.trials += [
                {"name": name, "ridge": ridge, "weighted": value if math.isfinite(value) else None}
                for ridge, value in zip(ridges, values.tolist(), strict=True)
            ]
            is_taken = values[new] < self._weighted(before)
            if is_taken:
                found.add({"name": name, "ridge": ridges[new]}, trials[new], measured, new)
                self._report(name, f"ridge {ridges[new]:.3g}")
            else:
                self._say(f"{name} is not taken: it makes the merge worse on held-out rows")
            path.append(len(found.points) - 1 if is_taken else path[-1])
            self._count_choice(torch.cat([before[:, None], measured.divergences[:, finite]], dim=1))
            if given is None:
                factors, center = (RIDGE_FACTORS, ridges[new]) if is_taken else (ridges, FAILED_FACTOR)
                ridges = tuple(factor * center for factor in factors)
            if own.steps == "auto" and step >= PATIENCE and not self._gains(path[-1 - PATIENCE], path[-1]):
                break
        if path[-1] != path[0] and not self._gains(path[0], path[-1]):
            self._say("The steps gain less than their standard error on held-out rows: none of them is taken")
            found.keep_starts()
        changed = {name: (part != 0).flatten(0, 1).any(0) for name, part in quadratics.slopes.items()}
        return found.statistics(changed or self._changed)

    def _weighted(self, divergences: Tensor) -> Tensor:
        return weighted_divergence(divergences, self._found.task, self._scales, self._importance)

    def _count_choice(self, divergences: Tensor) -> None:
        """Add what the choice among some models, [rows, C], is estimated to flatter the result."""
        found = self._found
        found.optimism += choice_optimism(divergences, found.task, self._scales, self._importance)

    def _gains(self, first: int, last: int) -> bool:
        """Whether a model is better than another by more than the standard error of the difference."""
        difference = self._found.divergences[:, first] - self._found.divergences[:, last]
        error = paired_error(difference, self._found.task, self._scales, self._importance)
        return float(self._weighted(difference)) > error

    def _report(self, name: str, how: object) -> None:
        values = self._weighted(self._found.divergences.T)
        self._say(
            f"{name}: {float(values.min() / values[0]):.1%} of the base's divergence is left on held-out rows ({how})"
        )


def _settings(job: Job) -> JointSettings:
    own = job.recipe.settings.own
    assert isinstance(own, JointSettings)
    return own
