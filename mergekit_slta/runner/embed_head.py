"""Steps before and behind the decoder layers: embeddings, the head in chunks of the vocabulary, the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mergekit_slta.checkpoints.tensors import Weights
from mergekit_slta.models.submodules import Submodule
from mergekit_slta.runner.state import Evaluation, Mixed, Point, Walk
from mergekit_slta.runtime.activations import Tape


def embed(walk: Walk, submodule: Submodule) -> Iterator[Evaluation]:
    """Everything before the first layer; fills the walk's features."""
    mixed, ids = _embedding_rows(walk, submodule, submodule.tensors)
    for number, (batch, places) in enumerate(zip(walk.batches, ids, strict=True)):

        def at(point: Point, number: int = number, places: Tensor = places) -> Tensor:
            features = walk.batches[number].pack(walk.skeleton.embed(places, mixed(point)))
            return walk.finite(features, submodule, point)

        evaluation = Evaluation(submodule, number, batch.rows, batch.lengths, at, walk.origin)
        if submodule.step not in walk.done:
            yield evaluation
        walk.hidden.append(evaluation.base.cpu())
        del evaluation
    if walk.merged_inputs:
        for number, (batch, places) in enumerate(zip(walk.batches, ids, strict=True)):
            walk.hidden[number] = batch.pack(walk.skeleton.embed(places, mixed("merged"))).cpu()


def _embedding_rows(walk: Walk, submodule: Submodule, names: Sequence[str]) -> tuple[Mixed, list[Tensor]]:
    """The tensors before the layers, of the token table only the rows that occur; and the batches' ids in those."""
    table = walk.skeleton.embedding_weight
    used = torch.unique(torch.cat([batch.ids.flatten() for batch in walk.batches]))  # [U]
    others = [name for name in names if name not in (table, walk.skeleton.head_weight)]

    def load(models: Sequence[int]) -> list[Weights]:
        weights = walk.checkpoints.load(others, models)
        for into, rows in zip(weights, walk.checkpoints.table_rows(table, used, models), strict=True):
            into[table] = rows
        return weights

    ids = [torch.searchsorted(used, batch.ids).to(walk.skeleton.device) for batch in walk.batches]
    return Mixed(walk, [submodule], load), ids


def head(walk: Walk, submodule: Submodule) -> Iterator[Evaluation]:
    """Everything behind the last layer: logits of the walk's features."""
    if submodule.step not in walk.done:
        yield from _logits(walk, submodule, submodule.tensors, lambda pack, point: [walk.hidden[n] for n in pack])


def _logits(
    walk: Walk, submodule: Submodule, names: Sequence[str], features: Callable[[Sequence[int], Point], list[Tensor]]
) -> Iterator[Evaluation]:
    """The vocabulary in chunks: logits of 100,000 tokens and more never stand side by side.

    Args:
        submodule: what the evaluations are reported as.
        names: its tensors behind the layers.
        features: (batches, point) -> [tokens, d] of each: the last layer's outputs.
    """
    projection, norm = walk.skeleton.head_weight, walk.skeleton.anatomy.final_norm + "."
    prefix = projection.removesuffix("weight")
    checkpoints = walk.checkpoints
    chunked = {name: name for name in names if name.startswith(prefix)}
    if projection not in chunked or checkpoints.plan.is_tied:  # the embeddings serve
        chunked[projection] = walk.skeleton.embedding_weight
    context = [name for name in checkpoints.plan.tensors if name.startswith(norm) and name not in names]
    borrowed = checkpoints.load(context, models=[0])[0]  # the norm, where it is a submodule of its own
    whole = checkpoints.load([name for name in names if name not in chunked])
    raw = {name: checkpoints.raw(source) for name, source in chunked.items()}
    num_rows = min(tensor.shape[0] for tensor in raw[projection])
    step = walk.vocabulary_part
    for start in range(0, num_rows, step):
        part = slice(start, min(start + step, num_rows))

        def load(models: Sequence[int], part: slice = part) -> list[Weights]:
            return [
                whole[model]
                | {name: checkpoints.place(raw[name][model][part], chunked[name], model) for name in chunked}
                for model in models
            ]

        mixed = Mixed(walk, [submodule], load)
        for pack in walk.packs:
            rows, lengths, _ = walk.taken(pack, [torch.empty(0)])

            def at(point: Point, pack: Sequence[int] = pack, mixed: Mixed = mixed) -> Tensor:
                *_, hidden = walk.taken(pack, features(pack, point))
                logits = walk.skeleton.head(hidden[None], {**borrowed, **mixed(point)})[0]
                return walk.finite(logits, submodule, point)

            yield Evaluation(submodule, pack[0], rows, lengths, at, walk.origin)


def whole_model(walk: Walk, submodule: Submodule) -> Iterator[Evaluation]:
    """Whole models through their own layers: a stream of features per batch and point, one layer of every model in
    memory at a time."""
    skeleton, anatomy = walk.skeleton, walk.skeleton.anatomy
    if submodule.step in walk.done:
        return
    inside = anatomy.layers_path + "."
    behind = (anatomy.final_norm + ".", anatomy.head_weight.removesuffix("weight"))
    outside = [name for name in submodule.tensors if not name.startswith(inside)]
    every = [walk.model(number) for number in range(walk.num_models)]
    points = [
        list(dict.fromkeys([walk.origin, *(walk.points[number] if walk.points else every)]))
        for number in range(len(walk.batches))
    ]
    keys = [(number, point) for number, own in enumerate(points) for point in own]
    places = {key: place for place, key in enumerate(keys)}
    sizes = [sum(walk.batches[number].lengths) for number, _ in keys]
    store = Tape(sizes, 1, 0, int(skeleton.config.hidden_size), walk.checkpoints.dtype, walk.folder)  # in place
    mixed, ids = _embedding_rows(walk, submodule, [name for name in outside if not name.startswith(behind)])
    for number, (batch, tokens) in enumerate(zip(walk.batches, ids, strict=True)):
        for point in points[number]:
            entered = batch.pack(skeleton.embed(tokens, mixed(point)))
            store.put_features(0, places[number, point], walk.finite(entered, submodule, point))
    del mixed
    for layer in range(skeleton.num_layers):
        walk.announce(f"{inside}{layer}")
        names = [name for name in submodule.tensors if name.startswith(f"{inside}{layer}.")]
        mixed = Mixed(walk, [submodule], lambda models, names=names: walk.checkpoints.load(names, models))
        by_point: dict[Point, list[int]] = {}
        for number, point in keys:
            by_point.setdefault(point, []).append(number)
        for point, numbers in by_point.items():
            weights = mixed(point)
            for number in numbers:
                batch = walk.batches[number]
                features = batch.pad(store.features(layer, places[number, point]).to(skeleton.device))
                output = batch.pack(skeleton.layer(layer, features, weights))
                store.put_features(layer + 1, places[number, point], walk.finite(output, submodule, point))
        del mixed, weights
        walk.checkpoints.flush()
    walk.announce("head")
    names, last = [name for name in outside if name.startswith(behind)], skeleton.num_layers

    def features_of(pack: Sequence[int], point: Point) -> list[Tensor]:
        return [store.features(last, places[number, point]) for number in pack]

    yield from _logits(walk, submodule, names, features_of)
