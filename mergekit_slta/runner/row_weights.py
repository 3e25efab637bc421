"""The weights used for each batch of rows: those of the rows' own expert, the base's, or merged ones.

Scope: which tensors to load for each part of the model, and which batches share them. Nothing is evaluated here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from mergekit_slta.checkpoints.tensors import Checkpoints, Weights
from mergekit_slta.data.batches import Batch
from mergekit_slta.data.rows import Example
from mergekit_slta.models.skeleton import Skeleton
from mergekit_slta.runner.directional import block_rows

MergeWeights = Callable[[Sequence[Weights]], Weights]
"""(some tensors of every model, the base first) -> the merged tensors."""


class RowWeights:
    """The weights of every batch, layer by layer.

    Args:
        skeleton: the model's code.
        checkpoints: every model's tensors; experts in canonical order.
        examples: the calibration rows.
        batches: batches of the rows; the rows of a batch are of one task.
        at: "experts": each row uses its own expert; "base": all rows use the base; a function: all rows use the tensors
            that it merges.

    Attributes:
        rows: the rows of `examples`.
        by_task: task, the index of its expert in canonical order -> indices of its batches.
        num_models: number of models that have weights: experts and directions.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        checkpoints: Checkpoints,
        examples: Sequence[Example],
        batches: Sequence[Batch],
        at: MergeWeights | Literal["experts", "base"],
    ) -> None:
        self.skeleton, self.checkpoints, self.batches, self.at = skeleton, checkpoints, batches, at
        self.rows = [example.row for example in examples]
        self.batch_task = [examples[batch.rows[0]].task for batch in batches]
        self.by_task = {
            task: [index for index, other in enumerate(self.batch_task) if other == task]
            for task in sorted(set(self.batch_task))
        }
        self.num_models = checkpoints.num_models - 1

    def layer_tensors(self, layer: int) -> list[str]:
        """Names of a decoder layer's tensors."""
        prefix = f"{self.skeleton.layers_path}.{layer}."
        return [name for name in self.checkpoints.plan.tensors if name.startswith(prefix)]

    def outer_tensors(self) -> tuple[list[str], list[str]]:
        """Names of the tensors before and after the layers, without the embedding table and the output projection."""
        skeleton = self.skeleton
        names = [name for name in self.checkpoints.plan.tensors if not name.startswith(skeleton.layers_path + ".")]
        after = [name for name in names if name.startswith(skeleton.anatomy.head_prefixes)]
        tables = (skeleton.embedding_weight, skeleton.head_weight)
        return [name for name in names if name not in (*after, *tables)], [name for name in after if name not in tables]

    def shared(self, weights: Sequence[Weights]) -> Weights | None:
        """The tensors used for all batches, from those of every model; None if each uses its own expert's."""
        if self.at == "experts":
            return None
        return self.skeleton.for_products(weights[0] if self.at == "base" else self.at(weights))

    def load(self, names: Sequence[str], shared: Weights | None = None) -> Iterator[tuple[Weights, Sequence[int]]]:
        """Yield the named tensors, each time with the indices of the batches that use them.

        Args:
            names: names of the tensors.
            shared: result of the method `shared` for these tensors, if known; nothing is read then.
        """
        if shared is not None:
            yield shared, range(len(self.batches))
        elif self.at == "experts":  # one model at a time
            for task, batches in self.by_task.items():
                yield self.skeleton.for_products(self.checkpoints.load(names, [task + 1])[0]), batches
        else:
            yield from self.groups(self.checkpoints.load(names))

    def groups(self, loaded: Sequence[Weights]) -> Iterator[tuple[Weights, Sequence[int]]]:
        """Yield some tensors, each time with the indices of the batches that use them.

        Args:
            loaded: the tensors of every model, the base first.
        """
        if self.at == "experts":
            for task, batches in self.by_task.items():
                yield self.skeleton.for_products(loaded[task + 1]), batches
        elif (shared := self.shared(loaded)) is not None:
            yield shared, range(len(self.batches))

    def shared_projection(self, raw: Sequence[Tensor], source: str) -> Tensor | None:
        """The output projection [V, d] used for all batches; None if each uses its own expert's.

        Args:
            raw: the projection of every model, from `Checkpoints.raw`.
            source: name of the tensor; that of the embedding table if the two are tied.
        """
        vocabulary = min(tensor.shape[0] for tensor in raw)
        if self.at == "experts":
            return None
        if self.at == "base":
            return self.checkpoints.place(raw[0][:vocabulary], source, 0)
        merged = torch.empty((vocabulary, raw[0].shape[1]), dtype=self.checkpoints.dtype, device=self.skeleton.device)
        block = block_rows(raw[0].shape[1], self.skeleton.device)
        for start in range(0, vocabulary, block):  # in parts, so that not all models' projections are in memory
            part = slice(start, min(start + block, vocabulary))
            placed = [self.checkpoints.place(tensor[part], source, model) for model, tensor in enumerate(raw)]
            merged[part] = self.at([{source: tensor} for tensor in placed])[source]
        return merged


class RowEmbeddings:
    """The tensors before the layers of every model, but only those rows of the embedding table that occur.

    Args:
        weights: of any lane over these rows.
    """

    def __init__(self, weights: RowWeights) -> None:
        checkpoints = weights.checkpoints
        self._weights = weights
        self._table = weights.skeleton.embedding_weight
        self._used = torch.unique(torch.cat([batch.ids.flatten() for batch in weights.batches]))  # [U]
        self._others = checkpoints.load(weights.outer_tensors()[0])
        self._table_rows = checkpoints.table_rows(self._table, self._used)

    def of_model(self, batch: Batch, model: int) -> tuple[Weights, Tensor]:
        """A model's tensors, with only this batch's tokens in the table, and its ids [b, s] as rows of that table."""
        device = self._weights.skeleton.device
        own, ids = torch.unique(batch.ids, return_inverse=True)
        used = torch.searchsorted(self._used, own).to(device)
        return {**self._others[model], self._table: self._table_rows[model][used]}, ids.to(device)

    def of_batch(self, index: int, weights: RowWeights, rows: Batch | None = None) -> tuple[Weights, Tensor]:
        """As `of_model`, but with the weights used for batch `index`; `weights` may be those of another lane.

        `rows` may be some rows of that batch.
        """
        batch = rows or weights.batches[index]
        if weights.at == "experts":
            return self.of_model(batch, weights.batch_task[index] + 1)
        if weights.at == "base":
            return self.of_model(batch, 0)
        every = [self.of_model(batch, model) for model in range(weights.num_models + 1)]
        return weights.at([tensors for tensors, _ in every]), every[0][1]
