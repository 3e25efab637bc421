"""The backward pass, layer by layer: derivatives of each row's losses along each submodule's task vectors.

Scope: one forward and backward pass of all rows, through their own experts, the base, or a merged model. One layer of
every model is in memory at a time. Nothing is solved here. For submodule m, loss s of a row, and expert t:

    u[s, t] = <d loss_s / d theta^m, theta_t^m - theta_0^m>      at the weights used for the row

The losses are those of `head_loss.py`. The weight gradients of linear maps are never stored completely:
`directional.py` computes and uses them block by block. All other gradients are from autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mergekit_slta.checkpoints.tensors import Checkpoints, Weights
from mergekit_slta.data.rows import Example
from mergekit_slta.models.hooks import record_calls
from mergekit_slta.models.skeleton import Skeleton, check_finite
from mergekit_slta.models.submodules import Submodule
from mergekit_slta.runner.directional import DirectionalDerivatives, task_vectors
from mergekit_slta.runner.head_loss import HeadLoss
from mergekit_slta.runner.row_weights import MergeWeights, RowEmbeddings, RowWeights
from mergekit_slta.runtime.activations import ActivationStore

DIVERGENCE = "divergence"
"""Key of `HeadLoss.divergences` ([rows] float64) among the derivatives of the head."""


def backward_layers(skeleton: Skeleton) -> list[str]:
    """Names of the layers in the order of a backward pass. The head and the embeddings count as layers."""
    layers = [f"{skeleton.layers_path}.{index}" for index in range(skeleton.num_layers)]
    return ["head", *reversed(layers), "embed"]


class BackwardPass:
    """One forward and backward pass of all rows.

    Args:
        skeleton: the model's code.
        checkpoints: every model's tensors; experts in canonical order.
        submodules: the submodules whose derivatives are computed.
        examples: the calibration rows.
        label_samples: S, labels sampled per position; 0 uses the rows' own tokens.
        seed: seed of the sampled labels.
        store: stores the rows' features and gradients.
        at: the weights used for each row, see `RowWeights`.
        teachers: per row, its expert's `completion_features`. If given, the divergence from the expert is an additional
            loss, the first one.
        announce: called with the name of the current layer.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        checkpoints: Checkpoints,
        submodules: Sequence[Submodule],
        examples: Sequence[Example],
        *,
        label_samples: int,
        seed: int,
        store: ActivationStore,
        at: MergeWeights | Literal["experts", "base"] = "experts",
        teachers: Sequence[Tensor] | None = None,
        announce: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._skeleton, self._checkpoints, self._store, self._announce = skeleton, checkpoints, store, announce
        self._teachers = teachers
        self._weights = RowWeights(skeleton, checkpoints, examples, at)
        self._rows = self._weights.rows
        self._head = HeadLoss(self._weights, store, label_samples=label_samples, seed=seed, teachers=teachers)
        self._num_losses = self._head.num_losses
        shape = (len(examples), self._num_losses, self._weights.num_experts)
        self._derivatives = DirectionalDerivatives(submodules, shape)

    def run(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield for each layer of `backward_layers`: its name, and submodule -> [rows, losses, T] float64 derivatives.

        Layers that are finished in the store are skipped. With teachers, the head's dictionary also has `DIVERGENCE`.

        Raises:
            ModelError: a weight holds NaN or Inf.
            RunError: a feature or a gradient holds NaN or Inf.
        """
        self.forward()
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
            found = self._derivatives.take()
            if name == "head" and self._teachers is not None:
                found[DIVERGENCE] = self._head.divergences
            yield name, found
            self._store.finish_layer()

    def divergences(self) -> tuple[Tensor, Tensor]:
        """Every row's divergence and losses, from a forward pass only. Needs teachers.

        Returns:
            [rows] float64, KL(expert || model) in nats; [rows, 2] float64, the losses of model and expert, see
            `HeadLoss.losses`.

        Raises:
            ModelError, RunError: as in `run`.
        """
        self.forward()
        self._head.run(None)
        self._checkpoints.flush()
        return self._head.divergences, self._head.losses

    def completion_features(self) -> list[Tensor]:
        """Per row, the last layer's outputs [completion, d] that predict its completion. Needs a forward pass."""
        last = self._skeleton.num_layers
        return [
            self._store.features(last, index)[row.completion - 1 : len(row.ids) - 1].clone()
            for index, row in enumerate(self._rows)
        ]

    def forward(self) -> None:
        """Run every row forward, layer by layer. The store keeps the features at its last depths.

        Raises:
            ModelError, RunError: as in `run`.
        """
        skeleton, store = self._skeleton, self._store
        self._embeddings_forward()
        for layer in range(store.depths_done - 1, skeleton.num_layers):
            self._announce(f"{skeleton.layers_path}.{layer}")
            for weights, rows in self._weights.load(self._weights.layer_tensors(layer)):
                for row in rows:
                    hidden = store.features(layer, row).to(skeleton.device)[None]
                    output = skeleton.layer(layer, hidden, weights)[0]
                    store.put_features(layer + 1, row, check_finite(output, f"layer {layer}"))
            store.finish_depth()
            self._checkpoints.flush()

    def _embeddings_forward(self) -> None:
        """Run every row through the embeddings; also in a resumed run, because this sets positions and masks."""
        store = self._store
        embeddings = RowEmbeddings(self._weights)
        for row in range(len(self._rows)):
            weights, ids = embeddings.of_row(row)
            embedded = self._skeleton.embed(ids, weights)[0]
            if store.depths_done == 0:
                store.put_features(0, row, check_finite(embedded, "embed"))
        if store.depths_done == 0:
            store.finish_depth()

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
            weights, ids = embeddings.of_row(row)
            models = [embeddings.of_model(row, model)[0] for model in range(self._weights.num_experts + 1)]
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
