"""The forward pass, layer by layer: runs the calibration rows through the model and evaluates every submodule.

Scope: evaluation only; no Gram matrices, no solve. The caller chooses the weights with which a submodule is evaluated.
The features of all rows and one forward group of every model (at most a decoder layer) are in memory.

Features are packed, [tokens, d] per batch. Token-wise submodules (MLP blocks, the head) run over all tokens at once
without padding. For attention, rows are padded on the right, where causal attention ignores the padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from mergekit_slta.models.submodules import Submodule
from mergekit_slta.runner import embed_head, layers
from mergekit_slta.runner.state import Evaluation, ForwardState


def evaluate_submodules(state: ForwardState, submodules: Sequence[Submodule]) -> Iterator[Evaluation]:
    """Evaluate every submodule on every batch, in the order of a forward pass.

    An evaluation holds its forward group's weights. Delete it before taking the next one, to free them.

    Args:
        state: a new state, without features.
        submodules: all submodules, in the order of a forward pass.

    Raises:
        ModelError: a weight holds NaN or Inf, or the blocks do not add up to the layer.
        RunError: a feature holds NaN or Inf; the message names the submodule.
    """
    groups = [list(group) for _, group in groupby(submodules, key=lambda submodule: submodule.forward_group)]
    for group, following in zip(groups, [*groups[1:], []], strict=True):
        if following and following[0].layer is not None:  # the head loads its tensors in parts
            names = [name for submodule in following for name in submodule.tensors]
            base_only = following[0].forward_group in state.skip and not (state.merged_inputs or state.beside)
            state.checkpoints.prefetch(names, [0] if base_only else None)
        kinds = {submodule.kind for submodule in group}
        if "model" in kinds:
            yield from embed_head.evaluate_model(state, group[0])
        elif "embed" in kinds:
            yield from embed_head.evaluate_embeddings(state, group[0])
        elif "head" in kinds:
            yield from embed_head.evaluate_head(state, group[0])
        elif group[0].name != group[0].forward_group:  # the group is a layer
            yield from layers.evaluate_matrices(state, group)
        elif "attention" in kinds:
            yield from layers.evaluate_attention(state, group)
        elif kinds <= {"layer", "mlp"}:
            yield from layers.evaluate_block(state, group[0])
        else:  # a single norm: it feeds both blocks, or the head
            yield from layers.evaluate_norm(state, group[0])
        state.finish_checks()
        state.checkpoints.flush()
