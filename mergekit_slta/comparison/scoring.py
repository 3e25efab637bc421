"""Score the base, the experts and merged models on rows: losses, divergences from the experts, exact answers.

Scope: forward passes, layer by layer, as in a calibration: no whole model is loaded. The base and all experts run in
one pass over their checkpoints; a merged model runs alone. An answer is exact if each of its tokens is the most likely
one after the prompt and the tokens before it. Greedy decoding then writes just this answer, so that nothing needs to be
generated.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from torch import Tensor

from mergekit_slta.checkpoints.plan import make_plan
from mergekit_slta.checkpoints.reconcile import find_ties
from mergekit_slta.checkpoints.tensors import Checkpoints, Weights
from mergekit_slta.data.batches import GRADIENT_TOKENS, plan_task_batches
from mergekit_slta.data.rows import Example
from mergekit_slta.errors import SltaError
from mergekit_slta.job.job import Job
from mergekit_slta.libraries.mergekit import forget_loaders, place_loader
from mergekit_slta.objectives.gradient_passes import ACTIVATIONS_IN_MEMORY, answer_tokens
from mergekit_slta.runner.lanes import POSITION_LOGITS, Lane, Lanes
from mergekit_slta.runner.output_head import Head, answer_parts, cross_entropy, divergence, sum_dtype
from mergekit_slta.runner.row_weights import MergeWeights
from mergekit_slta.runtime.activations import ActivationStore, activation_bytes
from mergekit_slta.runtime.progress import Progress

_ALONE = -1
"""The task of all rows in a pass that has one model: the weights of task t are those of model t + 1."""


@dataclass(frozen=True)
class Scores:
    """One model's scores, for each row.

    Attributes:
        losses: [rows] float64, mean cross-entropy over the answer, nats per token.
        divergences: [rows] float64, KL(expert of the row's task || model), nats, summed over the answer.
        exact: [rows] bool, whether each token of the answer is the most likely one.
    """

    losses: Tensor
    divergences: Tensor
    exact: Tensor


class Scorer:
    """Scores models on the same rows.

    Args:
        job: the models, prepared; its own rows are not used.
        examples: the rows, in canonical order of their tasks.
        folder: for large features; it is removed and made anew.
    """

    def __init__(self, job: Job, examples: Sequence[Example], folder: Path) -> None:
        self._job, self._examples, self._folder = job, examples, folder
        self._batches = plan_task_batches(
            [example.row.ids for example in examples], [example.task for example in examples], GRADIENT_TOKENS
        )
        self._teachers: Lane | None = None

    @torch.no_grad()
    def score_references(self) -> list[Scores]:
        """Score the base, then each expert in canonical order, on the rows of all tasks.

        Raises:
            ModelError, RunError: NaN or Inf in weights or features, or out of memory.
            OutputError: no room for the features.
        """
        job = self._job
        self.place_loaders()
        checkpoints = job.checkpoints()
        experts = range(1, 1 + len(job.experts))
        at = ["base", *map(_weights_of, experts)]
        with job.computing(), self._progress("the base and the experts") as progress:
            lanes = Lanes(
                job.skeleton, checkpoints, self._examples, self._batches, at, self._stores("references", 1 + len(at)),
                announce=progress.work_on,
            )  # fmt: skip
            lanes.forward()
            self._teachers, head = lanes.experts, Head(lanes.experts.weights)
            return [self._score(lane, head, head) for lane in lanes.others]

    @torch.no_grad()
    def score_merge(self, folder: Path, label: str) -> Scores | None:
        """Score a merged model in a folder, after the references; None if its weights or features are not finite.

        Raises:
            ModelError, RunError, OutputError: see `score_references`.
        """
        job = self._job
        model = ModelReference(model=ModelPath(path=str(folder.absolute())))
        self.place_loaders()
        try:
            with job.computing(), self._progress(label) as progress:
                alone = [Example(example.row, _ALONE) for example in self._examples]
                lanes = Lanes(
                    job.skeleton, self._checkpoints_of(model), alone, self._batches, [], self._stores("merge", 1),
                    announce=progress.work_on,
                )  # fmt: skip
                lanes.forward()
                assert self._teachers is not None
                return self._score(lanes.experts, Head(lanes.experts.weights), Head(self._teachers.weights))
        except SltaError as error:
            if error.code in ("not-finite", "not-finite-weights"):
                return None
            raise
        finally:
            forget_loaders([model])

    def place_loaders(self) -> None:
        """Put the job's loaders into mergekit's cache, from which a merge may have removed them."""
        for model, loader in self._job.plan.loaders.items():
            place_loader(model, loader, self._job.options)

    def _progress(self, label: str) -> Progress:
        num_layers = self._job.skeleton.num_layers
        return Progress(f"scoring {label}", num_layers, quiet=self._job.options.quiet, num_layers=num_layers)

    def _checkpoints_of(self, model: ModelReference) -> Checkpoints:
        """The tensors of a merged model."""
        job, name = self._job, "the merge"
        config = MergeConfiguration.model_validate(
            {"merge_method": "linear", "models": [{"model": str(model), "parameters": {"weight": 1.0}}]}
        )
        recipe = job.recipe.model_copy(
            update={"base": model, "tasks": (), "directions": (), "config": config, "names": {model: name},
                    "labels": {model: name}}
        )  # fmt: skip
        configs = {model: model.config(trust_remote_code=job.options.trust_remote_code)}
        plan = make_plan(recipe, job.options, job.skeleton, configs)
        skeleton = job.skeleton
        plan.is_tied = find_ties(plan, recipe.names, configs, skeleton.embedding_weight, skeleton.head_weight)
        return Checkpoints(plan, skeleton, recipe.names, job.device, job.dtype)

    def _stores(self, name: str, lanes: int) -> Callable[[int], ActivationStore]:
        """The function that makes each lane's activation store: in memory, or in files if they are large."""
        lengths, folder = [sum(batch.lengths) for batch in self._batches], self._folder / name
        width, dtype = self._job.skeleton.width, self._job.dtype
        shutil.rmtree(folder, ignore_errors=True)  # the features of another model
        is_large = lanes * activation_bytes(sum(lengths), 2, 0, width, dtype) > ACTIVATIONS_IN_MEMORY

        def make(lane: int) -> ActivationStore:
            return ActivationStore(
                lengths, 2, 0, width, dtype, folder / str(lane) if is_large else None, self._job.device
            )

        return make

    def _score(self, lane: Lane, own: Head, taught: Head) -> Scores:
        """Compare a lane's outputs with those of each row's expert, and with the answers.

        Args:
            lane: the model, after its forward pass.
            own, taught: output heads of the lane's models, and of the experts.
        """
        assert self._teachers is not None
        teachers, device, depth = self._teachers, self._job.device, self._job.skeleton.num_layers
        own.vocabulary = taught.vocabulary = min(own.vocabulary, taught.vocabulary)
        mine = own.shared(lane.weights) or own.of_expert(_ALONE)
        losses, divergences, wrong = (
            torch.zeros(len(self._examples), dtype=sum_dtype(device), device=device) for _ in range(3)
        )
        for task, batches in teachers.weights.by_task.items():
            expert = taught.of_expert(task)
            for index, part in answer_parts(teachers.weights, batches, POSITION_LOGITS // own.vocabulary):
                ours = own.log_probs(lane.store.features(depth, index), part, mine)
                theirs = taught.log_probs(teachers.store.features(depth, index), part, expert)
                rows, labels = part.rows.to(device), part.labels.to(device)
                losses.index_add_(0, rows, cross_entropy(ours, labels))
                divergences.index_add_(0, rows, divergence(theirs, ours))
                wrong.index_add_(0, rows, (ours.argmax(-1) != labels).to(wrong.dtype))
        losses, divergences, wrong = (found.cpu().double() for found in (losses, divergences, wrong))
        return Scores(losses / answer_tokens(self._examples), divergences, wrong == 0)


def _weights_of(model: int) -> MergeWeights:
    """The weights of one model, for a lane that runs all rows through it."""

    def choose(weights: Sequence[Weights]) -> Weights:
        return weights[model]

    return choose
