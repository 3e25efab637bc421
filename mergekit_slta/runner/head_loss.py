"""Compute every row's losses at the output head, and their gradients with respect to the last layer's output.

Scope: final norm and output projection, for a backward pass. A loss is the next-token cross-entropy, summed over the
row's completion. The labels are sampled S times from the model's own distribution, so that the second moment of the
gradients is the true Fisher information. With S = 0 the labels are the row's own tokens. With teachers there is an
additional loss, the first: KL(expert of the row's task || model), summed over the completion.

The gradient of a cross-entropy with respect to the logits is p - e_y (probabilities, one-hot label), that of the
divergence p - q. So all losses share the products with p, and a label needs one row of the output projection.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergekit_slta.checkpoints.tensors import Weights
from mergekit_slta.data.rows import Example
from mergekit_slta.errors import ModelError
from mergekit_slta.runner.directional import DirectionalDerivatives, block_rows, task_vectors
from mergekit_slta.runner.lanes import Lane
from mergekit_slta.runner.output_head import AnswerPart, Head, answer_part
from mergekit_slta.runner.part_derivatives import Part, PartDerivatives, look_at_part

LOGIT_GRADIENTS = 2**23
"""Maximum number of logit gradients in memory, over positions and vocabulary."""
CUMULATIVE_ELEMENTS = 2**22
"""Maximum number of cumulative probabilities in memory, in float64."""


@dataclass(frozen=True)
class _Projected:
    """Losses at some positions, for the derivatives of the output projection.

    Attributes:
        part: the positions.
        inputs: [n, d] inputs of the projection.
        probs: [P, n, V] p, and with teachers q; each times d logit / d output of the projection.
        labels: [S, n] int64.
        label_weights: [S, n] d logit / d output of the projection, at the label.
        products: [n, 1 + S or S, T] inner products with the task vectors, so far.
    """

    part: AnswerPart
    inputs: Tensor
    probs: Tensor
    labels: Tensor
    label_weights: Tensor
    products: Tensor


class HeadLoss:
    """The losses of all rows of a lane.

    Args:
        lane: the rows, their weights and their features; the gradients with respect to the features are stored there.
        experts: the lane of the teachers; None for no teachers.
        examples: the rows with their tasks.
        label_samples: S, labels sampled per position; 0 uses the row's own tokens.
        seed: seed of the sampled labels.

    Attributes:
        num_losses: losses per row: max(1, S), and one more with teachers.
    """

    def __init__(
        self, lane: Lane, experts: Lane | None, examples: Sequence[Example], *, label_samples: int, seed: int
    ) -> None:
        self._weights, self._store, self._experts, self._examples = lane.weights, lane.store, experts, examples
        self._skeleton, self._checkpoints = lane.weights.skeleton, lane.weights.checkpoints
        self._label_samples, self._seed = label_samples, seed
        self.num_losses = max(1, label_samples) + (experts is not None)

    def run(self, derivatives: DirectionalDerivatives, parts: dict[str, Part]) -> None:
        """Compute all rows' losses and gradients.

        Args:
            derivatives: the derivatives of all tensors after the layers are added to it.
            parts: what is known of the model's parts; "head" is added.

        Raises:
            ModelError: a weight holds NaN or Inf, or the logits are no function of the projection's outputs one by one.
        """
        skeleton = self._skeleton
        head = Head(self._weights)
        vectors = {name: task_vectors([weights[name] for weights in head.loaded]) for name in head.names}
        bias = vectors.pop(skeleton.head_weight.removesuffix("weight") + "bias", None)
        shared = head.shared(self._weights)
        size = max(1, LOGIT_GRADIENTS // head.vocabulary)
        for task, batches in self._weights.by_task.items():
            expert = head.of_expert(task)
            waiting: list[_Projected] = []
            for index in batches:
                features = self._store.features(skeleton.num_layers, index).to(skeleton.device)
                grad_in = features.new_zeros((self.num_losses, *features.shape))
                if "head" not in parts:
                    leaf = features[None, :1].detach().requires_grad_()
                    parts["head"] = look_at_part(
                        skeleton.model, list(vectors), lambda own: skeleton.head(leaf, own), shared or expert, leaf  # noqa: B023
                    )  # fmt: skip
                outer = PartDerivatives(parts["head"], vectors, derivatives)
                for part in answer_part(self._weights, index).split(size, by_row=bool(parts["head"].others)):
                    waiting.append(self._losses(index, part, features, head, shared or expert, expert, outer, grad_in))
                    if sum(each.probs[0].numel() for each in waiting) >= LOGIT_GRADIENTS:
                        self._add_projection(waiting, head, bias, derivatives)
                        waiting = []
                self._store.put_gradients(index, grad_in)
            self._add_projection(waiting, head, bias, derivatives)

    def _losses(
        self,
        index: int,
        part: AnswerPart,
        features: Tensor,
        head: Head,
        weights: Weights,
        expert: Weights,
        outer: PartDerivatives,
        grad_in: Tensor,
    ) -> _Projected:
        """Compute the losses at some positions of batch `index`, whose features are [tokens, d].

        Puts the gradients with respect to the features into `grad_in` [losses, tokens, d], and adds the derivatives of
        all tensors except the output projection.
        """
        skeleton = self._skeleton
        positions = part.positions.to(features.device)
        hidden = features[positions].detach().requires_grad_()
        projection, outputs = skeleton.model.get_output_embeddings(), []
        handle = projection.register_forward_hook(lambda *call: outputs.append((call[1][0], call[2])))
        run = outer.run(lambda own: skeleton.head(hidden[None], own), weights, hidden)
        handle.remove()
        (inputs, projected), logits = outputs[0], run.output
        slopes = _slopes(logits, projected)
        stacked = logits.new_empty((1 + (self._experts is not None), *logits.shape[1:]), dtype=torch.float32)
        torch.softmax(logits[0].detach().float(), dim=-1, out=stacked[0])
        labels = self._labels(part, stacked[0])
        if self._experts is not None:
            taught = self._experts.store.features(skeleton.num_layers, index)
            torch.exp(head.log_probs(taught, part, expert), out=stacked[1])
        stacked = stacked.to(projected.dtype)
        label_weights = torch.ones_like(labels, dtype=projected.dtype)
        if slopes is not None:
            stacked *= slopes
            label_weights = slopes.gather(1, labels.T).T
        matrix = weights[skeleton.head_weight]
        products = stacked @ matrix  # [P, n, d]
        gradients = [products[0] - products[1]] if self._experts is not None else []
        for label, weight in zip(labels, label_weights, strict=True):
            gradients.append(products[0] - weight[:, None] * matrix[label])
        gradients = [gradient.view_as(inputs) for gradient in gradients]
        grad_in[:, positions] = outer.backward(run, inputs, gradients, part.token_rows, weights)
        sums = stacked.new_zeros((len(positions), self.num_losses, self._weights.num_models))
        return _Projected(part, inputs.detach()[0], stacked, labels, label_weights, sums)

    def _labels(self, part: AnswerPart, probs: Tensor) -> Tensor:
        """[max(1, S), n] int64 labels of the cross-entropies."""
        uniforms = []
        for row in part.rows.unique_consecutive().tolist():
            drawn = label_uniforms(self._examples[row], self._label_samples, self._seed)
            if drawn is None:
                return part.labels[None].to(probs.device)
            uniforms.append(drawn[:, part.places[part.rows == row]])
        return sample_labels(probs, torch.cat(uniforms, dim=1))

    def _add_projection(
        self,
        waiting: Sequence[_Projected],
        head: Head,
        bias: Tensor | None,
        derivatives: DirectionalDerivatives,
    ) -> None:
        """Add the derivatives of the output projection, in parts of the vocabulary, and of its bias [T, V]."""
        if not waiting:
            return
        block = block_rows(head.raw[0].shape[1], self._skeleton.device)
        for start in range(0, head.vocabulary, block):
            part = slice(start, min(start + block, head.vocabulary))
            along = task_vectors(
                [self._checkpoints.place(tensor[part], head.source, model) for model, tensor in enumerate(head.raw)]
            )
            for each in waiting:
                changes = nn.functional.linear(each.inputs, along.flatten(0, 1))  # [n, T * block]
                _add_products(each, changes.view(len(each.inputs), len(along), -1), part)
        _flush(head.source, waiting, derivatives)
        if bias is not None:
            for each in waiting:
                _add_products(each, bias[None].expand(len(each.inputs), -1, -1), slice(0, head.vocabulary))
            _flush(self._skeleton.head_weight.removesuffix("weight") + "bias", waiting, derivatives)


def _flush(name: str, waiting: Sequence[_Projected], derivatives: DirectionalDerivatives) -> None:
    """Add the inner products so far to a tensor's derivatives, and reset them."""
    for each in waiting:
        derivatives.add_products(name, each.part.rows, each.products)
        each.products.zero_()


