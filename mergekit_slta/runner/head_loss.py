"""Compute every row's losses at the output head, and their gradients with respect to the last layer's output.

Scope: final norm and output projection, for a backward pass. A loss is the next-token cross-entropy, summed over the
row's completion. The labels are sampled S times from the model's own distribution, so that the second moment of the
gradients is the true Fisher information. With S = 0 the labels are the row's own tokens. With teachers there is an
additional loss, the first: KL(expert of the row's task || model), summed over the completion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mergekit_slta.checkpoints.tensors import Weights
from mergekit_slta.data.rows import Example
from mergekit_slta.models.hooks import record_calls
from mergekit_slta.models.skeleton import check_finite
from mergekit_slta.runner.directional import DirectionalDerivatives, block_rows, task_vectors
from mergekit_slta.runner.lanes import Head, Lane

LOGIT_GRADIENTS = 2**24
"""Maximum number of logit gradients in memory, over rows, losses, positions and vocabulary."""


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

    def run(self, derivatives: DirectionalDerivatives) -> None:
        """Compute all rows' losses and gradients.

        Args:
            derivatives: the derivatives of all tensors after the layers are added to it.

        Raises:
            ModelError: a weight holds NaN or Inf.
            RunError: a gradient holds NaN or Inf.
        """
        head = Head(self._weights)
        vectors = {name: task_vectors([weights[name] for weights in head.loaded]) for name in head.names}
        shared = head.shared(self._weights)
        max_positions = max(1, LOGIT_GRADIENTS // head.vocabulary)
        for task, rows in self._weights.by_task.items():
            expert = head.of_expert(task)
            waiting: list[tuple[int, Tensor, Tensor]] = []  # (row, inputs [n, d], gradients [losses, n, V])
            for row in rows:
                parts = self._row_loss(row, head, shared or expert, expert, vectors, max_positions, derivatives)
                for inputs, gradients in parts:
                    waiting.append((row, inputs, gradients))
                    if sum(kept.numel() for *_, kept in waiting) >= LOGIT_GRADIENTS:
                        self._add_projection(waiting, head, derivatives)
                        waiting = []
            self._add_projection(waiting, head, derivatives)

    def _row_loss(
        self,
        row: int,
        head: Head,
        weights: Weights,
        expert: Weights,
        vectors: Mapping[str, Tensor],
        max_positions: int,
        derivatives: DirectionalDerivatives,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Compute a row's losses, at most `max_positions` positions at a time.

        Stores the gradients with respect to the last layer's output, and adds the derivatives of all tensors except
        the output projection.

        Yields:
            The inputs [n, d] of the output projection at n positions, and the gradients [losses, n, V] with respect to
            its outputs.
        """
        skeleton, num_tokens = self._skeleton, len(self._weights.rows[row].ids)
        features = self._store.features(skeleton.num_layers, row).to(skeleton.device)
        grad_in = features.new_zeros((self.num_losses, *features.shape))
        for start in range(self._weights.rows[row].completion - 1, num_tokens - 1, max_positions):
            positions = slice(start, min(start + max_positions, num_tokens - 1))
            hidden = features[positions].detach().requires_grad_()
            own = {name: weights[name].detach().requires_grad_() for name in vectors}
            with torch.enable_grad(), record_calls({"head": skeleton.model.get_output_embeddings()}) as calls:
                logits = skeleton.head(hidden[None], {**weights, **own})[0]
            log_probs = torch.log_softmax(logits.detach().float(), dim=-1)
            call, collected = calls["head"][0], []
            for loss, grad_out in enumerate(self._logit_gradients(row, positions, log_probs, head, expert)):
                gradients = torch.autograd.grad(
                    logits, [hidden, *own.values()], grad_out.to(logits.dtype),
                    retain_graph=loss < self.num_losses - 1, allow_unused=True,
                )  # fmt: skip
                grad_in[loss, positions] = check_finite(gradients[0], "head")
                derivatives.add_each(own, row, loss, gradients[1:], vectors)
                collected.append(call.gradient.flatten(0, -2))
            yield call.inputs[0].detach().flatten(0, -2), torch.stack(collected)
        self._store.put_gradients(row, grad_in)

    def _logit_gradients(
        self, row: int, positions: slice, log_probs: Tensor, head: Head, expert: Weights
    ) -> Iterator[Tensor]:
        """Yield, for every loss, the gradients [n, V] with respect to the logits at `positions`.

        `log_probs` [n, V] are the model's.
        """
        own, probs = self._weights.rows[row], log_probs.exp()
        first = positions.start - own.completion + 1  # position within the completion
        if self._experts is not None:
            taught = self._experts.store.features(self._skeleton.num_layers, row)[positions]
            yield probs - head.log_probs(taught, expert).exp()
        uniforms = label_uniforms(self._examples[row], self._label_samples, self._seed)
        for sample in range(max(1, self._label_samples)):
            if uniforms is None:
                labels = torch.as_tensor(list(own.ids[positions.start + 1 : positions.stop + 1]), device=probs.device)
            else:
                labels = sample_labels(probs, uniforms[sample, first : first + len(probs)])
            gradient = probs.clone()
            gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
            yield gradient

    def _add_projection(
        self, waiting: Sequence[tuple[int, Tensor, Tensor]], head: Head, derivatives: DirectionalDerivatives
    ) -> None:
        """Add the output projection's derivatives, in parts of the vocabulary."""
        if not waiting:
            return
        block = block_rows(head.raw[0])
        for start in range(0, head.vocabulary, block):
            part = slice(start, min(start + block, head.vocabulary))
            vectors = task_vectors(
                [self._checkpoints.place(tensor[part], head.source, model) for model, tensor in enumerate(head.raw)]
            )
            for row, inputs, gradients in waiting:
                for loss in range(self.num_losses):
                    derivatives.add(head.source, row, loss, gradients[loss][:, part].T @ inputs, vectors, start)


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
    """Sample [n] int64 tokens from distributions [n, V] and uniform numbers [n], by inverse transform sampling."""
    source = probs.cpu() if probs.device.type == "mps" else probs  # MPS has no float64
    cumulative = source.double().cumsum(-1)
    labels = torch.searchsorted(cumulative, uniforms[:, None].to(cumulative.device) * cumulative[:, -1:])
    return labels.flatten().clamp(max=probs.shape[1] - 1).to(probs.device)
