"""Gather the statistics of `objective: joint`: a pass through the experts, then one through a merged model per step.

Scope: the sequence of passes. `runner.backward` computes a pass, `objectives.solving` the alphas of the next model.
The statistics are the derivatives of the last pass; earlier passes are only needed to get the model of the last one.
If every step has its own rows, the derivatives of earlier rows are kept, too, and rebased to the last model.
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

from mergekit_slta.checkpoints.tensors import Weights
from mergekit_slta.files.alphas_file import weights_by_tensor
from mergekit_slta.files.statistics_file import Statistics
from mergekit_slta.job.job import Job
from mergekit_slta.job.layout import layout_of
from mergekit_slta.maths.gauss_newton import rebase_quadratics
from mergekit_slta.objectives.merging import merge_with
from mergekit_slta.objectives.solving import solve_together
from mergekit_slta.recipe.objectives import JointSettings
from mergekit_slta.runner.backward import DIVERGENCE, BackwardPass, backward_layers
from mergekit_slta.runner.row_losses import measured_rows
from mergekit_slta.runtime.activations import ActivationStore, activation_bytes
from mergekit_slta.runtime.distributed import Ranks
from mergekit_slta.runtime.progress import Progress
from mergekit_slta.runtime.resume import ResumeStore

LOG = logging.getLogger(__name__)
ACTIVATIONS_IN_MEMORY = 2**28
"""Without a resume store, activations up to this size in bytes stay in memory; larger ones go to a temporary file."""
NEW_ROWS_TOLERANCE = 1.25
"""With new rows in each step, warn if the remaining divergence is this many times that of the rows before. A smaller
increase may come from the difference between rows."""
_TEACHERS, _BASE, _LOSSES = "teachers", "base", "losses"


@torch.no_grad()
def gather_derivatives(job: Job, *, resume: ResumeStore | None, ranks: Ranks) -> Statistics:
    """Compute the derivatives of every row's losses along each submodule's task vectors.

    Args:
        job: the recipe, prepared; its objective is `joint`.
        resume: the finished layers of an earlier run; this run adds to them. None stores nothing.
        ranks: the processes that share the rows; each process gets all derivatives.

    Returns:
        Derivatives at the experts; with `steps`, those of the last step, with its point and its divergences. If every
        step has its own rows, also those of the earlier steps, rebased to that point. And the losses of base and expert
        on all rows; without `steps` on the first rows of each task.

    Raises:
        DataError: an expert without rows.
        ModelError, RunError: NaN or Inf in weights or features, out of memory, or another process has ended.
        OutputError: no disk space for the activations of all layers.
    """
    passes = _Passes(job, resume, ranks)
    steps, groups = passes.settings.steps, passes.settings.row_groups
    total = len(passes.layers) * (1 + steps) + groups + (groups - 1)
    quiet = job.options.quiet or not ranks.is_first
    with job.advice_on_memory(), Progress("Calibrating", total, quiet=quiet) as progress:
        passes.progress = progress
        statistics = passes.at_experts()
        if not steps:
            statistics.losses = passes.losses_of_first_rows()
        for number in range(1, steps + 1):
            if number > 1 and groups > 1:
                passes.take_rows(number - 1)
            if number == 1 or groups > 1:
                base, losses = passes.at_base()
            statistics = passes.at_merged(number, statistics, base, losses)
    return statistics


class _Passes:
    """Runs the passes of a job over the current group of rows. Passes in the resume store are loaded, not run."""

    def __init__(self, job: Job, resume: ResumeStore | None, ranks: Ranks) -> None:
        self._job, self._ranks = job, ranks
        self._resume = resume if ranks.size == 1 else None
        own = job.recipe.settings.own
        assert isinstance(own, JointSettings)
        self.settings = own
        self._checkpoints = job.checkpoints()
        self._layout = layout_of(job)
        self.progress: Progress
        self._use_rows(0)

    def _use_rows(self, group: int) -> None:
        """Set the current group of rows."""
        self._rows = self._job.examples(group)
        self._places = self._ranks.share([len(row.row.ids) for row in self._rows])
        self._own_rows = [self._rows[place] for place in self._places]
        self._row_task = torch.tensor([example.task for example in self._rows], dtype=torch.int64, device="cpu")
        self._teachers: list[Tensor] = []
        self._prefix = f"{group}-" if group else ""  # prefix of these rows' keys in the resume store

    @property
    def layers(self) -> list[str]:
        """Names of a backward pass's layers, including the head and the embeddings."""
        return backward_layers(self._job.skeleton)

    def at_experts(self) -> Statistics:
        """Run every row through its own expert. Its outputs are the teacher of later passes."""
        settings = self.settings
        known = self._is_recorded(_TEACHERS)
        derivatives, _ = self._pass("", max(1, settings.label_samples), self._seed, self._keep_teachers, done=known)
        if known:
            self._load_teachers()
        return Statistics(self._row_task, len(self._job.plan.models) - 1, derivatives, form="slope")

    def take_rows(self, group: int) -> None:
        """Set the current group of rows, and compute their experts' outputs as the teacher."""
        self._use_rows(group)
        if self._is_recorded(_TEACHERS):
            self._load_teachers()
            self._forget(f"{self._prefix}experts-")
        elif self._own_rows:
            self.progress.announce("experts")
            with self._activations(f"{self._prefix}experts-", 2, 0) as store:
                backward = self._backward(store, self._seed)
                backward.forward()
                self._keep_teachers(backward)
        self.progress.advance(1)

    def losses_of_first_rows(self) -> Tensor:
        """Losses as from `at_base`, but only of each task's first rows, NaN for others; no other pass can follow."""
        chosen = measured_rows(self._rows)
        kept = [index for index, place in enumerate(self._places) if place in chosen]
        self._places = [self._places[index] for index in kept]
        self._own_rows = [self._own_rows[index] for index in kept]
        self._teachers = [self._teachers[index] for index in kept]
        losses = torch.full((len(self._rows), 2), float("nan"), dtype=torch.float64)
        losses[chosen] = self.at_base()[1][chosen]
        return losses

    @property
    def _seed(self) -> int:
        return self._job.recipe.settings.seed

    def _keep_teachers(self, backward: BackwardPass) -> None:
        """Keep the outputs of a pass through the experts as the teachers, also in the resume store."""
        self._teachers = backward.completion_features()
        if self._resume is not None:
            flat = torch.cat(self._teachers) if self._teachers else torch.zeros(0)
            self._resume.put(self._prefix + _TEACHERS, {_TEACHERS: flat})

    def _load_teachers(self) -> None:
        lengths = [len(example.row.ids) - example.row.completion for example in self._own_rows]
        if self._resume is not None:
            self._teachers = list(self._resume.get(self._prefix + _TEACHERS)[_TEACHERS].split(lengths))

    def _is_recorded(self, what: str) -> bool:
        """Whether the resume store has the part `what` for the current rows."""
        return self._resume is not None and self._prefix + what in self._resume.finished

    def at_base(self) -> tuple[Tensor, Tensor]:
        """Run every row through the base, whose divergence from the experts is what a merge can remove.

        Returns:
            [rows] float64, KL(expert || base) in nats; [rows, 2] float64, the losses of base and expert, see
            `HeadLoss.losses`. Both are 0 for rows that are left out.
        """
        divergences = torch.zeros(len(self._rows), dtype=torch.float64)
        losses = torch.zeros((len(self._rows), 2), dtype=torch.float64)
        label = f"{self._prefix}{_BASE}-"
        if self._resume is not None and self._is_recorded(_BASE):
            found = self._resume.get(self._prefix + _BASE)
            divergences[self._places], losses[self._places] = found[DIVERGENCE], found[_LOSSES]
            self._forget(label)
        elif self._own_rows:
            self.progress.announce("base")
            with self._activations(label, 2, 0) as store:
                backward = self._backward(store, self._seed, at="base", teachers=self._teachers)
                divergences[self._places], losses[self._places] = backward.divergences()
            found = {DIVERGENCE: divergences[self._places], _LOSSES: losses[self._places]}
            self._put(self._prefix + _BASE, found)
        self.progress.advance(1)
        self._ranks.all_reduce_(divergences)
        self._ranks.all_reduce_(losses)
        return divergences, losses

    def at_merged(self, number: int, before: Statistics, base: Tensor, losses: Tensor) -> Statistics:
        """Solve the statistics `before`, and run the current rows through the merged model; rebase earlier rows to it.

        Args:
            number: number of the step, from 1.
            before: statistics of the pass before.
            base, losses: [rows] and [rows, 2] float64, from `at_base`.
        """
        settings = self.settings
        entries = solve_together(before, self._layout, with_evidence=False).entries
        slices, models = weights_by_tensor(entries), self._layout.models
        columns = [models.index(name) for name in self._layout.canonical]
        merge_group = merge_with(self._job, models, lambda _: slices)

        def merge(weights: Sequence[Weights]) -> Weights:
            return merge_group([], weights)

        derivatives, divergence = self._pass(
            f"step-{number}-", settings.label_samples + 1, self._seed + number, at=merge, teachers=self._teachers
        )
        divergences = torch.stack([base, divergence], dim=1)
        report_divergence(number, before, divergences)
        point = {
            entry.name: torch.tensor([entry.alpha[column] for column in columns], dtype=torch.float64)
            for entry in entries
        }
        found = Statistics(
            self._row_task, before.num_models, derivatives, form="step", point=point, divergences=divergences,
            losses=losses,
        )  # fmt: skip
        if settings.row_groups == 1:
            return found
        found.row_step = torch.full_like(self._row_task, number)
        if before.divergences is None:
            return found
        moved, other = rebase_quadratics(point, before.by_submodule, before.point, before.divergences)
        return Statistics.join([replace(before, by_submodule=moved, point=point, divergences=other), found])

    def _pass(
        self, label: str, draws: int, seed: int, then: Callable[[BackwardPass], None] | None = None, *,
        done: bool = True, **where: Any,
    ) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
        """Run one pass: submodule -> [rows, draws, T] derivatives, and [rows] divergences (zeros without teachers).

        Args:
            label: prefix of its keys in the resume store.
            draws: number of derivatives per row.
            seed: seed of the sampled labels.
            then: called at the end of the pass, before its activations are removed.
            done: whether `then` has already run, in an earlier run.
            where: further arguments of `BackwardPass`.
        """
        experts = len(self._job.plan.models) - 1
        shape = (len(self._rows), draws, experts)
        derivatives = {submodule.name: torch.zeros(shape, dtype=torch.float64) for submodule in self._job.submodules}
        divergence = torch.zeros(len(self._rows), dtype=torch.float64)

        def add(found: Mapping[str, Tensor]) -> None:
            for name, part in found.items():
                (divergence if name == DIVERGENCE else derivatives[name])[self._places] += part

        finished = self._resume.finished if self._resume is not None else frozenset()
        labels = [label + layer for layer in self.layers]
        if self._resume is not None and done and finished.issuperset(labels):
            for layer in labels:
                add(self._resume.get(layer))
            self._forget(label)
            self.progress.advance(len(labels))
        elif self._own_rows:
            with self._activations(label, self._job.skeleton.num_layers + 1, draws) as store:
                if not finished.issuperset(labels[: store.layers_done]):
                    store.rewind()  # a stored layer was damaged: restart the backward pass
                for layer in labels[: store.layers_done]:
                    add(self._resume.get(layer) if self._resume is not None else {})
                self.progress.advance(store.layers_done)
                backward = self._backward(store, seed, **where)
                for layer, found in backward.run():
                    add(found)
                    self._put(label + layer, found)
                    self.progress.advance(1)
                if then is not None:
                    then(backward)
        for part in (*derivatives.values(), divergence):
            self._ranks.all_reduce_(part)
        return derivatives, divergence

    def _backward(self, store: ActivationStore, seed: int, **where: Any) -> BackwardPass:
        job = self._job
        return BackwardPass(
            job.skeleton, self._checkpoints, job.submodules, self._own_rows,
            label_samples=self.settings.label_samples, seed=seed, store=store, announce=self.progress.announce, **where,
        )  # fmt: skip

    def _put(self, layer: str, found: Mapping[str, Tensor]) -> None:
        if self._resume is not None:
            self._resume.put(layer, found)

    @contextmanager
    def _activations(self, label: str, num_depths: int, draws: int) -> Iterator[ActivationStore]:
        """Make a pass's activation store: in the resume store's folder, else in memory or in a temporary file."""
        lengths = [len(example.row.ids) for example in self._own_rows]
        width, dtype = int(self._job.skeleton.config.hidden_size), self._job.dtype
        with ExitStack() as stack:
            folder = None
            if self._resume is not None:
                folder = self._resume.activations_folder(label)
            elif activation_bytes(sum(lengths), num_depths, draws, width, dtype) > ACTIVATIONS_IN_MEMORY:
                folder = Path(stack.enter_context(TemporaryDirectory(prefix="mergekit-slta-")))
            yield ActivationStore(lengths, num_depths, draws, width, dtype, folder)
        self._forget(label)

    def _forget(self, label: str) -> None:
        """Remove a pass's activations, after all its derivatives are stored."""
        if self._resume is not None:
            shutil.rmtree(self._resume.activations_folder(label), ignore_errors=True)


def report_divergence(number: int, before: Statistics, divergences: Tensor) -> None:
    """Log the divergence from the experts before a step, and warn if the step before has increased it.

    Args:
        number: number of the step, from 1.
        before: the statistics from which the step before was solved.
        divergences: [rows, 2] float64, KL(expert || model) in nats of the base and of the merged model.
    """
    left = (divergences[:, 1].sum() / divergences[:, 0].sum()).item()
    LOG.info("before step %d, %.1f%% of the base's divergence from the experts is left", number, 100 * left)
    if before.divergences is None:
        return
    has_new_rows = before.row_step is not None
    if has_new_rows and number == 2:  # the solve at the experts was fitted to the first rows
        return
    newest = before.divergences[before.row_step == before.row_step.max()] if has_new_rows else before.divergences
    earlier = (newest[:, 1].sum() / newest[:, 0].sum()).item()
    if left > earlier * (NEW_ROWS_TOLERANCE if has_new_rows else 1):
        LOG.warning(
            "step %d increased the divergence from the experts from %.1f%% of the base's to %.1f%%: "
            "set a larger `ridge`, more `num_samples`, a coarser `granularity`, or fewer `steps`",
            number - 1, 100 * earlier, 100 * left,
        )  # fmt: skip
