"""The backward pass, layer by layer: derivatives of each row's losses along each submodule's task vectors.

Scope: one backward pass of all rows, through their own experts or a merged model; `lanes.py` has run them forward. One
layer of every model is in memory at a time. Nothing is solved here. For submodule m, loss s of a row, and expert t:

    u[s, t] = <d loss_s / d theta^m, theta_t^m - theta_0^m>      at the weights used for the row

The losses are those of `head_loss.py`. The weight gradients of linear maps are never stored completely:
`directional.py` computes and uses them block by block. All other gradients are from autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from mergekit_slta.checkpoints.tensors import Weights
from mergekit_slta.data.rows import Example
from mergekit_slta.models.hooks import record_calls
from mergekit_slta.models.skeleton import Skeleton, check_finite
from mergekit_slta.models.submodules import Submodule
from mergekit_slta.runner.directional import DirectionalDerivatives, task_vectors
from mergekit_slta.runner.head_loss import HeadLoss
from mergekit_slta.runner.lanes import Lane
from mergekit_slta.runner.row_weights import RowEmbeddings


def backward_layers(skeleton: Skeleton) -> list[str]:
    """Names of the layers in the order of a backward pass. The head and the embeddings count as layers."""
    layers = [f"{skeleton.layers_path}.{index}" for index in range(skeleton.num_layers)]
    return ["head", *reversed(layers), "embed"]


class BackwardPass:
    """The backward pass of all rows of a lane, after its forward pass.

    Args:
        lane: the rows, their weights and their features; its store holds the features of all depths.
        submodules: the submodules whose derivatives are computed.
        examples: the calibration rows.
        label_samples: S, labels sampled per position; 0 uses the rows' own tokens.
        seed: seed of the sampled labels.
        experts: the lane that ran every row through its expert. If given, the divergence from the expert is an
            additional loss, the first one.
        announce: called with the name of the current layer.
    """

    def __init__(
        self,
        lane: Lane,
        submodules: Sequence[Submodule],
        examples: Sequence[Example],
        *,
        label_samples: int,
        seed: int,
        experts: Lane | None = None,
        announce: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._weights, self._store, self._announce = lane.weights, lane.store, announce
        self._skeleton, self._checkpoints = lane.weights.skeleton, lane.weights.checkpoints
        self._rows = self._weights.rows
        self._head = HeadLoss(lane, experts, examples, label_samples=label_samples, seed=seed)
        self._num_losses = self._head.num_losses
        shape = (len(self._rows), self._num_losses, self._weights.num_models)
        self._derivatives = DirectionalDerivatives(submodules, shape)

    def run(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield for each layer of `backward_layers`: its name, and submodule -> [rows, losses, T] float64 derivatives.

        Layers that are finished in the store are skipped.

        Raises:
            ModelError: a weight holds NaN or Inf.
            RunError: a gradient holds NaN or Inf.
        """
        for number, name in enumerate(backward_layers(self._skeleton)):
            if number < self._store.layers_done:
                continue
            self._announce(name)
            if name == "head":
                self._head.run(self._derivatives)
            elif name == "embed":
                self._embeddings_backward()
            else:
                self._layer_backward(self._skeleton.num_layers - number)
            self._checkpoints.flush()
            yield name, self._derivatives.take()
            self._store.finish_layer()

    def _layer_backward(self, layer: int) -> None:
        """Compute a decoder layer's derivatives, and the gradients with respect to its input."""
        skeleton, store = self._skeleton, self._store
        names = self._weights.layer_tensors(layer)
        loaded = self._checkpoints.load(names)
        shared = self._weights.shared(loaded)
        # `pop` frees each tensor after its task vectors are computed, so that only one tensor exists twice.
        vectors = {name: task_vectors([weights.pop(name) for weights in loaded]) for name in names}
        linears: dict[str, nn.Linear] | None = None
        for weights, rows in self._weights.load(names, shared):
            if linears is None:
                linears = self._linear_maps(layer, names, weights, rows[0])
            others = [name for name in names if name.removesuffix(".weight") not in linears]
            for row in rows:
                hidden = store.features(layer, row).to(skeleton.device).detach().requires_grad_()
                own = {name: weights[name].detach().requires_grad_() for name in others}
                with torch.enable_grad(), record_calls(linears) as recorded:
                    output = skeleton.layer(layer, hidden[None], {**weights, **own})[0]
                grad_out = store.gradients(row).to(hidden.device)  # [losses, tokens, d]
                grad_in = torch.empty_like(grad_out)
                for loss in range(self._num_losses):
                    gradients = torch.autograd.grad(
                        output, [hidden, *own.values()], grad_out[loss], retain_graph=loss < self._num_losses - 1,
                        allow_unused=True,
                    )  # fmt: skip
                    grad_in[loss] = check_finite(gradients[0], f"{skeleton.layers_path}.{layer}")
                    self._derivatives.add_each(own, row, loss, gradients[1:], vectors)
                    for path, calls in recorded.items():
                        name = f"{path}.weight"
                        for call in calls:
                            self._derivatives.add_linear(name, row, loss, call.inputs[0], call.gradient, vectors[name])
                store.put_gradients(row, grad_in)

    def _linear_maps(self, layer: int, names: Sequence[str], weights: Weights, row: int) -> dict[str, nn.Linear]:
        """A layer's linear maps by path: modules of the exact class nn.Linear that the layer's forward calls."""
        skeleton, prefix = self._skeleton, f"{self._skeleton.layers_path}.{layer}."
        paths = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
        modules = {path: skeleton.layers[layer].get_submodule(path.removeprefix(prefix)) for path in paths}
        linears = {path: module for path, module in modules.items() if type(module) is nn.Linear}
        hidden = self._store.features(layer, row).to(skeleton.device)[None]
        with record_calls(linears) as recorded:
            skeleton.layer(layer, hidden, weights)
        return {path: module for path, module in linears.items() if recorded[path]}

    def _embeddings_backward(self) -> None:
        """Compute the derivatives of everything before the layers."""
        table = self._skeleton.embedding_weight
        embeddings = RowEmbeddings(self._weights)
        for row in range(len(self._rows)):
            weights, ids = embeddings.of_row(row, self._weights)
            models = [embeddings.of_model(row, model)[0] for model in range(self._weights.num_models + 1)]
            vectors = {name: task_vectors([tensors[name] for tensors in models]) for name in weights}
            own = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
            with torch.enable_grad():
                output = self._skeleton.embed(ids, own)[0]
            grad_out = self._store.gradients(row).to(output.device)  # [losses, tokens, d]
            for loss in range(self._num_losses):
                gradients = torch.autograd.grad(
                    output, list(own.values()), grad_out[loss], retain_graph=loss < self._num_losses - 1,
                    allow_unused=True,
                )  # fmt: skip
                for name, gradient in zip(own, gradients, strict=True):
                    if gradient is not None:
                        self._derivatives.add(name, row, loss, gradient, vectors[name], whole=name == table)
