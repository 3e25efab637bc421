"""The derivatives of all tensors of one part of the model: the embeddings, a layer, or what follows the layers.

Scope: which tensors' derivatives come from the calls of modules, which tell the rows of a batch apart, and which from
autograd, which does not. `directional.py` computes the inner products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergekit_slta.checkpoints.tensors import Weights
from mergekit_slta.data.batches import TokenRows
from mergekit_slta.models.hooks import ModuleCall, record_calls
from mergekit_slta.runner.directional import DirectionalDerivatives, can_be_added, rows_of_outputs

Forward = Callable[[Weights], Tensor]
"""The part's tensors -> its output."""


@dataclass(frozen=True)
class Part:
    """What is known of a part.

    Attributes:
        modules: path -> module, those whose calls give the derivatives of their tensors.
        others: all other tensors; autograd computes their gradients.
    """

    modules: Mapping[str, nn.Module]
    others: tuple[str, ...]


def look_at_part(
    model: nn.Module, names: Sequence[str], forward: Forward, weights: Weights, leaf: Tensor | None
) -> Part:
    """Run a part twice on a few tokens, to see which modules give the derivatives of their tensors.

    A module does not if it is not called, if its output does not depend on the part's input, if its code is not known,
    or if a tensor of it is also used outside of it.

    Args:
        model: the model of the skeleton.
        names: the part's tensors.
        forward: runs the part.
        weights: the part's tensors.
        leaf: the part's input, which requires a gradient; None for the embeddings.
    """
    owners = {name: name.rpartition(".")[0] for name in names}
    modules = {path: module for path in owners.values() if can_be_added(module := model.get_submodule(path))}
    for path in [*modules]:  # a saved buffer is part of a module's output, too
        if any(f"{path}.{key}" in owners for key, _ in modules[path].named_buffers(recurse=False)):
            del modules[path]
    own = {name: weights[name].detach().requires_grad_() for name in names}
    with torch.enable_grad(), record_calls(modules) as calls:
        forward(weights if leaf is not None else {**weights, **own})
    modules = {path: modules[path] for path, found in calls.items() if found and all(call.shape for call in found)}
    handles = [module.register_forward_hook(lambda _, __, output: output.detach()) for module in modules.values()]
    try:
        with torch.enable_grad():
            output = forward({**weights, **own})
    finally:
        for handle in handles:
            handle.remove()
    candidates = [name for name in names if owners[name] in modules]
    if output.requires_grad and candidates:
        leaves = [own[name] for name in candidates]
        found = torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)
        for name, gradient in zip(candidates, found, strict=True):
            if gradient is not None:
                modules.pop(owners[name], None)
    return Part(modules, tuple(name for name in names if owners[name] not in modules))


@dataclass(frozen=True)
class PartRun:
    """A part of the model that has run forward, with what a backward pass needs.

    Attributes:
        output: its output.
        leaf: its input; None for the embeddings.
        own: the tensors that require a gradient: those whose gradients autograd computes, and without `leaf` all.
        calls: path -> calls of a module.
    """

    output: Tensor
    leaf: Tensor | None
    own: Weights
    calls: Mapping[str, list[ModuleCall]]


class PartDerivatives:
    """Adds the derivatives of a part's tensors, batch by batch.

    Args:
        part: what is known of the part.
        vectors: name of each tensor of the part -> [T, ...] its task vectors.
        derivatives: the sums to add to.
    """

    def __init__(self, part: Part, vectors: Weights, derivatives: DirectionalDerivatives) -> None:
        self._part, self._vectors, self._derivatives = part, vectors, derivatives

    def run(self, forward: Forward, weights: Weights, leaf: Tensor | None) -> PartRun:
        """Run the part forward; see `PartRun`."""
        names = self._part.others if leaf is not None else list(self._vectors)
        own = {name: weights[name].detach().requires_grad_() for name in names}
        with torch.enable_grad(), record_calls(self._part.modules) as calls:
            output = forward({**weights, **own})
        return PartRun(output, leaf, own, calls)

    def tells_apart(self, run: PartRun, rows: TokenRows) -> bool:
        """Whether the derivatives of each row can be computed from a run of these rows."""
        calls = [call for found in run.calls.values() for call in found if call.shape is not None]
        return rows.is_single or not (self._part.others or any(rows_of_outputs(call, rows) is None for call in calls))

    def backward(
        self, run: PartRun, at: Tensor, gradients: Sequence[Tensor], rows: TokenRows, weights: Weights
    ) -> Tensor:
        """Run the part backward for each loss, and add the derivatives.

        Args:
            run: from `run`; it tells the rows apart.
            at: the output, or a tensor that the part has computed on the way.
            gradients: S gradients with respect to `at`.
            rows: the row of each token.
            weights: the part's tensors.

        Returns:
            [S, *leaf] gradients with respect to the part's input; empty without one.
        """
        leaves = [] if run.leaf is None else [run.leaf]
        grad_in = []
        for loss, gradient in enumerate(gradients):
            found = torch.autograd.grad(
                at, [*leaves, *run.own.values()], gradient, retain_graph=loss < len(gradients) - 1, allow_unused=True
            )
            grad_in += found[: len(leaves)]
            for name, own in zip(run.own, found[len(leaves) :], strict=True):
                if name in self._part.others and own is not None:
                    self._derivatives.add(name, rows.first, loss, own, self._vectors[name])
        for path, calls in run.calls.items():
            for call in calls:
                if call.gradients:
                    module = self._part.modules[path]
                    self._derivatives.add_module(path, module, call, rows, weights, self._vectors)
        return torch.stack(grad_in) if grad_in else torch.empty(0)
