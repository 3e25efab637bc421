"""The layer-by-layer runner: feeds the calibration rows through the base, and hands out each submodule's outputs.

Scope: at any time one submodule of every model is in memory, and the hidden states of all rows. Knows no Gram matrix
and no solve; which weights a submodule is evaluated with is the caller's choice (`Evaluation.run`).

Hidden states are packed, [tokens, d] per batch: token-wise parts (MLP blocks, the head) run over all tokens at once
without padding, attention pads on the right, where no token looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_slta.checkpoints import Checkpoints, Weights
from mergekit_slta.errors import ModelError, RunError, show
from mergekit_slta.skeleton import Skeleton
from mergekit_slta.submodules import Submodule

BATCH_TOKENS = 2048
"""Tokens per micro-batch: enough to keep matrix products busy, little enough that activations stay below weights."""
PADDING = 1.06
"""A batch may hold this many times its real tokens once padded."""
HEAD_ELEMENTS = 2**22
"""Logits held per model at a time; the vocabulary is walked in chunks of `HEAD_ELEMENTS / tokens` rows."""


@dataclass(frozen=True)
class Batch:
    """Rows that run together.

    Attributes:
        rows: indices of the rows.
        lengths: their tokens.
        ids: [rows, longest] int64 token ids, padded on the right.
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    ids: Tensor

    def pack(self, padded: Tensor) -> Tensor:
        """[b, s, d] -> [tokens, d]."""
        return torch.cat([row[:length] for row, length in zip(padded, self.lengths, strict=True)])

    def pad(self, packed: Tensor) -> Tensor:
        """[tokens, d] -> [b, s, d], zeros on the right."""
        if len(self.lengths) == 1:
            return packed[None]
        return torch.nn.utils.rnn.pad_sequence(list(packed.split(list(self.lengths))), batch_first=True)


def plan_batches(
    rows: Sequence[Sequence[int]], max_tokens: int = BATCH_TOKENS, padding: float = PADDING
) -> list[Batch]:
    """Group rows of like length. Depends on the rows alone, not on machine, device or number of processes."""
    order = sorted(range(len(rows)), key=lambda row: (len(rows[row]), row))
    groups: list[list[int]] = []
    for row in order:
        group = [*groups[-1], row] if groups else []
        area = len(rows[row]) * len(group)
        if group and area <= max_tokens and area <= padding * sum(len(rows[other]) for other in group):
            groups[-1] = group
        else:
            groups.append([row])
    batches = []
    for group in groups:
        lengths = tuple(len(rows[row]) for row in group)
        ids = torch.zeros((len(group), max(lengths)), dtype=torch.int64)
        for place, row in enumerate(group):
            ids[place, : lengths[place]] = torch.as_tensor(list(rows[row]))
        batches.append(Batch(tuple(group), lengths, ids))
    return batches


@dataclass(frozen=True)
class Evaluation:
    """A submodule at the features of one batch inside the base model.

    Attributes:
        submodule: which one. The head comes in several parts of the vocabulary, as evaluations of its own.
        rows, lengths: the batch's rows and their tokens.
        base: [tokens, d] outputs with the base's weights, f(x; theta_0).
        weights: the submodule's tensors of every model, base first.
        run: weights -> [tokens, d] outputs with those, f(x; theta).
    """

    submodule: Submodule
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    base: Tensor
    weights: Sequence[Weights]
    run: Callable[[Weights], Tensor]


