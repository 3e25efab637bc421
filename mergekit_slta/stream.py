"""The layer-by-layer runner: feeds the calibration rows through the base, and hands out each submodule's outputs.

Scope: at any time one step of every model (at most a decoder layer) is in memory, and the hidden states of all rows.
Knows no Gram matrix and no solve; which weights a submodule is evaluated with is the caller's choice.

Hidden states are packed, [tokens, d] per batch: token-wise parts (MLP blocks, the head) run over all tokens at once
without padding, attention pads on the right, where no token looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from mergekit_slta.batches import Batch
from mergekit_slta.checkpoints import Checkpoints, Weights
from mergekit_slta.errors import ModelError, RunError, show
from mergekit_slta.skeleton import Skeleton
from mergekit_slta.submodules import Submodule

HEAD_ELEMENTS = 2**22
"""Logits held per model at a time; the vocabulary is walked in chunks of `HEAD_ELEMENTS / tokens` rows."""

Carry = Callable[[Sequence[Submodule], Sequence[Weights]], Weights]
"""(submodules of a step, their tensors of every model) -> the tensors with which the rows move on behind the step."""


@dataclass(frozen=True)
class Evaluation:
    """A submodule at the features of one batch.

    Attributes:
        submodule: which one. The head comes in several parts of the vocabulary, as evaluations of its own.
        rows, lengths: the batch's rows, and how many of the outputs' leading entries belong to each.
        base: [entries, ...] outputs with the base's weights, f(x; theta_0).
        weights: the submodule's tensors of every model, base first.
        run: one of `weights` (or, but for whole models, any others) -> outputs with those, f(x; theta).
    """

    submodule: Submodule
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    base: Tensor
    weights: Sequence[Weights]
    run: Callable[[Weights], Tensor]


class Runner:
    """Walks the model once, step by step.

    Args:
        skeleton: the model's code.
        checkpoints: the models' tensors.
        submodules: all submodules, in the order of a forward pass.
        batches: the calibration rows; of one row each where single matrices are evaluated.
        carry: with which tensors the rows move on behind each step; the base's if None. Called when all batches of
            the step have been handed out.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        checkpoints: Checkpoints,
        submodules: Sequence[Submodule],
        batches: Sequence[Batch],
        carry: Carry | None = None,
    ) -> None:
        self.skeleton = skeleton
        self.checkpoints = checkpoints
        self.submodules = submodules
        self.batches = batches
        self.carry = carry
        self.hidden: list[Tensor] = []
        """Per batch, [tokens, d] on the CPU: the features before the next step."""
        self.parallel: bool | None = None
        """Whether attention and MLP both read the layer's input; found out on the base's first layer."""
        self._attended: list[Tensor] = []

    def run(self) -> Iterator[Evaluation]:
        """Every evaluation, submodule by submodule and batch by batch.

        Raises:
            ModelError: a weight holds NaN or Inf, or the blocks do not add up to the layer.
            RunError: a feature is NaN or Inf; the message names the submodule.
        """
        for _, group in groupby(self.submodules, key=lambda submodule: submodule.step):
            step = list(group)
            kinds = {submodule.kind for submodule in step}
            if "model" in kinds:
                yield from self._model(step[0])
            elif "embed" in kinds:
                yield from self._embed(step[0])
            elif "head" in kinds:
                yield from self._head(step[0])
            elif "attention" in kinds:
                yield from self._attention(step)
            elif kinds <= {"layer", "mlp"}:
                yield from self._block(step[0])
            elif step[0].name == step[0].step:  # a norm by itself: shared by both blocks, or before the head
                yield from self._norm(step[0])
            else:
                yield from self._matrices(step)
            self.checkpoints.flush()

    # --- before and behind the layers

    def _embed(self, submodule: Submodule) -> Iterator[Evaluation]:
        weights, ids = self._embedding_rows(submodule.tensors)
        for batch, places in zip(self.batches, ids, strict=True):

            def run(given: Weights, batch: Batch = batch, places: Tensor = places) -> Tensor:
                return batch.pack(self.skeleton.embed(places, given))

            base = self._finite(run(weights[0]), submodule)
            yield Evaluation(submodule, batch.rows, batch.lengths, base, weights, run)
            self.hidden.append(base.cpu())
        if self.carry:
            carried = self.carry([submodule], weights)
            for number, (batch, places) in enumerate(zip(self.batches, ids, strict=True)):
                self.hidden[number] = batch.pack(self.skeleton.embed(places, carried)).cpu()

    def _embedding_rows(self, names: Sequence[str]) -> tuple[list[Weights], list[Tensor]]:
        """The embeddings of every model, of the token table only the rows that occur; and the batches' ids in those."""
        table = self.skeleton.embedding_weight
        used = torch.unique(torch.cat([batch.ids.flatten() for batch in self.batches]))  # [U]
        before_layers = [name for name in names if name not in (table, self.skeleton.head_weight)]
        weights = self.checkpoints.load(before_layers)
        for model, (into, raw) in enumerate(zip(weights, self.checkpoints.raw(table), strict=True)):
            if int(used[-1]) >= raw.shape[0]:
                raise ModelError(
                    f"token {int(used[-1])} of the calibration rows is beyond the {raw.shape[0]} rows of "
                    f"{show(table)}: the tokenizer and the embeddings do not fit"
                )
            into[table] = self.checkpoints.place(raw[used], table, model)  # [U, d]
        ids = [torch.searchsorted(used, batch.ids).to(self.skeleton.device) for batch in self.batches]
        return weights, ids

    def _head(self, submodule: Submodule) -> Iterator[Evaluation]:
        hidden = [self.hidden] * len(self.checkpoints.plan.models)
        yield from self._logits(submodule, submodule.tensors, hidden)

    def _logits(
        self, submodule: Submodule, names: Sequence[str], hidden: Sequence[Sequence[Tensor]]
    ) -> Iterator[Evaluation]:
        """The vocabulary in chunks: logits of 100,000 tokens and more never stand side by side.

        Args:
            submodule: what the evaluations are reported as.
            names: its tensors behind the layers.
            hidden: per model and batch, [tokens, d]: the last layer's outputs.
        """
        projection, norm = self.skeleton.head_weight, self.skeleton.anatomy.final_norm + "."
        prefix = projection.removesuffix("weight")
        chunked = {name: name for name in names if name.startswith(prefix)}
        if projection not in chunked or self.checkpoints.plan.is_tied:  # the embeddings serve
            chunked[projection] = self.skeleton.embedding_weight
        context = [name for name in self.checkpoints.plan.tensors if name.startswith(norm) and name not in names]
        borrowed = self.checkpoints.load(context, models=[0])[0]  # the norm, where it is a submodule of its own
        whole = self.checkpoints.load([name for name in names if name not in chunked])
        raw = {name: self.checkpoints.raw(source) for name, source in chunked.items()}
        num_rows = min(tensor.shape[0] for tensor in raw[projection])
        step = max(1, HEAD_ELEMENTS // max(len(features) for features in hidden[0]))
        for start in range(0, num_rows, step):
            part = slice(start, min(start + step, num_rows))
            weights = [
                {**borrowed, **whole[model]}
                | {name: self.checkpoints.place(raw[name][model][part], chunked[name], model) for name in chunked}
                for model in range(len(whole))
            ]
            for number, batch in enumerate(self.batches):

                def run(given: Weights, number: int = number, weights: list[Weights] = weights) -> Tensor:
                    model = next((place for place, own in enumerate(weights) if own is given), 0)
                    features = hidden[model][number].to(self.skeleton.device)
                    return self.skeleton.head(features[None], given)[0]

                base = self._finite(run(weights[0]), submodule)
                yield Evaluation(submodule, batch.rows, batch.lengths, base, weights, run)

    # --- inside the layers

    def _block(self, submodule: Submodule) -> Iterator[Evaluation]:
        context = self._context(submodule)
        weights = self.checkpoints.load(submodule.tensors)
        for number, batch in enumerate(self.batches):
            hidden = self.hidden[number].to(self.skeleton.device)

            def run(given: Weights, batch: Batch = batch, hidden: Tensor = hidden) -> Tensor:
                return self._output(submodule, batch, hidden, {**context, **given})

            base = self._finite(run(weights[0]), submodule)
            yield Evaluation(submodule, batch.rows, batch.lengths, base, weights, run)
            if not self.carry:
                self._advance(submodule, number, hidden, base)
        if self.carry:
            self._move_on(submodule, {**context, **self.carry([submodule], weights)})

    def _output(self, submodule: Submodule, batch: Batch, hidden: Tensor, weights: Weights) -> Tensor:
        """[tokens, d] -> [tokens, d]: the MLP over all tokens at once, what attends over padded rows."""
        assert submodule.layer is not None
        if submodule.kind == "mlp":
            return self.skeleton.block(submodule.layer, "mlp", hidden[None], weights)[0]
        if submodule.kind == "attention":
            return batch.pack(self.skeleton.block(submodule.layer, "attention", batch.pad(hidden), weights))
        return batch.pack(self.skeleton.layer(submodule.layer, batch.pad(hidden), weights))

    def _attention(self, step: Sequence[Submodule]) -> Iterator[Evaluation]:
        """An attention block; and, where it is divided, its heads by key/value group (A.3.5).

        A head's output is the output projection's slice applied to the head's own features, which that model's own
        queries, keys and values have made.
        """
        block, heads = step[0], step[1:]
        assert block.layer is not None
        layer = block.layer
        if self.parallel is None:
            self.parallel = self._has_parallel_blocks(block)
        context = self._context(*step)
        names = dict.fromkeys(name for submodule in step for name in submodule.tensors)
        weights = self.checkpoints.load(list(names))
        for number, batch in enumerate(self.batches):
            hidden = self.hidden[number].to(self.skeleton.device)
            features: dict[int, Tensor] = {}  # by weights: [tokens, heads], shared by the heads of one model

            def run(
                given: Weights, batch: Batch = batch, hidden: Tensor = hidden, features: dict[int, Tensor] = features
            ) -> Tensor:
                if not heads:
                    return self._output(block, batch, hidden, {**context, **given})
                output, made = self.skeleton.attention_with_heads(layer, batch.pad(hidden), {**context, **given})
                features[id(given)] = batch.pack(made)
                return batch.pack(output)

            base = self._finite(run(weights[0]), block)
            yield Evaluation(block, batch.rows, batch.lengths, base, weights, run)
            for head in heads:
                projection = head.slices[-1]
                columns = self._columns(head)

                def run_head(
                    given: Weights,
                    run: Callable[[Weights], Tensor] = run,
                    projection: tuple = projection,
                    columns: slice = columns,
                    features: dict[int, Tensor] = features,
                ) -> Tensor:
                    if id(given) not in features:
                        run(given)
                    tensor, axis, start, stop = projection
                    weight = given[tensor].narrow(axis, start, stop - start)
                    return features[id(given)][:, columns] @ (weight.T if axis == 1 else weight)

                yield Evaluation(head, batch.rows, batch.lengths, run_head(weights[0]), weights, run_head)
            if not self.carry:
                self._advance(block, number, hidden, base)
        if self.carry:
            self._move_on(block, {**context, **self.carry(step, weights)})

    @staticmethod
    def _columns(head: Submodule) -> slice:
        """A group's features before the output projection: the same as the columns that read them."""
        return slice(head.slices[-1].start, head.slices[-1].stop)

    def _norm(self, submodule: Submodule) -> Iterator[Evaluation]:
        """A norm by itself, on the features before it; the rows stay where they are."""
        weights = self.checkpoints.load(submodule.tensors)
        for number, batch in enumerate(self.batches):
            hidden = self.hidden[number].to(self.skeleton.device)

            def run(given: Weights, hidden: Tensor = hidden) -> Tensor:
                return self.skeleton.module(submodule.name, (hidden[None],), given)[0]

            yield Evaluation(submodule, batch.rows, batch.lengths, run(weights[0]), weights, run)

    def _matrices(self, step: Sequence[Submodule]) -> Iterator[Evaluation]:
        """Every module of a layer by itself, on what the module is given inside the base's layer.

        Inputs come in whatever shape the model gives them (q/k norms see heads, routers flat tokens); batches of one
        row need no padding, so that a row's output is counted as it is.
        """
        layer = step[0].layer
        assert layer is not None
        names = [name for submodule in step for name in submodule.tensors]
        weights = self.checkpoints.load(names)
        modules = [submodule.name for submodule in step]
        for number, batch in enumerate(self.batches):
            hidden = batch.pad(self.hidden[number].to(self.skeleton.device))
            output, inputs = self.skeleton.layer_with_inputs(layer, hidden, weights[0], modules)
            for submodule in step:
                # What is no matrix takes the MLP block's weight: that block, with all that is in it, is evaluated.
                whole = submodule.kind == "mlp"
                before = self._before_mlp(step[0], hidden, weights[0]) if whole else None
                given_to = inputs[submodule.name]

                def run(
                    given: Weights, path: str = submodule.name, inputs: tuple = given_to, before: Tensor | None = before
                ) -> Tensor:
                    if before is not None:
                        return self.skeleton.block(layer, "mlp", before, given).reshape(1, -1)
                    return self.skeleton.module(path, inputs, given).reshape(1, -1)

                base = self._finite(run(weights[0]), submodule)
                yield Evaluation(submodule, batch.rows, (1,), base, weights, run)
            if not self.carry:
                self.hidden[number] = batch.pack(output).cpu()
        if self.carry:
            carried = self.carry(step, weights)
            for number, batch in enumerate(self.batches):
                hidden = batch.pad(self.hidden[number].to(self.skeleton.device))
                self.hidden[number] = batch.pack(self.skeleton.layer(layer, hidden, carried)).cpu()

    def _before_mlp(self, submodule: Submodule, hidden: Tensor, weights: Weights) -> Tensor:
        if self.parallel is None:
            self.parallel = self._has_parallel_blocks(submodule)
        assert submodule.layer is not None
        return hidden if self.parallel else self.skeleton.block(submodule.layer, "attention", hidden, weights)

    # --- the whole model

    def _model(self, submodule: Submodule) -> Iterator[Evaluation]:
        """Every model through its own layers: T + 1 streams, one layer of one model in memory at a time."""
        skeleton, anatomy = self.skeleton, self.skeleton.anatomy
        inside = anatomy.layers_path + "."
        behind = (anatomy.final_norm + ".", anatomy.head_weight.removesuffix("weight"))
        outside = [name for name in submodule.tensors if not name.startswith(inside)]
        weights, ids = self._embedding_rows([name for name in outside if not name.startswith(behind)])
        hidden = [
            [batch.pack(skeleton.embed(places, own)).cpu() for batch, places in zip(self.batches, ids, strict=True)]
            for own in weights
        ]
        del weights
        for layer in range(skeleton.num_layers):
            names = [name for name in submodule.tensors if name.startswith(f"{inside}{layer}.")]
            for model, streams in enumerate(hidden):
                own = self.checkpoints.load(names, models=[model])[0]
                for number, batch in enumerate(self.batches):
                    features = batch.pad(streams[number].to(skeleton.device))
                    streams[number] = self._finite(batch.pack(skeleton.layer(layer, features, own)), submodule).cpu()
            self.checkpoints.flush()
        yield from self._logits(submodule, [name for name in outside if name.startswith(behind)], hidden)

    # --- moving on

    def _advance(self, submodule: Submodule, number: int, hidden: Tensor, output: Tensor) -> None:
        """Move a batch behind a submodule. Parallel blocks both take the layer's input, and their changes add up."""
        if not self.parallel or submodule.kind == "layer":
            self.hidden[number] = output.cpu()
        elif submodule.kind == "attention":
            self._attended.append(output.cpu())
        else:
            self.hidden[number] = (self._attended.pop(0).to(output.device) + (output - hidden)).cpu()

    def _move_on(self, submodule: Submodule, weights: Weights) -> None:
        for number, batch in enumerate(self.batches):
            hidden = self.hidden[number].to(self.skeleton.device)
            self._advance(submodule, number, hidden, self._output(submodule, batch, hidden, weights))

    def _context(self, *step: Submodule) -> Weights:
        """The base's tensors that a block's forward touches without owning them: norms of the silenced branch, and
        norms that are a submodule of their own."""
        prefix = f"{self.skeleton.layers_path}.{step[0].layer}."
        arch = self.skeleton.arch
        branches = (f"{prefix}{arch.attention}.", f"{prefix}{arch.mlp}.")
        owned = {name for submodule in step for name in submodule.tensors}
        names = [
            name
            for name in self.checkpoints.plan.tensors
            if name.startswith(prefix) and not name.startswith(branches) and name not in owned
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

    def _finite(self, features: Tensor, submodule: Submodule) -> Tensor:
        if not torch.isfinite(features.sum()) and not torch.isfinite(features).all():
            raise RunError(
                f"the features behind {show(submodule.name)} hold NaN or Inf in "
                f"{str(features.dtype).removeprefix('torch.')}: use `compute_dtype: float32`, or check the models"
            )
        return features
