"""The backward pass, layer by layer: derivatives of each row's losses along each submodule's task vectors.

Scope: one backward pass of all batches, through their own experts or a merged model; `lanes.py` has run them forward.
One layer of every model is in memory at a time. Nothing is solved here. For submodule m, loss s of a row, and expert t:

    u[s, t] = <d loss_s / d theta^m, theta_t^m - theta_0^m>      at the weights used for the row

The losses are those of `head_loss.py`; `part_derivatives.py` computes the inner products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mergekit_slta.checkpoints.tensors import Weights
from mergekit_slta.data.batches import Batch
from mergekit_slta.data.rows import Example
from mergekit_slta.models.skeleton import Skeleton, check_finite
from mergekit_slta.models.submodules import Submodule
from mergekit_slta.runner.directional import DirectionalDerivatives, task_vectors
from mergekit_slta.runner.head_loss import HeadLoss
from mergekit_slta.runner.lanes import Lane
from mergekit_slta.runner.part_derivatives import Part, PartDerivatives, look_at_part
from mergekit_slta.runner.row_weights import RowEmbeddings


def backward_layers(skeleton: Skeleton) -> list[str]:
    """Names of the layers in the order of a backward pass. The head and the embeddings count as layers."""
    layers = [f"{skeleton.layers_path}.{index}" for index in range(skeleton.num_layers)]
    return ["head", *reversed(layers), "embed"]


class BackwardPass:
    """The backward pass of all batches of a lane, after its forward pass.

    Args:
        lane: the rows, their weights and their features; its store holds the features of all depths.
        submodules: the submodules whose derivatives are computed.
        examples: the calibration rows.
        label_samples: S, labels sampled per position; 0 uses the rows' own tokens.
        seed: seed of the sampled labels.
        experts: the lane that ran every row through its expert. If given, the divergence from the expert is an
            additional loss, the first one.
        parts: what is known of the layers, and of what is before and after them; completed by this pass.
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
        parts: dict[str, Part] | None = None,
        announce: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._weights, self._store, self._announce = lane.weights, lane.store, announce
        self._skeleton, self._checkpoints = lane.weights.skeleton, lane.weights.checkpoints
        self._parts: dict[str, Part] = {} if parts is None else parts
        self._head = HeadLoss(lane, experts, examples, label_samples=label_samples, seed=seed)
        shape = (len(self._weights.rows), self._head.num_losses, self._weights.num_models)
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
                self._head.run(self._derivatives, self._parts)
            elif name == "embed":
                self._embeddings_backward()
            else:
                self._layer_backward(self._skeleton.num_layers - number)
            if name != "embed":
                check_finite(self._store.new_gradients(), name)
            self._checkpoints.flush()
            yield name, self._derivatives.take()
            self._store.finish_layer()

    def _layer_backward(self, layer: int) -> None:
        """Compute a decoder layer's derivatives, and the gradients with respect to its input."""
        skeleton = self._skeleton
        names = self._weights.layer_tensors(layer)
        loaded = self._checkpoints.load(names)
        shared = self._weights.shared(loaded)
        # `pop` frees each tensor after its task vectors are computed, so that only one tensor exists twice.
        vectors = {name: task_vectors([weights.pop(name) for weights in loaded]) for name in names}
        vectors = skeleton.for_products(vectors)
        # A router sends the tokens of all rows that run together through the same modules, in another order.
        is_routed = layer in skeleton.routers
        name = f"{skeleton.layers_path}.{layer}"

        # Not recursive: a function that refers to itself keeps the layer's weights until the garbage collector runs.
        def backward(batch: Batch, features: Tensor, grad_out: Tensor, weights: Weights) -> Tensor | None:
            """[tokens, d] features and [S, tokens, d] gradients -> [S, tokens, d] gradients by the features; None if
            the rows must run one by one."""
            hidden = batch.pad(features.to(skeleton.device)).detach().requires_grad_()
            run = None
            if len(batch.rows) == 1 or not (is_routed or self._parts[name].others):
                run = part.run(lambda own: skeleton.layer(layer, hidden, own), weights, hidden)
            if run is None or not part.tells_apart(run, batch.token_rows):
                return None
            gradients = [batch.pad(gradient) for gradient in grad_out.to(skeleton.device)]
            found = part.backward(run, run.output, gradients, batch.token_rows, weights)
            return torch.stack([batch.pack(gradient) for gradient in found])

        for weights, indices in self._weights.load(names, shared):
            if name not in self._parts:
                batch, features = self._weights.batches[indices[0]], self._store.features(layer, indices[0])
                leaf = features[None, batch.positions[0]].to(skeleton.device).detach().requires_grad_()
                self._parts[name] = look_at_part(
                    skeleton.model, names, lambda own: skeleton.layer(layer, leaf, own), weights, leaf  # noqa: B023
                )  # fmt: skip
            part = PartDerivatives(self._parts[name], vectors, self._derivatives)
            for index in indices:
                batch, features = self._weights.batches[index], self._store.features(layer, index)
                grad_out = self._store.gradients(index)
                grad_in = backward(batch, features, grad_out, weights)
                if grad_in is None:
                    each = zip(batch.alone(), batch.positions, strict=True)
                    alone = [backward(row, features[tokens], grad_out[:, tokens], weights) for row, tokens in each]
                    grad_in = torch.cat([found for found in alone if found is not None], dim=1)
                self._store.put_gradients(index, grad_in)

    def _embeddings_backward(self) -> None:
        """Compute the derivatives of everything before the layers."""
        skeleton = self._skeleton
        embeddings = RowEmbeddings(self._weights)

        def backward(index: int, batch: Batch, grad_out: Tensor) -> bool:
            """Add the derivatives of batch `index`, or of some of its rows; [S, tokens, d] gradients. Returns whether
            it was done; else the rows must run one by one."""
            every = [embeddings.of_model(batch, model) for model in range(self._weights.num_models + 1)]
            weights, ids = embeddings.of_batch(index, self._weights, batch)
            vectors = {name: task_vectors([tensors[name] for tensors, _ in every]) for name in weights}

            def forward(own: Weights) -> Tensor:
                return skeleton.embed(ids, own)

            if "embed" not in self._parts:
                self._parts["embed"] = look_at_part(skeleton.model, list(weights), forward, weights, None)
            part = PartDerivatives(self._parts["embed"], vectors, self._derivatives)
            run = part.run(forward, weights, None)
            if not part.tells_apart(run, batch.token_rows):
                return False
            gradients = [batch.pad(gradient) for gradient in grad_out.to(skeleton.device)]
            part.backward(run, run.output, gradients, batch.token_rows, weights)
            return True

        for index, batch in enumerate(self._weights.batches):
            grad_out = self._store.gradients(index)
            if not backward(index, batch, grad_out):
                for row, tokens in zip(batch.alone(), batch.positions, strict=True):
                    backward(index, row, grad_out[:, tokens])