class Runner:
    """Walks the model once, submodule by submodule.

    Args:
        skeleton: the model's code.
        checkpoints: the models' tensors.
        submodules: all submodules, in the order of a forward pass.
        batches: the calibration rows.
    """

    def __init__(
        self, skeleton: Skeleton, checkpoints: Checkpoints, submodules: Sequence[Submodule], batches: Sequence[Batch]
    ) -> None:
        self.skeleton = skeleton
        self.checkpoints = checkpoints
        self.submodules = submodules
        self.batches = batches
        self.hidden: list[Tensor] = []
        """Per batch, [tokens, d] on the CPU: the base's features before the next submodule."""
        self.parallel: bool | None = None
        """Whether attention and MLP both read the layer's input; found out on the base's first layer."""
        self._attended: list[Tensor] = []

    def run(self) -> Iterator[Evaluation]:
        """Every evaluation, submodule by submodule and batch by batch.

        Raises:
            ModelError: a weight holds NaN or Inf.
            RunError: a feature of the base is NaN or Inf; the message names the submodule.
        """
        steps = {"embed": self._embed, "head": self._head}
        for submodule in self.submodules:
            yield from steps.get(submodule.kind, self._inner)(submodule)
            self.checkpoints.flush()

    def _embed(self, submodule: Submodule) -> Iterator[Evaluation]:
        table = self.skeleton.embedding_weight
        used = torch.unique(torch.cat([batch.ids.flatten() for batch in self.batches]))  # [U]
        weights = self.checkpoints.load([name for name in submodule.tensors if name != table])
        for model, (into, raw) in enumerate(zip(weights, self.checkpoints.raw(table), strict=True)):
            if int(used[-1]) >= raw.shape[0]:
                raise ModelError(
                    f"token {int(used[-1])} of the calibration rows is beyond the {raw.shape[0]} rows of "
                    f"{show(table)}: the tokenizer and the embeddings do not fit"
                )
            into[table] = self.checkpoints.place(raw[used], table, model)  # [U, d]
        for batch in self.batches:
            ids = torch.searchsorted(used, batch.ids).to(self.skeleton.device)

            def run(given: Weights, batch: Batch = batch, ids: Tensor = ids) -> Tensor:
                return batch.pack(self.skeleton.embed(ids, given))

            base = self._finite(run(weights[0]), submodule)
            yield Evaluation(submodule, batch.rows, batch.lengths, base, weights, run)
            self.hidden.append(base.cpu())

    def _inner(self, submodule: Submodule) -> Iterator[Evaluation]:
        if submodule.kind == "attention" and self.parallel is None:
            self.parallel = self._has_parallel_blocks(submodule)
        context = self._context(submodule)
        weights = self.checkpoints.load(submodule.tensors)
        for number, batch in enumerate(self.batches):
            hidden = self.hidden[number].to(self.skeleton.device)

            def run(given: Weights, batch: Batch = batch, hidden: Tensor = hidden) -> Tensor:
                return self._output(submodule, batch, hidden, {**context, **given})

            base = self._finite(run(weights[0]), submodule)
            yield Evaluation(submodule, batch.rows, batch.lengths, base, weights, run)
            self._advance(submodule, number, hidden, base)

    def _output(self, submodule: Submodule, batch: Batch, hidden: Tensor, weights: Weights) -> Tensor:
        """[tokens, d] -> [tokens, d]: the MLP over all tokens at once, what attends over padded rows."""
        assert submodule.layer is not None
        if submodule.kind == "mlp":
            return self.skeleton.block(submodule.layer, "mlp", hidden[None], weights)[0]
        if submodule.kind == "attention":
            return batch.pack(self.skeleton.block(submodule.layer, "attention", batch.pad(hidden), weights))
        return batch.pack(self.skeleton.layer(submodule.layer, batch.pad(hidden), weights))

    def _advance(self, submodule: Submodule, number: int, hidden: Tensor, base: Tensor) -> None:
        """Move a batch behind a submodule. Parallel blocks both take the layer's input, and their changes add up."""
        if not self.parallel or submodule.kind == "layer":
            self.hidden[number] = base.cpu()
        elif submodule.kind == "attention":
            self._attended.append(base.cpu())
        else:
            self.hidden[number] = (self._attended.pop(0).to(base.device) + (base - hidden)).cpu()

    def _context(self, submodule: Submodule) -> Weights:
        """The base's tensors that a block's forward touches without owning them: norms of the silenced branch."""
        prefix = f"{self.skeleton.layers_path}.{submodule.layer}."
        arch = self.skeleton.arch
        branches = (f"{prefix}{arch.attention}.", f"{prefix}{arch.mlp}.")
        names = [
            name
            for name in self.checkpoints.plan.tensors
            if name.startswith(prefix) and not name.startswith(branches) and name not in submodule.tensors
        ]
        return self.checkpoints.load(names, models=[0])[0]

    def _has_parallel_blocks(self, submodule: Submodule) -> bool:
        """Which wiring reproduces the base's layer: the MLP behind attention, or both on the layer's input.

        Raises:
            ModelError: neither does, so that the blocks would not be what the model computes.
        """
        assert submodule.layer is not None
        skeleton, index = self.skeleton, submodule.layer
        prefix = f"{skeleton.layers_path}.{index}."
        names = [name for name in self.checkpoints.plan.tensors if name.startswith(prefix)]
        weights = self.checkpoints.load(names, models=[0])[0]
        batch = self.batches[0]
        packed = self.hidden[0].to(skeleton.device)
        whole = batch.pack(skeleton.layer(index, batch.pad(packed), weights))
        attended = batch.pack(skeleton.block(index, "attention", batch.pad(packed), weights))
        sequential = skeleton.block(index, "mlp", attended[None], weights)[0]
        parallel = attended + (skeleton.block(index, "mlp", packed[None], weights)[0] - packed)
        tolerance = 1e-3 * (whole - packed).norm() + 64 * torch.finfo(whole.dtype).eps * whole.norm()
        errors = [(whole - sequential).norm(), (whole - parallel).norm()]
        if min(errors) > tolerance:
            raise ModelError(
                f"the attention and MLP blocks of {show(prefix[:-1])} do not add up to the layer: "
                "use `granularity: layer`, and please report the model"
            )
        return bool(errors[1] < errors[0])

    def _head(self, submodule: Submodule) -> Iterator[Evaluation]:
        """The vocabulary in chunks: logits of 100,000 tokens and more never stand side by side."""
        projection = self.skeleton.head_weight
        own = projection in submodule.tensors  # else tied: the plan has no such tensor, the embeddings serve
        prefix = projection.removesuffix("weight")
        chunked = {name: name for name in submodule.tensors if name.startswith(prefix)}
        if not own:
            chunked[projection] = self.skeleton.embedding_weight
        whole = self.checkpoints.load([name for name in submodule.tensors if name not in chunked])
        raw = {name: self.checkpoints.raw(source) for name, source in chunked.items()}
        num_rows = min(tensor.shape[0] for tensor in raw[projection])
        step = max(1, HEAD_ELEMENTS // max(len(hidden) for hidden in self.hidden))
        for start in range(0, num_rows, step):
            part = slice(start, min(start + step, num_rows))
            weights = [
                {**whole[model]}
                | {name: self.checkpoints.place(raw[name][model][part], chunked[name], model) for name in chunked}
                for model in range(len(whole))
            ]
            for number, batch in enumerate(self.batches):
                hidden = self.hidden[number].to(self.skeleton.device)

                def run(given: Weights, hidden: Tensor = hidden) -> Tensor:
                    return self.skeleton.head(hidden[None], given)[0]

                base = self._finite(run(weights[0]), submodule)
                yield Evaluation(submodule, batch.rows, batch.lengths, base, weights, run)

    def _finite(self, features: Tensor, submodule: Submodule) -> Tensor:
        if not torch.isfinite(features.sum()) and not torch.isfinite(features).all():
            raise RunError(
                f"the base model's features behind {show(submodule.name)} hold NaN or Inf in "
                f"{str(features.dtype).removeprefix('torch.')}: use `compute_dtype: float32`, or check the base model"
            )
        return features
