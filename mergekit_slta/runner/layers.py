"""Steps inside a decoder layer: whole layers, blocks, heads, norms and single matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from mergekit_slta.checkpoints.tensors import Weights
from mergekit_slta.data.batches import Batch
from mergekit_slta.models.submodules import Submodule
from mergekit_slta.runner.state import Coefficients, Evaluation, ForwardState, InterpolatedWeights


def _mixed(state: ForwardState, group: Sequence[Submodule]) -> InterpolatedWeights:
    names = list(dict.fromkeys(name for submodule in group for name in submodule.tensors))
    return InterpolatedWeights(state, group, lambda models: state.checkpoints.load(names, models))


def block(state: ForwardState, submodule: Submodule) -> Iterator[Evaluation]:
    """A whole layer, or its MLP block, which works token by token and takes several batches at once."""
    context = state.context(submodule)
    mixed = _mixed(state, [submodule])
    packs = state.packs if submodule.kind == "mlp" else [[number] for number in range(len(state.batches))]
    for pack in packs:
        rows, lengths, hidden = state.gather_pack(pack, [state.hidden[number] for number in pack])

        def at(point: Coefficients, number: int = pack[0], hidden: Tensor = hidden) -> Tensor:
            weights = {**context, **mixed(point)}
            return state.check_finite(
                _output(state, submodule, state.batches[number], hidden, weights), submodule, point
            )

        evaluation = Evaluation(submodule, pack[0], rows, lengths, at, state.base_coefficients)
        if submodule.forward_group not in state.done:
            yield evaluation
        if not state.merged_inputs:
            sizes = [sum(state.batches[number].lengths) for number in pack]
            parts = zip(pack, hidden.split(sizes), evaluation.base.split(sizes), strict=True)
            for number, before, after in parts:
                state.advance(submodule, number, before, after)
        del evaluation
    if state.merged_inputs:
        _move_on(state, submodule, {**context, **state.norms, **mixed("merged")})


def _output(state: ForwardState, submodule: Submodule, batch: Batch, hidden: Tensor, weights: Weights) -> Tensor:
    """[tokens, d] -> [tokens, d]: the MLP over all tokens at once, what attends over padded rows."""
    assert submodule.layer is not None
    if submodule.kind == "mlp":
        return state.skeleton.block(submodule.layer, "mlp", hidden[None], weights)[0]
    if submodule.kind == "attention":
        return batch.pack(state.skeleton.block(submodule.layer, "attention", batch.pad(hidden), weights))
    return batch.pack(state.skeleton.layer(submodule.layer, batch.pad(hidden), weights))


def _move_on(state: ForwardState, submodule: Submodule, weights: Weights) -> None:
    """Every batch behind a block, with other weights than the base's."""
    for number, batch in enumerate(state.batches):
        hidden = state.hidden[number].to(state.skeleton.device)
        state.advance(submodule, number, hidden, _output(state, submodule, batch, hidden, weights))


def attention(state: ForwardState, group: Sequence[Submodule]) -> Iterator[Evaluation]:
    """An attention block; and, where it is divided, its heads by key/value group (A.3.5).

    A head's output is the output projection's slice applied to the head's own features, which the queries, keys and
    values at the same point have made.
    """
    block, heads = group[0], group[1:]
    assert block.layer is not None
    layer = block.layer
    if state.parallel is None:
        state.parallel = state.has_parallel_blocks(block)
    context = state.context(*group)
    mixed = _mixed(state, group)
    for number, batch in enumerate(state.batches):
        hidden = state.hidden[number].to(state.skeleton.device)
        features: dict[Coefficients, Tensor] = {}  # [tokens, heads], shared by the heads at one point

        def at(
            point: Coefficients,
            batch: Batch = batch,
            hidden: Tensor = hidden,
            features: dict[Coefficients, Tensor] = features,
        ) -> Tensor:
            weights = {**context, **mixed(point)}
            if not heads:
                return state.check_finite(_output(state, block, batch, hidden, weights), block, point)
            output, made = state.skeleton.attention_with_heads(layer, batch.pad(hidden), weights)
            features[point] = batch.pack(made)
            return state.check_finite(batch.pack(output), block, point)

        evaluation = Evaluation(block, number, batch.rows, batch.lengths, at, state.base_coefficients)
        if block.forward_group not in state.done:
            yield evaluation
            for head in heads:
                projection = head.slices[-1]
                columns = slice(projection.start, projection.stop)  # of the features: the same that it reads

                def head_at(
                    point: Coefficients,
                    projection: tuple = projection,
                    columns: slice = columns,
                    features: dict[Coefficients, Tensor] = features,
                    evaluation: Evaluation = evaluation,
                ) -> Tensor:
                    if point not in features:
                        evaluation.outputs_at(point)
                    tensor, axis, start, stop = projection
                    weight = mixed(point, [tensor])[tensor].narrow(axis, start, stop - start)
                    return features[point][:, columns] @ (weight.T if axis == 1 else weight)

                yield Evaluation(head, number, batch.rows, batch.lengths, head_at, state.base_coefficients)
        if not state.merged_inputs:
            state.advance(block, number, hidden, evaluation.base)
        del evaluation
    if state.merged_inputs:
        _move_on(state, block, {**context, **state.norms, **mixed("merged")})


