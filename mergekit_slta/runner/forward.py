"""The layer-by-layer runner: feeds the calibration rows through the base, and hands out each submodule's outputs.

Scope: at any time one group of every model (at most a decoder layer) is in memory, and the hidden states of all rows.
Knows no Gram matrix and no solve; which weights a submodule is evaluated with is the caller's choice.

Hidden states are packed, [tokens, d] per batch: token-wise parts (MLP blocks, the head) run over all tokens at once
without padding, attention pads on the right, where no token looks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from mergekit_slta.models.submodules import Submodule
from mergekit_slta.runner import embed_head as ends
from mergekit_slta.runner import layers
from mergekit_slta.runner.state import Evaluation, ForwardState


def evaluate_submodules(state: ForwardState, submodules: Sequence[Submodule]) -> Iterator[Evaluation]:
    """Every evaluation of a state through the model, submodule by submodule and batch by batch.

    Args:
        state: a fresh one: the model's code, the models' tensors, the calibration rows, and what is done already.
        submodules: all submodules, in the order of a forward pass.

    Raises:
        ModelError: a weight holds NaN or Inf, or the blocks do not add up to the layer.
        RunError: a feature is NaN or Inf; the message names the submodule.
    """
    groups = [list(group) for _, group in groupby(submodules, key=lambda submodule: submodule.forward_group)]
    for group, following in zip(groups, [*groups[1:], []], strict=True):
        if following and following[0].layer is not None:  # the head is read part by part
            names = [name for submodule in following for name in submodule.tensors]
            base_only = following[0].forward_group in state.done and not state.merged_inputs
            state.checkpoints.prefetch(names, [0] if base_only else None)
        kinds = {submodule.kind for submodule in group}
        if "model" in kinds:
            yield from ends.whole_model(state, group[0])
        elif "embed" in kinds:
            yield from ends.embed(state, group[0])
        elif "head" in kinds:
            yield from ends.head(state, group[0])
        elif "attention" in kinds:
            yield from layers.attention(state, group)
        elif kinds <= {"layer", "mlp"}:
            yield from layers.block(state, group[0])
        elif group[0].name == group[0].forward_group:  # a norm by itself: shared by both blocks, or before the head
            yield from layers.norm(state, group[0])
        else:
            yield from layers.matrices(state, group)
        state.checkpoints.flush()
