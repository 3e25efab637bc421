"""Steps inside a decoder layer: whole layers, blocks, heads, norms and single matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from mergekit_slta.batches import Batch
from mergekit_slta.checkpoints import Weights
from mergekit_slta.submodules import Submodule
from mergekit_slta.walk import Evaluation, Walk


def block(walk: Walk, submodule: Submodule) -> Iterator[Evaluation]:
    """A whole layer, or its MLP block."""
    context = walk.context(submodule)
    weights = walk.checkpoints.load(submodule.tensors)
    for number, batch in enumerate(walk.batches):
        hidden = walk.hidden[number].to(walk.skeleton.device)

        def run(given: Weights, batch: Batch = batch, hidden: Tensor = hidden) -> Tensor:
            return _output(walk, submodule, batch, hidden, {**context, **given})

        base = walk.finite(run(weights[0]), submodule)
        yield Evaluation(submodule, batch.rows, batch.lengths, base, weights, run)
        if not walk.carry:
            walk.advance(submodule, number, hidden, base)
    if walk.carry:
        _move_on(walk, submodule, {**context, **walk.norms, **walk.carry([submodule], weights)})


def _output(walk: Walk, submodule: Submodule, batch: Batch, hidden: Tensor, weights: Weights) -> Tensor:
    """[tokens, d] -> [tokens, d]: the MLP over all tokens at once, what attends over padded rows."""
    assert submodule.layer is not None
    if submodule.kind == "mlp":
        return walk.skeleton.block(submodule.layer, "mlp", hidden[None], weights)[0]
    if submodule.kind == "attention":
        return batch.pack(walk.skeleton.block(submodule.layer, "attention", batch.pad(hidden), weights))
    return batch.pack(walk.skeleton.layer(submodule.layer, batch.pad(hidden), weights))


def _move_on(walk: Walk, submodule: Submodule, weights: Weights) -> None:
    """Every batch behind a block, with other weights than the base's."""
    for number, batch in enumerate(walk.batches):
        hidden = walk.hidden[number].to(walk.skeleton.device)
        walk.advance(submodule, number, hidden, _output(walk, submodule, batch, hidden, weights))


def attention(walk: Walk, step: Sequence[Submodule]) -> Iterator[Evaluation]:
    """An attention block; and, where it is divided, its heads by key/value group (A.3.5).

    A head's output is the output projection's slice applied to the head's own features, which that model's own
    queries, keys and values have made.
    """
    block, heads = step[0], step[1:]
    assert block.layer is not None
    layer = block.layer
    if walk.parallel is None:
        walk.parallel = walk.has_parallel_blocks(block)
    context = walk.context(*step)
    names = dict.fromkeys(name for submodule in step for name in submodule.tensors)
    weights = walk.checkpoints.load(list(names))
    for number, batch in enumerate(walk.batches):
        hidden = walk.hidden[number].to(walk.skeleton.device)
        features: dict[int, Tensor] = {}  # by weights: [tokens, heads], shared by the heads of one model

        def run(
            given: Weights, batch: Batch = batch, hidden: Tensor = hidden, features: dict[int, Tensor] = features
        ) -> Tensor:
            if not heads:
                return _output(walk, block, batch, hidden, {**context, **given})
            output, made = walk.skeleton.attention_with_heads(layer, batch.pad(hidden), {**context, **given})
            features[id(given)] = batch.pack(made)
            return batch.pack(output)

        base = walk.finite(run(weights[0]), block)
        yield Evaluation(block, batch.rows, batch.lengths, base, weights, run)
        for head in heads:
            projection = head.slices[-1]
            columns = _columns(head)

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
        if not walk.carry:
            walk.advance(block, number, hidden, base)
    if walk.carry:
        _move_on(walk, block, {**context, **walk.norms, **walk.carry(step, weights)})


def _columns(head: Submodule) -> slice:
    """A group's features before the output projection: the same as the columns that read them."""
    return slice(head.slices[-1].start, head.slices[-1].stop)


def norm(walk: Walk, submodule: Submodule) -> Iterator[Evaluation]:
    """A norm by itself, on the features before it; the rows stay where they are."""
    weights = walk.checkpoints.load(submodule.tensors)
    for number, batch in enumerate(walk.batches):
        hidden = walk.hidden[number].to(walk.skeleton.device)

        def run(given: Weights, hidden: Tensor = hidden) -> Tensor:
            return walk.skeleton.module(submodule.name, (hidden[None],), given)[0]

        yield Evaluation(submodule, batch.rows, batch.lengths, run(weights[0]), weights, run)
    if walk.carry:
        walk.norms = walk.carry([submodule], weights)


def matrices(walk: Walk, step: Sequence[Submodule]) -> Iterator[Evaluation]:
    """Every module of a layer by itself, on what the module is given inside the base's layer.

    Inputs come in whatever shape the model gives them (q/k norms see heads, routers flat tokens); batches of one
    row need no padding, so that a row's output is counted as it is.
    """
    layer = step[0].layer
    assert layer is not None
    names = [name for submodule in step for name in submodule.tensors]
    weights = walk.checkpoints.load(names)
    modules = [submodule.name for submodule in step]
    for number, batch in enumerate(walk.batches):
        hidden = batch.pad(walk.hidden[number].to(walk.skeleton.device))
        output, inputs = walk.skeleton.layer_with_inputs(layer, hidden, weights[0], modules)
        for submodule in step:
            # What is no matrix takes the MLP block's weight: that block, with all that is in it, is evaluated.
            whole = submodule.kind == "mlp"
            before = _before_mlp(walk, step[0], hidden, weights[0]) if whole else None
            given_to = inputs[submodule.name]

            def run(
                given: Weights, path: str = submodule.name, inputs: tuple = given_to, before: Tensor | None = before
            ) -> Tensor:
                if before is not None:
                    return walk.skeleton.block(layer, "mlp", before, given).reshape(1, -1)
                return walk.skeleton.module(path, inputs, given).reshape(1, -1)

            base = walk.finite(run(weights[0]), submodule)
            yield Evaluation(submodule, batch.rows, (1,), base, weights, run)
        if not walk.carry:
            walk.hidden[number] = batch.pack(output).cpu()
    if walk.carry:
        carried = walk.carry(step, weights)
        for number, batch in enumerate(walk.batches):
            hidden = batch.pad(walk.hidden[number].to(walk.skeleton.device))
            walk.hidden[number] = batch.pack(walk.skeleton.layer(layer, hidden, carried)).cpu()


def _before_mlp(walk: Walk, submodule: Submodule, hidden: Tensor, weights: Weights) -> Tensor:
    if walk.parallel is None:
        walk.parallel = walk.has_parallel_blocks(submodule)
    assert submodule.layer is not None
    return hidden if walk.parallel else walk.skeleton.block(submodule.layer, "attention", hidden, weights)
