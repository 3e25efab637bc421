"""Run rows forward through several models in one reading of the checkpoints, and measure the models' outputs.

Scope: forward passes. Each layer of every model is read once for all lanes, and merged for each lane that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergekit_slta.checkpoints.tensors import Checkpoints, Weights
from mergekit_slta.data.rows import Example
from mergekit_slta.models.skeleton import Skeleton, check_finite
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

    def check(self, features: Tensor, where: str) -> Tensor:
        """Return features that are finite.

        Raises:
            RunError: they hold NaN or Inf, and this is no trial.
        """
        return features if self.is_trial else check_finite(features, where)


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
        at: the weights of the other lanes, see `RowWeights`.
        make_store: (number of the lane, 0 is the experts') -> its activation store. A filled store is used as it is.
        trial: NaN and Inf are allowed in lanes with merged weights.
        with_routes: count the tokens that are sent to other experts than in the first lane, for `rerouted`.
        announce: called with the name of the current layer.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        checkpoints: Checkpoints,
        examples: Sequence[Example],
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
            Lane(RowWeights(skeleton, checkpoints, examples, where), make_store(number), trial and callable(where))
            for number, where in enumerate(("experts", *at))
        )

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
                for own, rows in lane.weights.groups(loaded):
                    for row in rows:
                        hidden = lane.store.features(layer, row).to(skeleton.device)[None]
                        if self._with_routes:
                            output = self._route(layer, hidden, own, row, number, routes)[0]
                        else:
                            output = skeleton.layer(layer, hidden, own)[0]
                        lane.store.put_features(layer + 1, row, lane.check(output, f"layer {layer}"))
                lane.store.finish_depth()
            del loaded
            self._checkpoints.flush()

    def _embeddings(self) -> None:
        """Run every row through the embeddings; also in a resumed run, because this sets positions and masks."""
        embeddings = RowEmbeddings(self.experts.weights)
        for lane in self._all:
            for row in range(len(lane.weights.rows)):
                weights, ids = embeddings.of_row(row, lane.weights)
                embedded = self._skeleton.embed(ids, weights)[0]
                if lane.store.depths_done == 0:
                    lane.store.put_features(0, row, lane.check(embedded, "embed"))
            if lane.store.depths_done == 0:
                lane.store.finish_depth()

    def measure(self) -> Measured:
        """Measure the other lanes, after `forward`.

        Raises:
            ModelError: a weight holds NaN or Inf.
        """
        self._announce("head")
        head = Head(self.experts.weights)
        shape = (len(self.experts.weights.rows), len(self.others))
        found = Measured(*(torch.zeros(each, dtype=torch.float64) for each in (shape, shape, shape[:1])))
        for number, lane in enumerate(self.others):
            self._measure(number, lane, head, found)
        self._checkpoints.flush()
        return found

    def _measure(self, number: int, lane: Lane, head: Head, found: Measured) -> None:
        """Measure one lane; its results are column `number`."""
        weights, last = lane.weights, self._skeleton.num_layers
        shared = head.shared(weights)
        for task, rows in weights.by_task.items():
            expert = head.of_expert(task)
            for row in rows:
                for positions, labels in answer_positions(weights, row, head.vocabulary):
                    ours = head.log_probs(lane.store.features(last, row)[positions], shared or expert)
                    taught = head.log_probs(self.experts.store.features(last, row)[positions], expert)
                    found.divergences[row, number] += divergence(taught, ours)
                    found.losses[row, number] += cross_entropy(ours, labels)
                    if number == 0:
                        found.expert_losses[row] += cross_entropy(taught, labels)


class Head:
    """Final norm and output projection of every model.

    Args:
        weights: any lane's; its rows are not used.

    Attributes:
        names: the tensors after the layers, without the output projection.
        source: name of the output projection; that of the embedding table if the two are tied.
        raw: the output projection of every model, see `Checkpoints.raw`.
        loaded: the tensors `names` of every model.
        vocabulary: V, the number of rows that every projection has.
    """

    def __init__(self, weights: RowWeights) -> None:
        self._skeleton, self._checkpoints = weights.skeleton, weights.checkpoints
        plan, skeleton = self._checkpoints.plan, self._skeleton
        self.names = weights.outer_tensors()[1]
        tied = plan.is_tied or skeleton.head_weight not in plan.tensors
        self.source = skeleton.embedding_weight if tied else skeleton.head_weight
        self.raw = self._checkpoints.raw(self.source)
        self.loaded = self._checkpoints.load(self.names)
        self.vocabulary = min(tensor.shape[0] for tensor in self.raw)

    def of_expert(self, task: int) -> Weights:
        """The tensors of a task's expert."""
        projection = self._checkpoints.place(self.raw[task + 1][: self.vocabulary], self.source, task + 1)
        return {**self.loaded[task + 1], self._skeleton.head_weight: projection}

    def shared(self, weights: RowWeights) -> Weights | None:
        """The tensors that all rows of a lane use; None if each row uses its own expert's."""
        shared = weights.shared(self.loaded)
        if shared is not None:
            shared[self._skeleton.head_weight] = weights.shared_projection(self.raw, self.source)
        return shared

    def log_probs(self, features: Tensor, weights: Weights) -> Tensor:
        """[n, V] float32 log-probabilities from the last layer's outputs [n, d]."""
        logits = self._skeleton.head(features.to(self._skeleton.device)[None], weights)[0]
        return torch.log_softmax(logits.float(), dim=-1)


def divergence(taught: Tensor, log_probs: Tensor) -> float:
    """KL(expert || model) in nats, summed over positions, from log-probabilities [n, V]."""
    return float((taught.exp() * (taught - log_probs)).sum(dtype=torch.float64))


def cross_entropy(log_probs: Tensor, labels: Tensor) -> float:
    """Cross-entropy of labels [n] in nats, summed over positions, from log-probabilities [n, V]."""
    return -float(log_probs.gather(1, labels.to(log_probs.device)[:, None]).sum(dtype=torch.float64))


def answer_positions(weights: RowWeights, row: int, vocabulary: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the positions that predict a row's answer, in parts of bounded memory, and the labels [n] of each part."""
    own = weights.rows[row]
    size = max(1, POSITION_LOGITS // vocabulary)
    for start in range(own.completion - 1, len(own.ids) - 1, size):
        part = slice(start, min(start + size, len(own.ids) - 1))
        yield part, torch.tensor(own.ids[part.start + 1 : part.stop + 1], dtype=torch.int64)
