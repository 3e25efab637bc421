"""Run rows forward through several models in one reading of the checkpoints, and measure the models' outputs.

Scope: forward passes. Each layer of every model is read once for all lanes, and merged for each lane that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergekit_slta.checkpoints.tensors import Checkpoints, Weights
from mergekit_slta.data.batches import Batch
from mergekit_slta.data.rows import Example
from mergekit_slta.models.skeleton import Skeleton, check_finite
from mergekit_slta.runner.output_head import Head, answer_parts, cross_entropy, divergence, sum_dtype
from mergekit_slta.runner.row_weights import MergeWeights, RowEmbeddings, RowWeights
from mergekit_slta.runtime.activations import ActivationStore

POSITION_LOGITS = 2**23
"""Maximum number of logits of a row's positions in memory while a model is measured."""


@dataclass(frozen=True)
class Lane:
    """Rows, the weights that they run through, and the store of their features.

    Attributes:
        is_trial: NaN and Inf in features are allowed: the weights may be far from every model.
    """

    weights: RowWeights
    store: ActivationStore
    is_trial: bool = False

    def finish_depth(self, where: str) -> None:
        """Record that all features behind `where` are stored.

        Raises:
            RunError: they hold NaN or Inf, and this is no trial.
        """
        if not self.is_trial:
            check_finite(self.store.new_features(), where)
        self.store.finish_depth()


@dataclass(frozen=True)
class Measured:
    """P models on some rows. All are sums over each row's answer in nats; zeros for a row without an answer.

    Attributes:
        divergences: [rows, P] float64, KL(expert of the row's task || model).
        losses: [rows, P] float64, the model's cross-entropy on the row's own answer.
        expert_losses: [rows] float64, the same of the expert.
    """

    divergences: Tensor
    losses: Tensor
    expert_losses: Tensor

    @property
    def is_finite(self) -> list[bool]:
        """Whether the divergences and losses of each model are finite."""
        return (self.divergences.isfinite() & self.losses.isfinite()).all(0).tolist()

    def losses_per_token(self, examples: Sequence[Example]) -> Tensor:
        """[rows, P + 1] float64, mean losses over each row's answer of every model, and of the expert."""
        lengths = [len(example.row.ids) - example.row.completion for example in examples]
        sums = torch.cat([self.losses, self.expert_losses[:, None]], dim=1)
        return sums / torch.tensor(lengths, dtype=torch.float64)[:, None]

    def put(self, rows: Sequence[int], other: Measured) -> None:
        """Replace the results of some rows."""
        for own, new in zip(vars(self).values(), vars(other).values(), strict=True):
            own[rows] = new