def norm(state: ForwardState, submodule: Submodule) -> Iterator[Evaluation]:
    """A norm by itself, on the features before it; the rows stay where they are."""
    mixed = _mixed(state, [submodule])
    for number, batch in enumerate(state.batches):
        hidden = state.hidden[number].to(state.skeleton.device)

        def at(point: Coefficients, hidden: Tensor = hidden) -> Tensor:
            return state.skeleton.module(submodule.name, (hidden[None],), mixed(point))[0]

        if submodule.forward_group not in state.done:
            yield Evaluation(submodule, number, batch.rows, batch.lengths, at, state.base_coefficients)
    if state.merged_inputs:
        state.norms = mixed("merged")


def matrices(state: ForwardState, group: Sequence[Submodule]) -> Iterator[Evaluation]:
    """Every module of a layer by itself, on what the module is given inside the base's layer.

    Inputs come in whatever shape the model gives them (q/k norms see heads, routers flat tokens); batches of one
    row need no padding, so that a row's output is counted as it is.
    """
    layer = group[0].layer
    assert layer is not None
    mixed = _mixed(state, group)
    modules = [submodule.name for submodule in group]
    for number, batch in enumerate(state.batches):
        hidden = batch.pad(state.hidden[number].to(state.skeleton.device))
        base = mixed(state.base_coefficients)
        output, inputs = state.skeleton.layer_with_inputs(layer, hidden, base, modules)
        output = state.check_finite(batch.pack(output), group[0], state.base_coefficients)
        for submodule in group if group[0].forward_group not in state.done else ():
            # What is no matrix takes the MLP block's weight: that block, with all that is in it, is evaluated.
            whole = submodule.kind == "mlp"
            before = _before_mlp(state, group[0], hidden, base) if whole else None
            given_to = inputs[submodule.name]

            def at(
                point: Coefficients,
                path: str = submodule.name,
                inputs: tuple = given_to,
                before: Tensor | None = before,
            ) -> Tensor:
                weights = mixed(point)
                if before is not None:
                    return state.skeleton.block(layer, "mlp", before, weights).reshape(1, -1)
                return state.skeleton.module(path, inputs, weights).reshape(1, -1)

            yield Evaluation(submodule, number, batch.rows, (1,), at, state.base_coefficients)
        if not state.merged_inputs:
            state.hidden[number] = output.cpu()
    if state.merged_inputs:
        merged = mixed("merged")
        for number, batch in enumerate(state.batches):
            hidden = batch.pad(state.hidden[number].to(state.skeleton.device))
            state.hidden[number] = batch.pack(state.skeleton.layer(layer, hidden, merged)).cpu()


def _before_mlp(state: ForwardState, submodule: Submodule, hidden: Tensor, weights: Weights) -> Tensor:
    if state.parallel is None:
        state.parallel = state.has_parallel_blocks(submodule)
    assert submodule.layer is not None
    return hidden if state.parallel else state.skeleton.block(submodule.layer, "attention", hidden, weights)
