"""Steps before and behind the decoder layers: embeddings, the head in chunks of the vocabulary, the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mergekit_slta.checkpoints.tensors import Weights
from mergekit_slta.models.submodules import Submodule
from mergekit_slta.runner.state import Coefficients, Evaluation, ForwardState, InterpolatedWeights
from mergekit_slta.runtime.activations import ActivationStore


def embed(state: ForwardState, submodule: Submodule) -> Iterator[Evaluation]:
    """Everything before the first layer; fills the state's features."""
    mixed, ids = _embedding_rows(state, submodule, submodule.tensors)
    for number, (batch, places) in enumerate(zip(state.batches, ids, strict=True)):

        def at(point: Coefficients, number: int = number, places: Tensor = places) -> Tensor:
            features = state.batches[number].pack(state.skeleton.embed(places, mixed(point)))
            return state.check_finite(features, submodule, point)

        evaluation = Evaluation(submodule, number, batch.rows, batch.lengths, at, state.base_coefficients)
        if submodule.forward_group not in state.done:
            yield evaluation
        state.hidden.append(evaluation.base.cpu())
        del evaluation
    if state.merged_inputs:
        for number, (batch, places) in enumerate(zip(state.batches, ids, strict=True)):
            state.hidden[number] = batch.pack(state.skeleton.embed(places, mixed("merged"))).cpu()


def _embedding_rows(
    state: ForwardState, submodule: Submodule, names: Sequence[str]
) -> tuple[InterpolatedWeights, list[Tensor]]:
    """The tensors before the layers, of the token table only the rows that occur; and the batches' ids in those."""
    table = state.skeleton.embedding_weight
    used = torch.unique(torch.cat([batch.ids.flatten() for batch in state.batches]))  # [U]
    others = [name for name in names if name not in (table, state.skeleton.head_weight)]

    def load(models: Sequence[int]) -> list[Weights]:
        weights = state.checkpoints.load(others, models)
        for into, rows in zip(weights, state.checkpoints.table_rows(table, used, models), strict=True):
            into[table] = rows
        return weights

    ids = [torch.searchsorted(used, batch.ids).to(state.skeleton.device) for batch in state.batches]
    return InterpolatedWeights(state, [submodule], load), ids


def head(state: ForwardState, submodule: Submodule) -> Iterator[Evaluation]:
    """Everything behind the last layer: logits of the state's features."""
    if submodule.forward_group not in state.done:
        yield from _logits(state, submodule, submodule.tensors, lambda pack, point: [state.hidden[n] for n in pack])


def _logits(
    state: ForwardState,
    submodule: Submodule,
    names: Sequence[str],
    features: Callable[[Sequence[int], Coefficients], list[Tensor]],
) -> Iterator[Evaluation]:
    """The vocabulary in chunks: logits of 100,000 tokens and more never stand side by side.

    Args:
        submodule: what the evaluations are reported as.
        names: its tensors behind the layers.
        features: (batches, point) -> [tokens, d] of each: the last layer's outputs.
    """
    projection, norm = state.skeleton.head_weight, state.skeleton.anatomy.final_norm + "."
    prefix = projection.removesuffix("weight")
    checkpoints = state.checkpoints
    chunked = {name: name for name in names if name.startswith(prefix)}
    if projection not in chunked or checkpoints.plan.is_tied:  # the embeddings serve
        chunked[projection] = state.skeleton.embedding_weight
    context = [name for name in checkpoints.plan.tensors if name.startswith(norm) and name not in names]
    borrowed = checkpoints.load(context, models=[0])[0]  # the norm, where it is a submodule of its own
    whole = checkpoints.load([name for name in names if name not in chunked])
    raw = {name: checkpoints.raw(source) for name, source in chunked.items()}
    num_rows = min(tensor.shape[0] for tensor in raw[projection])
    part_size = state.vocabulary_part
    for start in range(0, num_rows, part_size):
        part = slice(start, min(start + part_size, num_rows))

        def load(models: Sequence[int], part: slice = part) -> list[Weights]:
            return [
                whole[model]
                | {name: checkpoints.place(raw[name][model][part], chunked[name], model) for name in chunked}
                for model in models
            ]

        mixed = InterpolatedWeights(state, [submodule], load)
        for pack in state.packs:
            rows, lengths, _ = state.gather_pack(pack, [torch.empty(0)])

            def at(point: Coefficients, pack: Sequence[int] = pack, mixed: InterpolatedWeights = mixed) -> Tensor:
                *_, hidden = state.gather_pack(pack, features(pack, point))
                logits = state.skeleton.head(hidden[None], {**borrowed, **mixed(point)})[0]
                return state.check_finite(logits, submodule, point)

            yield Evaluation(submodule, pack[0], rows, lengths, at, state.base_coefficients)


def whole_model(state: ForwardState, submodule: Submodule) -> Iterator[Evaluation]:
    """Whole models through their own layers: a stream of features per batch and point, one layer of every model in
    memory at a time."""
    skeleton, anatomy = state.skeleton, state.skeleton.anatomy
    if submodule.forward_group in state.done:
        return
    inside = anatomy.layers_path + "."
    behind = (anatomy.final_norm + ".", anatomy.head_weight.removesuffix("weight"))
    outside = [name for name in submodule.tensors if not name.startswith(inside)]
    every = [state.model(number) for number in range(state.num_models)]
    points = [
        list(dict.fromkeys([state.base_coefficients, *(state.points[number] if state.points else every)]))
        for number in range(len(state.batches))
    ]
    keys = [(number, point) for number, own in enumerate(points) for point in own]
    places = {key: place for place, key in enumerate(keys)}
    sizes = [sum(state.batches[number].lengths) for number, _ in keys]
    store = ActivationStore(
        sizes, 1, 0, int(skeleton.config.hidden_size), state.checkpoints.dtype, state.folder
    )  # in place
    mixed, ids = _embedding_rows(state, submodule, [name for name in outside if not name.startswith(behind)])
    for number, (batch, tokens) in enumerate(zip(state.batches, ids, strict=True)):
        for point in points[number]:
            entered = batch.pack(skeleton.embed(tokens, mixed(point)))
            store.put_features(0, places[number, point], state.check_finite(entered, submodule, point))
    del mixed
    for layer in range(skeleton.num_layers):
        state.announce(f"{inside}{layer}")
        names = [name for name in submodule.tensors if name.startswith(f"{inside}{layer}.")]
        mixed = InterpolatedWeights(
            state, [submodule], lambda models, names=names: state.checkpoints.load(names, models)
        )
        by_point: dict[Coefficients, list[int]] = {}
        for number, point in keys:
            by_point.setdefault(point, []).append(number)
        for point, numbers in by_point.items():
            weights = mixed(point)
            for number in numbers:
                batch = state.batches[number]
                features = batch.pad(store.features(layer, places[number, point]).to(skeleton.device))
                output = batch.pack(skeleton.layer(layer, features, weights))
                store.put_features(layer + 1, places[number, point], state.check_finite(output, submodule, point))
        del mixed, weights
        state.checkpoints.flush()
    state.announce("head")
    names, last = [name for name in outside if name.startswith(behind)], skeleton.num_layers

    def features_of(pack: Sequence[int], point: Coefficients) -> list[Tensor]:
        return [store.features(last, places[number, point]) for number in pack]

    yield from _logits(state, submodule, names, features_of)
