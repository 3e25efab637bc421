"""Evaluate the submodules outside the decoder layers: embeddings, the head in parts of the vocabulary, whole models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mergekit_slta.checkpoints.tensors import Weights
from mergekit_slta.data.batches import Batch
from mergekit_slta.models.skeleton import check_finite
from mergekit_slta.models.submodules import Submodule
from mergekit_slta.runner.state import Coefficients, Evaluation, ForwardState, InterpolatedWeights
from mergekit_slta.runtime.activations import ActivationStore


def evaluate_embeddings(state: ForwardState, submodule: Submodule) -> Iterator[Evaluation]:
    """Evaluate everything before the first layer, and set the state's features `hidden`."""
    interpolated, ids_of = _used_embeddings(state, submodule, submodule.tensors)

    def embedded(batch: Batch, coefficients: Coefficients) -> Tensor:
        return batch.pack(state.skeleton.embed(ids_of(batch), interpolated(coefficients)))

    for index, batch in enumerate(state.batches):

        def outputs_at(coefficients: Coefficients, batch: Batch = batch) -> Tensor:
            return state.check_finite(embedded(batch, coefficients), submodule, coefficients)

        evaluation = Evaluation(submodule, index, batch.rows, batch.lengths, outputs_at, state.base_coefficients)
        if submodule.forward_group not in state.skip:
            yield evaluation
        state.hidden.append(state.keep(evaluation.base))
        del evaluation
    for model, beside in state.beside.items():
        beside.hidden = [state.keep(embedded(batch, state.model_coefficients(model))) for batch in beside.batches]
    if state.merged_inputs:
        state.hidden = [state.keep(embedded(batch, "merged")) for batch in state.batches]


def _used_embeddings(
    state: ForwardState, submodule: Submodule, names: Sequence[str]
) -> tuple[InterpolatedWeights, Callable[[Batch], Tensor]]:
    """Load the named tensors before the layers, but only those rows of the embedding table that occur in the batches.

    Returns:
        The tensors, and the function that gives a batch's ids [b, s] as row numbers of the smaller table.
    """
    table = state.skeleton.embedding_weight
    used = torch.unique(torch.cat([batch.ids.flatten() for batch in state.batches]))  # [U]
    others = [name for name in names if name not in (table, state.skeleton.head_weight)]

    def load(models: Sequence[int]) -> list[Weights]:
        loaded = state.checkpoints.load(others, models)
        for weights, rows in zip(loaded, state.checkpoints.table_rows(table, used, models), strict=True):
            weights[table] = rows
        return loaded

    def ids_of(batch: Batch) -> Tensor:
        return torch.searchsorted(used, batch.ids).to(state.skeleton.device)

    return InterpolatedWeights(state, [submodule], load), ids_of


def evaluate_head(state: ForwardState, submodule: Submodule) -> Iterator[Evaluation]:
    """Evaluate everything after the last layer: logits, in parts of the vocabulary."""
    if submodule.forward_group not in state.skip:
        yield from _evaluate_logits(
            state, submodule, submodule.tensors, lambda pack, _: [state.hidden[index] for index in pack]
        )


