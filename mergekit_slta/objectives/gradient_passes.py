"""The passes behind `objective: joint`: at every expert, then at what has been merged so far.

Scope: which passes there are, and what each begins with; one pass is `gradients.py`'s, one solve `assembly.py`'s. Only
the last pass's slopes are kept as the statistics: those before it are what its point was solved from. Where every step
has rows of its own, they stay, moved to the last point, since they are of other rows.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from mergekit_slta.checkpoints.tensors import Checkpoints, Weights
from mergekit_slta.files.alphas_file import weights_by_tensor
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.job.preflight import Job, check_rows
from mergekit_slta.job.solve import layout_of, solve_together
from mergekit_slta.maths.gauss_newton import rebase_quadratics
from mergekit_slta.objectives.features import merge_with
from mergekit_slta.runner.backward import DIVERGENCE, Backward, Example, stages_of
from mergekit_slta.runtime.activations import ActivationStore, activation_bytes
from mergekit_slta.runtime.distributed import Ranks
from mergekit_slta.runtime.progress import Progress
from mergekit_slta.runtime.resume import ResumeStore

LOG = logging.getLogger(__name__)
ACTIVATIONS_IN_MEMORY = 2**28
"""Bytes of features that a backward pass keeps in memory; more go to a temporary file where no other is at hand."""
NEW_ROWS_TOLERANCE = 1.25
"""How much more of the divergence other rows may show before it is put down to the step."""
_TEACHERS, _BASE = "teachers", "base"


def examples_of(job: Job, group: int = 0) -> list[Example]:
    """The calibration rows with their answers marked, in the canonical order of the experts.

    Args:
        job: the recipe, prepared.
        group: which of the `row_groups` parts of each task's rows.

    Raises:
        DataError: an expert without rows.
    """
    check_rows(job.rows, [job.recipe.names[task.model] for task in job.recipe.tasks])
    by_model = {task.model: drawn for task, drawn in zip(job.recipe.tasks, job.rows, strict=True)}
    groups = job.recipe.settings.row_groups
    found = []
    for index, model in enumerate(job.plan.models[1:]):
        rows = by_model[model].part(group, groups)  # type: ignore[union-attr] - check_rows
        found += [Example(row.ids, row.completion, index, row.number) for row in rows]
    return found


@torch.no_grad()
def gather_slopes(job: Job, *, records: ResumeStore | None, ranks: Ranks) -> Statistics:
    """Feed every row forward and back, and keep what each submodule's change does to its loss.

    Args:
        job, records, ranks: as in `gathering.gather`.

    Returns:
        Slopes at the experts; with `steps`, those of the last step, its point and the divergences there. Where every
        step has rows of its own, also those of the steps before it, moved to that point.

    Raises:
        DataError, ModelError, RunError: as in `gathering.gather`.
        OutputError: no room for the features of all layers.
    """
    settings = job.recipe.settings
    steps, groups = settings.steps, settings.row_groups
    passes = _Passes(job, records, ranks)
    total = len(passes.stages) * (1 + steps) + groups * (steps > 0) + (groups - 1)
    quiet = job.options.quiet or not ranks.is_first
    with job.advice_on_memory(), Progress("Calibrating", total, quiet=quiet) as progress:
        passes.progress = progress
        statistics = passes.at_experts()
        for number in range(1, steps + 1):
            if number > 1 and groups > 1:
                passes.take_rows(number - 1)
            if number == 1 or groups > 1:
                base = passes.at_base()
            statistics = passes.at_merged(number, statistics, base)
    return statistics


class _Passes:
    """The passes of one job, each from its records where these are whole, over the group of rows that it is at."""

    def __init__(self, job: Job, records: ResumeStore | None, ranks: Ranks) -> None:
        self._job, self._ranks = job, ranks
        self._records = records if ranks.size == 1 else None
        self._checkpoints = Checkpoints(job.plan, job.recipe.names, job.device, job.dtype, job.tokenizer)
        self._layout = layout_of(job)
        self.progress: Progress
        self._begin(0)

    def _begin(self, group: int) -> None:
        self._examples = examples_of(self._job, group)
        self._own = self._ranks.share([len(example.ids) for example in self._examples])
        self._mine = [self._examples[row] for row in self._own]
        self._row_task = torch.tensor([example.task for example in self._examples], dtype=torch.int64, device="cpu")
        self._teachers: list[Tensor] = []
        self._mark = f"{group}-" if group else ""  # of what is recorded of these rows before the step itself

    @property
    def stages(self) -> list[str]:
        """Names of a pass's steps."""
        return stages_of(self._job.skeleton)

    def at_experts(self) -> Statistics:
        """Every row at its own expert, whose answers are kept as the later passes' teacher."""
        settings = self._job.recipe.settings
        known = self._know(_TEACHERS)
        slopes, _ = self._pass(
            "", max(1, settings.label_samples), settings.seed, self._teach if settings.steps else None,
            done=known or not settings.steps,
        )  # fmt: skip
        if known and settings.steps:
            self._remember_teachers()
        return Statistics(self._row_task, len(self._job.plan.models) - 1, slopes, form="slope")

    def take_rows(self, group: int) -> None:
        """Go over to other rows; their answers at their experts are the teacher from now on."""
        self._begin(group)
        if self._know(_TEACHERS):
            self._remember_teachers()
            self._forget(f"{self._mark}experts-")
        elif self._mine:
            self.progress.announce("experts")
            with self._tape(f"{self._mark}experts-", 2, 0) as tape:
                backward = self._backward(tape, self._job.recipe.settings.seed)
                backward.forward()
                self._teach(backward)
        self.progress.advance(1)

    def _teach(self, backward: Backward) -> None:
        """Keep what a pass at the experts has brought."""
        self._teachers = backward.completion_features()
        if self._records is not None:
            flat = torch.cat(self._teachers) if self._teachers else torch.zeros(0)
            self._records.put(self._mark + _TEACHERS, {_TEACHERS: flat})

    def _remember_teachers(self) -> None:
        lengths = [len(example.ids) - example.completion for example in self._mine]
        if self._records is not None:
            self._teachers = list(self._records.get(self._mark + _TEACHERS)[_TEACHERS].split(lengths))

    def _know(self, what: str) -> bool:
        """Whether there is a record of it for these rows."""
        return self._records is not None and self._mark + what in self._records.finished

    def at_base(self) -> Tensor:
        """[rows] every row's KL(expert || base), the measure of what there is to keep."""
        found = torch.zeros(len(self._examples), dtype=torch.float64)
        label = f"{self._mark}{_BASE}-"
        if self._records is not None and self._know(_BASE):
            found[self._own] = self._records.get(self._mark + _BASE)[DIVERGENCE]
            self._forget(label)
        elif self._mine:
            self.progress.announce("base")
            with self._tape(label, 2, 0) as tape:
                backward = self._backward(tape, self._job.recipe.settings.seed, at="base", teachers=self._teachers)
                found[self._own] = backward.divergences()
            self._put(self._mark + _BASE, {DIVERGENCE: found[self._own]})
        self.progress.advance(1)
        self._ranks.all_reduce_(found)
        return found

    def at_merged(self, number: int, before: Statistics, base: Tensor) -> Statistics:
        """All rows at the model that the statistics `before` say to merge; other rows' are kept, moved there."""
        settings = self._job.recipe.settings
        entries, _ = solve_together(
            before, self._layout, importance=[task.importance for task in self._job.recipe.tasks],
            balance=settings.balance, ridge=settings.ridge,
        )  # fmt: skip
        pieces, models = weights_by_tensor(entries), self._layout["models"]
        columns = [models.index(name) for name in self._layout["canonical"]]
        merge_step = merge_with(self._job, models, lambda _: pieces)

        def merge(weights: Sequence[Weights]) -> Weights:
            return merge_step([], weights)

        slopes, divergence = self._pass(
            f"step-{number}-", settings.label_samples + 1, settings.seed + number, at=merge, teachers=self._teachers
        )
        divergences = torch.stack([base, divergence], dim=1)
        self._say(number, before, divergences)
        point = {
            entry.name: torch.tensor([entry.alpha[column] for column in columns], dtype=torch.float64)
            for entry in entries
        }
        found = Statistics(
            self._row_task, before.num_models, slopes, form="step", point=point, divergences=divergences
        )  # fmt: skip
        if settings.row_groups == 1:
            return found
        found.row_step = torch.full_like(self._row_task, number)
        if before.divergences is None:
            return found
        moved, other = rebase_quadratics(point, before.by_submodule, before.point, before.divergences)
        return Statistics.join([replace(before, by_submodule=moved, point=point, divergences=other), found])

    def _say(self, number: int, before: Statistics, divergences: Tensor) -> None:
        """How far the point of a step is from the experts; a warning where the step before has led away from them."""
        left = (divergences[:, 1].sum() / divergences[:, 0].sum()).item()
        LOG.info("before step %d, %.1f%% of the base's divergence from the experts is left", number, 100 * left)
        if before.divergences is None:
            return
        of_others = before.row_step is not None
        if of_others and number == 2:  # the first rows are those that the solve at the experts has fitted
            return
        seen = before.divergences[before.row_step == before.row_step.max()] if of_others else before.divergences
        earlier = (seen[:, 1].sum() / seen[:, 0].sum()).item()
        if left > earlier * (NEW_ROWS_TOLERANCE if of_others else 1):
            LOG.warning(
                "step %d has led away from the experts: %.1f%% of the base's divergence was left, then %.1f%%; "
                "set a larger `ridge`, more `num_samples`, a coarser `granularity`, or fewer `steps`",
                number - 1, 100 * earlier, 100 * left,
            )  # fmt: skip

    def _pass(
        self, label: str, draws: int, seed: int, behind: Callable[[Backward], None] | None = None, *, done: bool = True,
        **where: Any,
    ) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
        """One pass: submodule -> [rows, draws, T], and [rows] divergences (zeros where nobody asks for them).

        Args:
            label: of its records.
            draws: slopes per row.
            seed: of the draws of labels.
            behind: called when it is through, with its features still there.
            done: whether that has been, in a run that goes on.
            where: its arguments.
        """
        experts = len(self._job.plan.models) - 1
        shape = (len(self._examples), draws, experts)
        slopes = {submodule.name: torch.zeros(shape, dtype=torch.float64) for submodule in self._job.submodules}
        divergence = torch.zeros(len(self._examples), dtype=torch.float64)

        def add(found: Mapping[str, Tensor]) -> None:
            for name, part in found.items():
                (divergence if name == DIVERGENCE else slopes[name])[self._own] += part

        kept = self._records.finished if self._records is not None else frozenset()
        labels = [label + stage for stage in self.stages]
        if self._records is not None and done and kept.issuperset(labels):
            for stage in labels:
                add(self._records.get(stage))
            self._forget(label)
            self.progress.advance(len(labels))
        elif self._mine:
            with self._tape(label, self._job.skeleton.num_layers + 1, draws) as tape:
                if not kept.issuperset(labels[: tape.layers_done]):
                    tape.rewind()  # a record was damaged: from the loss again, the features are there
                for stage in labels[: tape.layers_done]:
                    add(self._records.get(stage) if self._records is not None else {})
                self.progress.advance(tape.layers_done)
                backward = self._backward(tape, seed, **where)
                for stage, found in backward.run():
                    add(found)
                    self._put(label + stage, found)
                    self.progress.advance(1)
                if behind is not None:
                    behind(backward)
        for part in (*slopes.values(), divergence):
            self._ranks.all_reduce_(part)
        return slopes, divergence

    def _backward(self, tape: ActivationStore, seed: int, **where: Any) -> Backward:
        job = self._job
        return Backward(
            job.skeleton, self._checkpoints, job.submodules, self._mine, samples=job.recipe.settings.label_samples,
            seed=seed, tape=tape, announce=self.progress.announce, **where,
        )  # fmt: skip

    def _put(self, stage: str, found: Mapping[str, Tensor]) -> None:
        if self._records is not None:
            self._records.put(stage, found)

    @contextmanager
    def _tape(self, label: str, levels: int, draws: int) -> Iterator[ActivationStore]:
        """Where a pass's features are kept: with the records of unfinished work, else in memory while they are few."""
        lengths = [len(example.ids) for example in self._mine]
        width, dtype = int(self._job.skeleton.config.hidden_size), self._job.dtype
        with ExitStack() as stack:
            folder = None
            if self._records is not None:
                folder = self._records.activations_folder(label)
            elif activation_bytes(sum(lengths), levels, draws, width, dtype) > ACTIVATIONS_IN_MEMORY:
                folder = Path(stack.enter_context(TemporaryDirectory(prefix="mergekit-slta-")))
            yield ActivationStore(lengths, levels, draws, width, dtype, folder)
        self._forget(label)

    def _forget(self, label: str) -> None:
        """All that a pass has found is in the records: its features go."""
        if self._records is not None:
            shutil.rmtree(self._records.activations_folder(label), ignore_errors=True)
