"""Evaluate the submodules of a decoder layer: whole layers, blocks, heads, norms and single matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from mergekit_slta.checkpoints.tensors import Weights
from mergekit_slta.data.batches import Batch
from mergekit_slta.models.anatomy import Block
from mergekit_slta.models.hooks import ModuleCall
from mergekit_slta.models.submodules import Submodule
from mergekit_slta.runner.state import Coefficients, Evaluation, ForwardState, InterpolatedWeights


def _interpolated_weights(state: ForwardState, group: Sequence[Submodule]) -> InterpolatedWeights:
    names = list(dict.fromkeys(name for submodule in group for name in submodule.tensors))
    return InterpolatedWeights(state, group, lambda models: state.checkpoints.load(names, models))


def evaluate_block(state: ForwardState, submodule: Submodule) -> Iterator[Evaluation]:
    """Evaluate a whole layer, or an MLP block. MLP blocks are token-wise and run on all batches of a pack at once."""
    context = state.context(submodule)
    interpolated = _interpolated_weights(state, [submodule])
    packs = state.packs if submodule.kind == "mlp" else [[index] for index in range(len(state.batches))]
    for pack in packs:
        rows, lengths, hidden = state.gather_pack(pack, [state.hidden[index] for index in pack])

        def outputs_at(coefficients: Coefficients, index: int = pack[0], hidden: Tensor = hidden) -> Tensor:
            weights = {**context, **interpolated(coefficients)}
            output = _block_output(state, submodule, state.batches[index], hidden, weights)
            return state.check_finite(output, submodule, coefficients)

        evaluation = Evaluation(submodule, pack[0], rows, lengths, outputs_at, state.base_coefficients)
        if submodule.forward_group not in state.skip:
            yield evaluation
        if not state.merged_inputs:
            sizes = [sum(state.batches[index].lengths) for index in pack]
            for index, before, after in zip(pack, hidden.split(sizes), evaluation.base.split(sizes), strict=True):
                state.advance(submodule, index, before, after)
        del evaluation
    _advance_others(state, submodule, interpolated, context)


def _block_output(state: ForwardState, submodule: Submodule, batch: Batch, hidden: Tensor, weights: Weights) -> Tensor:
    """[tokens, d] -> [tokens, d]. An MLP block runs over packed tokens, attention and whole layers over padded rows."""
    assert submodule.layer is not None
    if submodule.kind == "mlp":
        return state.skeleton.block(submodule.layer, "mlp", hidden[None], weights)[0]
    if submodule.kind == "attention":
        return batch.pack(state.skeleton.block(submodule.layer, "attention", batch.pad(hidden), weights))
    return batch.pack(state.skeleton.layer(submodule.layer, batch.pad(hidden), weights))


def _advance_others(
    state: ForwardState, submodule: Submodule, interpolated: InterpolatedWeights, context: Weights
) -> None:
    """Compute the next features that are not the base's: of the rows beside the batches, and with merged inputs."""
    for model, beside in state.beside.items():
        weights = interpolated(state.model_coefficients(model))
        _advance_all(beside, submodule, {**context, **beside.norms, **weights})
    if state.merged_inputs:
        _advance_all(state, submodule, {**context, **state.norms, **interpolated("merged")})


def _advance_all(state: ForwardState, submodule: Submodule, weights: Weights) -> None:
    """Run every batch through a layer or block with the given weights, and store its features."""
    for index, batch in enumerate(state.batches):
        hidden = state.hidden[index].to(state.skeleton.device)
        state.advance(submodule, index, hidden, _block_output(state, submodule, batch, hidden, weights))