class Lanes:
    """Several lanes over the same rows. The first runs every row through its own expert: the teacher of the others.

    Attributes:
        rerouted: [rows, other lanes, 2] int64, over all layers with experts: tokens that are sent to other experts than
            in the first lane, and all tokens.

    Args:
        skeleton: the model's code.
        checkpoints: every model's tensors; experts in canonical order.
        examples: the calibration rows.
        batches: batches of the rows, see `RowWeights`.
        at: the weights of the other lanes, see `RowWeights`.
        make_store: (number of the lane, 0 is the experts') -> its activation store, of batches. A filled store is used
            as it is.
        trial: NaN and Inf are allowed in lanes with merged weights.
        with_routes: count the tokens that are sent to other experts than in the first lane, for `rerouted`; batches
            hold one row then.
        announce: called with the name of the current layer.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        checkpoints: Checkpoints,
        examples: Sequence[Example],
        batches: Sequence[Batch],
        at: Sequence[MergeWeights | Literal["experts", "base"]],
        make_store: Callable[[int], ActivationStore],
        *,
        trial: bool = False,
        with_routes: bool = False,
        announce: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._skeleton, self._checkpoints, self._announce = skeleton, checkpoints, announce
        self._with_routes = with_routes
        self.rerouted = torch.zeros((len(examples), len(at), 2), dtype=torch.int64)
        self.experts, *self.others = (
            Lane(
                RowWeights(skeleton, checkpoints, examples, batches, where), make_store(number),
                trial and callable(where),
            )
            for number, where in enumerate(("experts", *at))
        )  # fmt: skip

    @property
    def _all(self) -> list[Lane]:
        return [self.experts, *self.others]

    def _route(
        self, layer: int, hidden: Tensor, own: Weights, row: int, lane: int, routes: dict[int, Tensor]
    ) -> Tensor:
        """Run a layer on a row, and compare the experts of its tokens with those in the first lane, in `routes`."""
        output, chosen = self._skeleton.layer_with_routes(layer, hidden, own)
        if chosen is not None and lane == 0:
            routes[row] = chosen
        elif chosen is not None:
            other = (chosen != routes[row]).any(-1)
            self.rerouted[row, lane - 1] += torch.tensor([int(other.sum()), len(other)])
        return output

    def forward(self) -> None:
        """Run every lane forward, layer by layer. A lane whose store holds some depths continues after them.

        Raises:
            ModelError: a weight holds NaN or Inf.
            RunError: a feature holds NaN or Inf.
        """
        skeleton, weights = self._skeleton, self.experts.weights
        self._embeddings()
        for layer in range(min(lane.store.depths_done for lane in self._all) - 1, skeleton.num_layers):
            self._announce(f"{skeleton.layers_path}.{layer}")
            loaded = self._checkpoints.load(weights.layer_tensors(layer))
            routes: dict[int, Tensor] = {}
            for number, lane in enumerate(self._all):
                if lane.store.depths_done != layer + 1:
                    continue
                for own, indices in lane.weights.groups(loaded):
                    for index in indices:
                        batch = weights.batches[index]
                        hidden = batch.pad(lane.store.features(layer, index).to(skeleton.device))
                        if self._with_routes:
                            output = self._route(layer, hidden, own, batch.rows[0], number, routes)
                        else:
                            output = skeleton.layer(layer, hidden, own)
                        lane.store.put_features(layer + 1, index, batch.pack(output))
                lane.finish_depth(f"layer {layer}")
            del loaded
            self._checkpoints.flush()

    def _embeddings(self) -> None:
        """Run every batch through the embeddings; also in a resumed run, because this sets positions and masks. A
        backward pass may take the rows of a batch one by one, so these are set for each row, too."""
        embeddings = RowEmbeddings(self.experts.weights)
        self._skeleton.calls.clear()  # those of other rows
        for batch in self.experts.weights.batches:
            for row in batch.alone() if len(batch.rows) > 1 else []:
                weights, ids = embeddings.of_model(row, 0)
                self._skeleton.embed(ids, weights)
        for lane in self._all:
            for index, batch in enumerate(lane.weights.batches):
                weights, ids = embeddings.of_batch(index, lane.weights)
                embedded = batch.pack(self._skeleton.embed(ids, weights))
                if lane.store.depths_done == 0:
                    lane.store.put_features(0, index, embedded)
            if lane.store.depths_done == 0:
                lane.finish_depth("embed")

    def measure(self) -> Measured:
        """Measure the other lanes, after `forward`.

        Raises:
            ModelError: a weight holds NaN or Inf.
        """
        self._announce("head")
        head = Head(self.experts.weights)
        num_rows, device = len(self.experts.weights.rows), self._skeleton.device
        divergences, losses, expert_losses = (
            torch.zeros((num_rows, count), dtype=sum_dtype(device), device=device)
            for count in (len(self.others), len(self.others), 1)
        )
        for number, lane in enumerate(self.others):
            shared = head.shared(lane.weights)
            for task, batches in lane.weights.by_task.items():
                expert = head.of_expert(task)
                for index, part in answer_parts(lane.weights, batches, POSITION_LOGITS // head.vocabulary):
                    ours = head.log_probs(lane.store.features(self._skeleton.num_layers, index), part, shared or expert)
                    taught = head.log_probs(self.experts.store.features(self._skeleton.num_layers, index), part, expert)
                    rows = part.rows.to(device)
                    divergences[:, number].index_add_(0, rows, divergence(taught, ours))
                    losses[:, number].index_add_(0, rows, cross_entropy(ours, part.labels))
                    if number == 0:
                        expert_losses[:, 0].index_add_(0, rows, cross_entropy(taught, part.labels))
        self._checkpoints.flush()
        return Measured(*(found.cpu().double() for found in (divergences, losses, expert_losses[:, 0])))