def _evaluate_logits(
    state: ForwardState,
    submodule: Submodule,
    names: Sequence[str],
    features: Callable[[Sequence[int], Coefficients], list[Tensor]],
) -> Iterator[Evaluation]:
    """Evaluate logits in parts of the vocabulary, because all logits of a large vocabulary take too much memory.

    Args:
        state: the state of the pass.
        submodule: the submodule of the evaluations.
        names: its tensors after the layers.
        features: (pack, coefficients) -> the last layer's outputs [tokens, d] of each batch.
    """
    projection, norm = state.skeleton.head_weight, state.skeleton.anatomy.final_norm + "."
    prefix = projection.removesuffix("weight")
    checkpoints = state.checkpoints
    sources = {name: name for name in names if name.startswith(prefix)}  # read in parts of rows, weight and bias
    if projection not in sources or checkpoints.plan.is_tied:
        sources[projection] = state.skeleton.embedding_weight
    context = [name for name in checkpoints.plan.tensors if name.startswith(norm) and name not in names]
    base_norm = checkpoints.load(context, models=[0])[0]  # if the norm is a submodule of its own
    whole = checkpoints.load([name for name in names if name not in sources])
    raw = {name: checkpoints.raw(source) for name, source in sources.items()}
    num_rows = min(tensor.shape[0] for tensor in raw[projection])
    part_size = state.vocabulary_part
    for start in range(0, num_rows, part_size):
        part = slice(start, min(start + part_size, num_rows))

        def load(models: Sequence[int], part: slice = part) -> list[Weights]:
            return [
                whole[model]
                | {name: checkpoints.place(raw[name][model][part], source, model) for name, source in sources.items()}
                for model in models
            ]

        interpolated = InterpolatedWeights(state, [submodule], load)
        for pack in state.packs:
            rows, lengths, _ = state.gather_pack(pack, [torch.empty(0)])

            def outputs_at(
                coefficients: Coefficients,
                pack: Sequence[int] = pack,
                interpolated: InterpolatedWeights = interpolated,
            ) -> Tensor:
                *_, hidden = state.gather_pack(pack, features(pack, coefficients))
                logits = state.skeleton.head(hidden[None], {**base_norm, **interpolated(coefficients)})[0]
                return state.check_finite(logits, submodule, coefficients)

            yield Evaluation(submodule, pack[0], rows, lengths, outputs_at, state.base_coefficients)
        for model, beside in state.beside.items():
            norms = {name: beside.norms[name] for name in context}
            weights = {**norms, **interpolated(state.model_coefficients(model))}
            for batch, hidden in zip(beside.batches, beside.hidden, strict=True):
                logits = state.skeleton.head(hidden[None].to(state.skeleton.device), weights)[0]
                name = checkpoints.model_name(model)
                state.take_logits(batch.rows[0], model, check_finite(logits, submodule.name, name))


def evaluate_model(state: ForwardState, submodule: Submodule) -> Iterator[Evaluation]:
    """Evaluate whole models: run each batch through all layers, once for each of its coefficients.

    One layer of every model is in memory at a time.
    """
    skeleton, anatomy = state.skeleton, state.skeleton.anatomy
    if submodule.forward_group in state.skip:
        return
    layers_prefix = anatomy.layers_path + "."
    head_prefixes = anatomy.head_prefixes
    outside = [name for name in submodule.tensors if not name.startswith(layers_prefix)]
    models = [state.model_coefficients(model) for model in range(state.num_models)]
    by_batch = [
        list(dict.fromkeys([state.base_coefficients, *(state.coefficients[index] if state.coefficients else models)]))
        for index in range(len(state.batches))
    ]
    by_coefficients: dict[Coefficients, list[int]] = {}  # -> indices of the batches evaluated there
    for index, listed in enumerate(by_batch):
        for coefficients in listed:
            by_coefficients.setdefault(coefficients, []).append(index)
    keys = [(index, coefficients) for index, listed in enumerate(by_batch) for coefficients in listed]
    entries = {key: entry for entry, key in enumerate(keys)}  # index in the store
    lengths = [sum(state.batches[index].lengths) for index, _ in keys]
    width = skeleton.width
    store = ActivationStore(lengths, 1, 0, width, state.checkpoints.dtype, state.folder)  # overwritten in place
    interpolated, ids_of = _used_embeddings(
        state, submodule, [name for name in outside if not name.startswith(head_prefixes)]
    )
    for index, batch in enumerate(state.batches):
        for coefficients in by_batch[index]:
            embedded = batch.pack(skeleton.embed(ids_of(batch), interpolated(coefficients)))
            store.put_features(0, entries[index, coefficients], state.check_finite(embedded, submodule, coefficients))
    del interpolated
    for layer in range(skeleton.num_layers):
        state.announce(f"{layers_prefix}{layer}")
        names = [name for name in submodule.tensors if name.startswith(f"{layers_prefix}{layer}.")]
        interpolated = InterpolatedWeights(
            state, [submodule], lambda models, names=names: state.checkpoints.load(names, models)
        )
        for coefficients, indices in by_coefficients.items():
            weights = interpolated(coefficients)
            for index in indices:
                batch, entry = state.batches[index], entries[index, coefficients]
                hidden = batch.pad(store.features(layer, entry).to(skeleton.device))
                output = batch.pack(skeleton.layer(layer, hidden, weights))
                store.put_features(layer + 1, entry, state.check_finite(output, submodule, coefficients))
        del interpolated, weights
        state.checkpoints.flush()
    state.announce("head")
    names, last = [name for name in outside if name.startswith(head_prefixes)], skeleton.num_layers

    def features(pack: Sequence[int], coefficients: Coefficients) -> list[Tensor]:
        return [store.features(last, entries[index, coefficients]) for index in pack]

    yield from _evaluate_logits(state, submodule, names, features)