def _add_products(to: _Projected, changes: Tensor, part: slice) -> None:
    """Add the inner products of all losses' gradients with the changes [n, T, v] of the outputs `part`."""
    shared = torch.bmm(to.probs[:, :, part].transpose(0, 1), changes.transpose(1, 2))  # [n, P, T]
    num_labels = len(to.labels)
    if shared.shape[1] > 1:
        to.products[:, 0] += shared[:, 0] - shared[:, 1]
    inside = (to.labels >= part.start) & (to.labels < part.stop)
    places = torch.where(inside, to.labels - part.start, 0)
    chosen = changes[torch.arange(len(changes), device=changes.device), :, places]  # [S, n, T]
    weights = torch.where(inside, to.label_weights, 0)
    to.products[:, -num_labels:] += shared[:, :1] - (weights[..., None] * chosen).transpose(0, 1)


def _slopes(logits: Tensor, outputs: Tensor) -> Tensor | None:
    """The derivative [n, V] of every logit by the output of the projection that it is computed from; None if all are 1.

    Raises:
        ModelError: a logit depends on several outputs.
    """
    if logits is outputs:
        return None
    (slopes,) = torch.autograd.grad(logits, outputs, torch.ones_like(logits), retain_graph=True)
    probe = torch.linspace(0, 1, logits.shape[-1], dtype=logits.dtype, device=logits.device).expand_as(logits)
    (probed,) = torch.autograd.grad(logits, outputs, probe, retain_graph=True)
    if not torch.allclose(probed, probe.to(outputs.dtype) * slopes, rtol=1e-3, atol=1e-6):
        raise ModelError(
            "a logit of this model depends on several outputs of its output projection: use `objective: features`, and "
            "please report the model",
            code="unknown-blocks",
        )
    return slopes[0]


