"""The passes of `objective: joint` over some rows: derivatives at the experts or at a merged model, and measurements.

Scope: one pass at a time, in one process or several; resumes a killed run. `joint_search` decides which passes to make.
A finished pass is loaded from the resume store, not run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

from mergekit_slta.data.batches import GRADIENT_TOKENS, Batch, plan_task_batches
from mergekit_slta.data.rows import Example
from mergekit_slta.job.job import Job
from mergekit_slta.job.layout import layout_of
from mergekit_slta.objectives.merging import Point, merge_at
from mergekit_slta.runner.backward import BackwardPass, backward_layers
from mergekit_slta.runner.lanes import Lanes, Measured
from mergekit_slta.runner.part_derivatives import Part
from mergekit_slta.runner.row_weights import MergeWeights
from mergekit_slta.runtime.activations import ActivationStore, activation_bytes
from mergekit_slta.runtime.devices import trim_heap
from mergekit_slta.runtime.distributed import Ranks
from mergekit_slta.runtime.progress import Progress
from mergekit_slta.runtime.resume import ResumeStore

ACTIVATIONS_IN_MEMORY = 2**28
"""Without a resume store, activations up to this size in bytes stay in memory; larger ones go to a temporary file."""
_MEASURED, _TEACHERS = "measured", "teachers-"


class Passes:
    """Runs the passes of a job; a context manager.

    Args:
        job: the recipe, prepared.
        resume: the finished layers of an earlier run; this run adds to them. None stores nothing.
        ranks: the processes that share the rows; each process gets all results.
        progress: gets a phase for each forward and each backward pass, and advances by one for each layer.
    """

    def __init__(self, job: Job, resume: ResumeStore | None, ranks: Ranks, progress: Progress) -> None:
        self._job, self._ranks, self._progress = job, ranks, progress
        self._resume = resume if ranks.size == 1 else None
        self._checkpoints = job.checkpoints()
        self._layout = layout_of(job)
        self.layers = backward_layers(job.skeleton)
        self._teachers: ActivationStore | None = None
        self._parts: dict[str, Part] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Passes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if kind is None:
            self._forget(_TEACHERS)

    def derivatives(
        self,
        label: str,
        examples: Sequence[Example],
        point: Point | None,
        *,
        label_samples: int,
        seed: int,
        title: str = "derivatives",
    ) -> dict[str, Tensor]:
        """Run rows forward and backward.

        Args:
            label: prefix of the pass's keys in the resume store.
            examples: the rows.
            point: the merged model; None runs every row through its own expert.
            label_samples: S, labels sampled per position; 0 uses the row's own tokens.
            seed: seed of the sampled labels.
            title: what the pass is, for the progress bar.

        Returns:
            submodule -> [rows, max(1, S), K] float64 derivatives of the losses along the task vectors. At a merged
            model [rows, 1 + S, K], the first of the divergence from the row's expert.

        Raises:
            ModelError, RunError: NaN or Inf in weights or features, out of memory, or another process has ended.
            OutputError: no disk space for the activations of all layers.
        """
        batches, places = self._share(examples)
        own = [examples[place] for place in places]
        losses = max(1, label_samples) + (point is not None)
        shape = (len(examples), losses, len(self._job.labels))
        found = {submodule.name: torch.zeros(shape, dtype=torch.float64) for submodule in self._job.submodules}

        def add(parts: Mapping[str, Tensor]) -> None:
            for name, part in parts.items():
                found[name][places] += part

        finished = self._resume.finished if self._resume is not None else frozenset()
        keys = [label + layer for layer in self.layers]
        if self._resume is not None and finished.issuperset(keys):
            for key in keys:
                add(self._resume.get(key))
        elif own:
            at = [] if point is None else [merge_at(self._job, self._layout, point)]
            depths = [(2, 0)] * len(at) + [(self._job.skeleton.num_layers + 1, losses)]
            with self._stores(label, batches, depths) as stores:
                lanes = Lanes(
                    self._job.skeleton, self._checkpoints, own, batches, at, stores, announce=self._progress.work_on
                )  # fmt: skip
                lane = lanes.others[0] if at else lanes.experts
                if not finished.issuperset(keys[: lane.store.layers_done]):
                    lane.store.rewind()  # a stored layer was damaged: restart the backward pass
                for key in keys[: lane.store.layers_done]:
                    add(self._resume.get(key) if self._resume is not None else {})
                self._progress.begin(f"{title}, forward", self._job.skeleton.num_layers)
                lanes.forward()
                trim_heap()
                self._progress.begin(f"{title}, backward", len(keys))
                self._progress.advance(lane.store.layers_done)
                backward = BackwardPass(
                    lane, self._job.submodules, own, label_samples=label_samples, seed=seed,
                    experts=lanes.experts if at else None, parts=self._parts, announce=self._progress.announce,
                )  # fmt: skip
                for layer, parts in backward.run():
                    add(parts)
                    self._put(label + layer, parts)
                    self._progress.advance(1)
        self._forget(label)
        for part in found.values():
            self._ranks.all_reduce_(part)
        for name in self._job.averaged:
            found[name][..., -1] = 0
        return found

    def measure(
        self, label: str, examples: Sequence[Example], points: Sequence[Point | None], *, title: str = "measuring"
    ) -> Measured:
        """Measure merged models on the held-out rows, all in one reading of the checkpoints.

        Args:
            label: key of the result in the resume store.
            examples: the rows; the same in every call, since their experts' outputs are kept.
            points: P merged models; None is the base. If one is not finite, its results are NaN or Inf.
            title: what is measured, for the progress bar.

        Raises:
            ModelError, RunError, OutputError: see `derivatives`.
        """
        batches, places = self._share(examples)
        own = [examples[place] for place in places]
        shape = (len(examples), len(points))
        found = Measured(*(torch.zeros(each, dtype=torch.float64) for each in (shape, shape, shape[:1])))
        key = label + _MEASURED
        if self._resume is not None and key in self._resume.finished:
            found.put(places, Measured(**self._resume.get(key)))
        elif own:
            self._progress.begin(title, self._job.skeleton.num_layers + 1)
            at: list[MergeWeights | Literal["base"]] = [
                "base" if point is None else merge_at(self._job, self._layout, point) for point in points
            ]
            with self._stores(label, batches, [(2, 0)] * len(at)) as stores:

                def make_store(lane: int) -> ActivationStore:
                    if lane:
                        return stores(lane - 1)
                    if self._teachers is None:
                        self._teachers = self._stack.enter_context(self._stores(_TEACHERS, batches, [(2, 0)]))(0)
                    return self._teachers

                lanes = Lanes(
                    self._job.skeleton, self._checkpoints, own, batches, at, make_store, trial=True,
                    announce=self._progress.work_on,
                )  # fmt: skip
                lanes.forward()
                trim_heap()
                measured = lanes.measure()
            found.put(places, measured)
            self._put(key, vars(measured))
        self._forget(label)
        for part in vars(found).values():
            self._ranks.all_reduce_(part)
        return found

    def _share(self, examples: Sequence[Example]) -> tuple[list[Batch], list[int]]:
        """This process's batches, their rows numbered from 0, and the place of each of these rows in `examples`."""
        planned = plan_task_batches(
            [example.row.ids for example in examples], [example.task for example in examples], GRADIENT_TOKENS
        )
        # Batches are not split, so products do not depend on the number of processes.
        own = [planned[place] for place in self._ranks.share([sum(batch.lengths) for batch in planned])]
        places = sorted(row for batch in own for row in batch.rows)
        number = {place: row for row, place in enumerate(places)}
        return [replace(batch, rows=tuple(number[row] for row in batch.rows)) for batch in own], places

    def _put(self, key: str, found: Mapping[str, Tensor]) -> None:
        if self._resume is not None:
            self._resume.put(key, found)

    @contextmanager
    def _stores(
        self, label: str, batches: Sequence[Batch], sizes: Sequence[tuple[int, int]]
    ) -> Iterator[Callable[[int], ActivationStore]]:
        """Yield the function that makes each lane's activation store.

        In the resume store's folder; else in memory, or in temporary files if they are large.

        Args:
            label: prefix of the folders' names.
            batches: this process's batches.
            sizes: (stored depths, gradients per token) of each lane, see `ActivationStore`.
        """
        lengths = [sum(batch.lengths) for batch in batches]
        width, dtype = self._job.skeleton.width, self._job.dtype
        size = sum(activation_bytes(sum(lengths), *each, width, dtype) for each in sizes)
        with ExitStack() as stack:
            temporary: Path | None = None
            if self._resume is None and size > ACTIVATIONS_IN_MEMORY:
                temporary = Path(stack.enter_context(TemporaryDirectory(prefix="mergekit-slta-")))

            def make(lane: int) -> ActivationStore:
                folder = self._folder(label, lane) if self._resume is not None else temporary and temporary / str(lane)
                return ActivationStore(lengths, *sizes[lane], width, dtype, folder, self._job.device)

            yield make

    def _folder(self, label: str, lane: int) -> Path:
        assert self._resume is not None
        return self._resume.activations_folder(f"{label}{lane}-")

    def _forget(self, label: str) -> None:
        """Remove a pass's activations, after all its results are stored."""
        trim_heap()
        lane = 0
        while self._resume is not None and (folder := self._folder(label, lane)).is_dir():
            shutil.rmtree(folder, ignore_errors=True)
            lane += 1


def answer_tokens(examples: Sequence[Example]) -> Tensor:
    """[rows] int64, number of tokens of each row's answer."""
    lengths = [len(example.row.ids) - example.row.completion for example in examples]
    return torch.tensor(lengths, dtype=torch.int64)


def row_tasks(examples: Sequence[Example]) -> Tensor:
    """[rows] int64, the task of each row."""
    return torch.tensor([example.task for example in examples], dtype=torch.int64)