def evaluate_attention(state: ForwardState, group: Sequence[Submodule]) -> Iterator[Evaluation]:
    """Evaluate an attention block and, if it is divided, its heads by key/value group (A.3.5).

    The output of a head is its columns of the output projection, applied to the head's features. Queries, keys, values
    and the output projection all have the same coefficients.
    """
    block, heads = group[0], group[1:]
    assert block.layer is not None
    layer = block.layer
    if block.forward_group not in state.skip:
        state.check_blocks(layer)
    context = state.context(*group)
    interpolated = _interpolated_weights(state, group)
    for index, batch in enumerate(state.batches):
        hidden = state.hidden[index].to(state.skeleton.device)
        head_features: dict[Coefficients, Tensor] = {}  # [tokens, heads * width]; the batch's heads share them

        def outputs_at(
            coefficients: Coefficients,
            batch: Batch = batch,
            hidden: Tensor = hidden,
            head_features: dict[Coefficients, Tensor] = head_features,
        ) -> Tensor:
            weights = {**context, **interpolated(coefficients)}
            if not heads:
                output = _block_output(state, block, batch, hidden, weights)
                return state.check_finite(output, block, coefficients)
            output, features = state.skeleton.attention_with_heads(layer, batch.pad(hidden), weights)
            head_features[coefficients] = batch.pack(features)
            return state.check_finite(batch.pack(output), block, coefficients)

        evaluation = Evaluation(block, index, batch.rows, batch.lengths, outputs_at, state.base_coefficients)
        if block.forward_group not in state.skip:
            yield evaluation
            for head in heads:
                projection = head.slices[-1]
                columns = slice(projection.start, projection.stop)  # the head's part of the projection's input

                def head_outputs_at(
                    coefficients: Coefficients,
                    projection: tuple = projection,
                    columns: slice = columns,
                    head_features: dict[Coefficients, Tensor] = head_features,
                    evaluation: Evaluation = evaluation,
                ) -> Tensor:
                    if coefficients not in head_features:
                        evaluation.outputs_at(coefficients)
                    tensor, axis, start, stop = projection
                    weight = interpolated(coefficients, [tensor])[tensor].narrow(axis, start, stop - start)
                    return head_features[coefficients][:, columns] @ (weight.T if axis == 1 else weight)

                yield Evaluation(head, index, batch.rows, batch.lengths, head_outputs_at, state.base_coefficients)
        if not state.merged_inputs:
            state.advance(block, index, hidden, evaluation.base)
        del evaluation
    _advance_others(state, block, interpolated, context)


def evaluate_norm(state: ForwardState, submodule: Submodule) -> Iterator[Evaluation]:
    """Evaluate a norm that is a submodule of its own. The features `hidden` do not change."""
    interpolated = _interpolated_weights(state, [submodule])
    for index, batch in enumerate(state.batches):
        hidden = state.hidden[index].to(state.skeleton.device)

        def outputs_at(coefficients: Coefficients, hidden: Tensor = hidden) -> Tensor:
            return state.skeleton.module(submodule.name, ModuleCall((hidden[None],)), interpolated(coefficients))[0]

        if submodule.forward_group not in state.skip:
            yield Evaluation(submodule, index, batch.rows, batch.lengths, outputs_at, state.base_coefficients)
    for model, beside in state.beside.items():
        beside.norms = interpolated(state.model_coefficients(model))
    if state.merged_inputs:
        state.norms = interpolated("merged")


def evaluate_matrices(state: ForwardState, group: Sequence[Submodule]) -> Iterator[Evaluation]:
    """Evaluate every module of a layer separately, on the input that it has in the base's layer.

    Tensors that are no matrices (fused experts, convolutions) are one submodule, which is evaluated with its whole
    block. The shape of inputs depends on the module (q/k norms get heads, routers flat tokens). So batches hold one
    row, which needs no padding, and an output is flattened to [1, elements].
    """
    layer = group[0].layer
    assert layer is not None
    interpolated = _interpolated_weights(state, group)
    modules = [submodule.name for submodule in group if submodule.kind in ("linear", "norm")]
    contexts = {submodule.name: state.context(submodule) for submodule in group}
    for index, batch in enumerate(state.batches):
        hidden = batch.pad(state.hidden[index].to(state.skeleton.device))
        base = interpolated(state.base_coefficients)
        output, calls = state.skeleton.layer_with_inputs(layer, hidden, base, modules)
        output = state.check_finite(batch.pack(output), group[0], state.base_coefficients)
        for submodule in group if group[0].forward_group not in state.skip else ():
            block: Block | None = None if submodule.name in calls else submodule.kind  # type: ignore[assignment]
            block_input = _block_input(state, layer, block, hidden, base) if block else hidden

            def outputs_at(
                coefficients: Coefficients,
                path: str = submodule.name,
                block: Block | None = block,
                block_input: Tensor = block_input,
                calls: dict[str, ModuleCall] = calls,
            ) -> Tensor:
                weights = {**interpolated(coefficients), **contexts[path]}
                if block is None:
                    return state.skeleton.module(path, calls[path], weights).reshape(1, -1)
                return state.skeleton.block(layer, block, block_input, weights).reshape(1, -1)

            yield Evaluation(submodule, index, batch.rows, (1,), outputs_at, state.base_coefficients)
        if not state.merged_inputs:
            state.hidden[index] = state.keep(output)
    _advance_others(state, Submodule(group[0].forward_group, "layer", layer, ()), interpolated, {})


def _block_input(state: ForwardState, layer: int, block: Block, hidden: Tensor, weights: Weights) -> Tensor:
    """Compute the input [b, s, d] of a block, whose tensors that are no matrices are evaluated with the whole block."""
    anatomy = state.skeleton.layer_anatomy(layer)
    state.check_blocks(layer)
    if block == "attention" or anatomy.parallel or not anatomy.mixers:
        return hidden
    return state.skeleton.block(layer, "attention", hidden, weights)