def label_uniforms(example: Example, samples: int, seed: int) -> Tensor | None:
    """Draw uniform numbers for sampling a row's labels, [S, positions] float64; None if `samples` is 0.

    They depend only on the seed, the row's tokens, and how many equal rows are before it: not on the process, the order
    of rows, the row's number in its dataset, or the other experts.
    """
    if not samples:
        return None
    row = example.row
    content = hashlib.sha256(repr((seed, example.repeat, row.ids)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(content[:8], "little") >> 1)
    return torch.rand((samples, len(row.ids) - row.completion), generator=generator, dtype=torch.float64)


def sample_labels(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Sample [S, n] int64 tokens from probabilities [n, V] and uniforms [S, n], by inverse transform sampling."""
    source = probs.cpu() if probs.device.type == "mps" else probs  # MPS has no float64
    size = max(1, CUMULATIVE_ELEMENTS // probs.shape[1])
    found = []
    for own, drawn in zip(source.split(size), uniforms.T.contiguous().to(source.device).split(size), strict=True):
        cumulative = own.cumsum(-1, dtype=torch.float64)
        found.append(torch.searchsorted(cumulative, drawn * cumulative[:, -1:]))  # [n, S]
    return torch.cat(found).T.clamp(max=probs.shape[1] - 1).to(probs.device)
