"""Steps inside a decoder layer: whole layers, blocks, heads, norms and single matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from mergekit_slta.checkpoints.tensors import Weights
from mergekit_slta.data.batches import Batch
from mergekit_slta.models.submodules import Submodule
from mergekit_slta.runner.state import Evaluation, Mixed, Point, Walk


def _mixed(walk: Walk, step: Sequence[Submodule]) -> Mixed:
    names = list(dict.fromkeys(name for submodule in step for name in submodule.tensors))
    return Mixed(walk, step, lambda models: walk.checkpoints.load(names, models))


def block(walk: Walk, submodule: Submodule) -> Iterator[Evaluation]:
    """A whole layer, or its MLP block, which works token by token and takes several batches at once."""
    context = walk.context(submodule)
    mixed = _mixed(walk, [submodule])
    packs = walk.packs if submodule.kind == "mlp" else [[number] for number in range(len(walk.batches))]
    for pack in packs:
        rows, lengths, hidden = walk.taken(pack, [walk.hidden[number] for number in pack])

        def at(point: Point, number: int = pack[0], hidden: Tensor = hidden) -> Tensor:
            weights = {**context, **mixed(point)}
            return walk.finite(_output(walk, submodule, walk.batches[number], hidden, weights), submodule, point)

        evaluation = Evaluation(submodule, pack[0], rows, lengths, at, walk.origin)
        if submodule.step not in walk.done:
            yield evaluation
        if not walk.merged_inputs:
            sizes = [sum(walk.batches[number].lengths) for number in pack]
            parts = zip(pack, hidden.split(sizes), evaluation.base.split(sizes), strict=True)
            for number, before, after in parts:
                walk.advance(submodule, number, before, after)
        del evaluation
    if walk.merged_inputs:
        _move_on(walk, submodule, {**context, **walk.norms, **mixed("merged")})


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

    A head's output is the output projection's slice applied to the head's own features, which the queries, keys and
    values at the same point have made.
    """
    block, heads = step[0], step[1:]
    assert block.layer is not None
    layer = block.layer
    if walk.parallel is None:
        walk.parallel = walk.has_parallel_blocks(block)
    context = walk.context(*step)
    mixed = _mixed(walk, step)
    for number, batch in enumerate(walk.batches):
        hidden = walk.hidden[number].to(walk.skeleton.device)
        features: dict[Point, Tensor] = {}  # [tokens, heads], shared by the heads at one point

        def at(
            point: Point, batch: Batch = batch, hidden: Tensor = hidden, features: dict[Point, Tensor] = features
        ) -> Tensor:
            weights = {**context, **mixed(point)}
            if not heads:
                return walk.finite(_output(walk, block, batch, hidden, weights), block, point)
            output, made = walk.skeleton.attention_with_heads(layer, batch.pad(hidden), weights)
            features[point] = batch.pack(made)
            return walk.finite(batch.pack(output), block, point)

        evaluation = Evaluation(block, number, batch.rows, batch.lengths, at, walk.origin)
        if block.step not in walk.done:
            yield evaluation
            for head in heads:
                projection = head.slices[-1]
                columns = slice(projection.start, projection.stop)  # of the features: the same that it reads

                def head_at(
                    point: Point,
                    projection: tuple = projection,
                    columns: slice = columns,
                    features: dict[Point, Tensor] = features,
                    evaluation: Evaluation = evaluation,
                ) -> Tensor:
                    if point not in features:
                        evaluation.at(point)
                    tensor, axis, start, stop = projection
                    weight = mixed(point, [tensor])[tensor].narrow(axis, start, stop - start)
                    return features[point][:, columns] @ (weight.T if axis == 1 else weight)

                yield Evaluation(head, number, batch.rows, batch.lengths, head_at, walk.origin)
        if not walk.merged_inputs:
            walk.advance(block, number, hidden, evaluation.base)
        del evaluation
    if walk.merged_inputs:
        _move_on(walk, block, {**context, **walk.norms, **mixed("merged")})


def norm(walk: Walk, submodule: Submodule) -> Iterator[Evaluation]:
    """A norm by itself, on the features before it; the rows stay where they are."""
    mixed = _mixed(walk, [submodule])
    for number, batch in enumerate(walk.batches):
        hidden = walk.hidden[number].to(walk.skeleton.device)

        def at(point: Point, hidden: Tensor = hidden) -> Tensor:
            return walk.skeleton.module(submodule.name, (hidden[None],), mixed(point))[0]

        if submodule.step not in walk.done:
            yield Evaluation(submodule, number, batch.rows, batch.lengths, at, walk.origin)
    if walk.merged_inputs:
        walk.norms = mixed("merged")


def matrices(walk: Walk, step: Sequence[Submodule]) -> Iterator[Evaluation]:
    """Every module of a layer by itself, on what the module is given inside the base's layer.

    Inputs come in whatever shape the model gives them (q/k norms see heads, routers flat tokens); batches of one
    row need no padding, so that a row's output is counted as it is.
    """
    layer = step[0].layer
    assert layer is not None
    mixed = _mixed(walk, step)
    modules = [submodule.name for submodule in step]
    for number, batch in enumerate(walk.batches):
        hidden = batch.pad(walk.hidden[number].to(walk.skeleton.device))
        base = mixed(walk.origin)
        output, inputs = walk.skeleton.layer_with_inputs(layer, hidden, base, modules)
        output = walk.finite(batch.pack(output), step[0], walk.origin)
        for submodule in step if step[0].step not in walk.done else ():
            # What is no matrix takes the MLP block's weight: that block, with all that is in it, is evaluated.
            whole = submodule.kind == "mlp"
            before = _before_mlp(walk, step[0], hidden, base) if whole else None
            given_to = inputs[submodule.name]

            def at(
                point: Point, path: str = submodule.name, inputs: tuple = given_to, before: Tensor | None = before
            ) -> Tensor:
                weights = mixed(point)
                if before is not None:
                    return walk.skeleton.block(layer, "mlp", before, weights).reshape(1, -1)
                return walk.skeleton.module(path, inputs, weights).reshape(1, -1)

            yield Evaluation(submodule, number, batch.rows, (1,), at, walk.origin)
        if not walk.merged_inputs:
            walk.hidden[number] = output.cpu()
    if walk.merged_inputs:
        merged = mixed("merged")
        for number, batch in enumerate(walk.batches):
            hidden = batch.pad(walk.hidden[number].to(walk.skeleton.device))
            walk.hidden[number] = batch.pack(walk.skeleton.layer(layer, hidden, merged)).cpu()


def _before_mlp(walk: Walk, submodule: Submodule, hidden: Tensor, weights: Weights) -> Tensor:
    if walk.parallel is None:
        walk.parallel = walk.has_parallel_blocks(submodule)
    assert submodule.layer is not None
    return hidden if walk.parallel else walk.skeleton.block(submodule.layer, "attention", hidden, weights)
