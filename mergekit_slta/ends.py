"""Steps before and behind the decoder layers: embeddings, the head in chunks of the vocabulary, the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mergekit_slta.batches import Batch
from mergekit_slta.checkpoints import Weights
from mergekit_slta.errors import ModelError, show
from mergekit_slta.submodules import Submodule
from mergekit_slta.walk import Evaluation, Walk

HEAD_ELEMENTS = 2**22
"""Logits held per model at a time; the vocabulary is walked in chunks of `HEAD_ELEMENTS / tokens` rows."""


def embed(walk: Walk, submodule: Submodule) -> Iterator[Evaluation]:
    """Everything before the first layer; fills the walk's features."""
    weights, ids = _embedding_rows(walk, submodule.tensors)
    for batch, places in zip(walk.batches, ids, strict=True):

        def run(given: Weights, batch: Batch = batch, places: Tensor = places) -> Tensor:
            return batch.pack(walk.skeleton.embed(places, given))

        base = walk.finite(run(weights[0]), submodule)
        yield Evaluation(submodule, batch.rows, batch.lengths, base, weights, run)
        walk.hidden.append(base.cpu())
    if walk.carry:
        carried = walk.carry([submodule], weights)
        for number, (batch, places) in enumerate(zip(walk.batches, ids, strict=True)):
            walk.hidden[number] = batch.pack(walk.skeleton.embed(places, carried)).cpu()


def _embedding_rows(walk: Walk, names: Sequence[str]) -> tuple[list[Weights], list[Tensor]]:
    """The embeddings of every model, of the token table only the rows that occur; and the batches' ids in those."""
    table = walk.skeleton.embedding_weight
    used = torch.unique(torch.cat([batch.ids.flatten() for batch in walk.batches]))  # [U]
    before_layers = [name for name in names if name not in (table, walk.skeleton.head_weight)]
    weights = walk.checkpoints.load(before_layers)
    for model, (into, raw) in enumerate(zip(weights, walk.checkpoints.raw(table), strict=True)):
        if int(used[-1]) >= raw.shape[0]:
            raise ModelError(
                f"token {int(used[-1])} of the calibration rows is beyond the {raw.shape[0]} rows of "
                f"{show(table)}: the tokenizer and the embeddings do not fit"
            )
        into[table] = walk.checkpoints.place(raw[used], table, model)  # [U, d]
    ids = [torch.searchsorted(used, batch.ids).to(walk.skeleton.device) for batch in walk.batches]
    return weights, ids


def head(walk: Walk, submodule: Submodule) -> Iterator[Evaluation]:
    """Everything behind the last layer: logits of the walk's features."""
    hidden = [walk.hidden] * len(walk.checkpoints.plan.models)
    yield from _logits(walk, submodule, submodule.tensors, hidden)


def _logits(
    walk: Walk, submodule: Submodule, names: Sequence[str], hidden: Sequence[Sequence[Tensor]]
) -> Iterator[Evaluation]:
    """The vocabulary in chunks: logits of 100,000 tokens and more never stand side by side.

    Args:
        submodule: what the evaluations are reported as.
        names: its tensors behind the layers.
        hidden: per model and batch, [tokens, d]: the last layer's outputs.
    """
    projection, norm = walk.skeleton.head_weight, walk.skeleton.anatomy.final_norm + "."
    prefix = projection.removesuffix("weight")
    chunked = {name: name for name in names if name.startswith(prefix)}
    if projection not in chunked or walk.checkpoints.plan.is_tied:  # the embeddings serve
        chunked[projection] = walk.skeleton.embedding_weight
    context = [name for name in walk.checkpoints.plan.tensors if name.startswith(norm) and name not in names]
    borrowed = walk.checkpoints.load(context, models=[0])[0]  # the norm, where it is a submodule of its own
    whole = walk.checkpoints.load([name for name in names if name not in chunked])
    raw = {name: walk.checkpoints.raw(source) for name, source in chunked.items()}
    num_rows = min(tensor.shape[0] for tensor in raw[projection])
    step = max(1, HEAD_ELEMENTS // max(len(features) for features in hidden[0]))
    for start in range(0, num_rows, step):
        part = slice(start, min(start + step, num_rows))
        weights = [
            {**borrowed, **whole[model]}
            | {name: walk.checkpoints.place(raw[name][model][part], chunked[name], model) for name in chunked}
            for model in range(len(whole))
        ]
        for number, batch in enumerate(walk.batches):

            def run(given: Weights, number: int = number, weights: list[Weights] = weights) -> Tensor:
                model = next((place for place, own in enumerate(weights) if own is given), 0)
                features = hidden[model][number].to(walk.skeleton.device)
                return walk.skeleton.head(features[None], given)[0]

            base = walk.finite(run(weights[0]), submodule)
            yield Evaluation(submodule, batch.rows, batch.lengths, base, weights, run)


def whole_model(walk: Walk, submodule: Submodule) -> Iterator[Evaluation]:
    """Every model through its own layers: T + 1 streams, one layer of one model in memory at a time."""
    skeleton, anatomy = walk.skeleton, walk.skeleton.anatomy
    inside = anatomy.layers_path + "."
    behind = (anatomy.final_norm + ".", anatomy.head_weight.removesuffix("weight"))
    outside = [name for name in submodule.tensors if not name.startswith(inside)]
    weights, ids = _embedding_rows(walk, [name for name in outside if not name.startswith(behind)])
    hidden = [
        [batch.pack(skeleton.embed(places, own)).cpu() for batch, places in zip(walk.batches, ids, strict=True)]
        for own in weights
    ]
    del weights
    for layer in range(skeleton.num_layers):
        names = [name for name in submodule.tensors if name.startswith(f"{inside}{layer}.")]
        for model, streams in enumerate(hidden):
            own = walk.checkpoints.load(names, models=[model])[0]
            for number, batch in enumerate(walk.batches):
                features = batch.pad(streams[number].to(skeleton.device))
                streams[number] = walk.finite(batch.pack(skeleton.layer(layer, features, own)), submodule).cpu()
        walk.checkpoints.flush()
    yield from _logits(walk, submodule, [name for name in outside if name.startswith(behind)], hidden)
