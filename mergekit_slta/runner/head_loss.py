"""Compute every row's losses at the output head, and their gradients with respect to the last layer's output.

Scope: final norm and output projection, for a backward pass or for divergences alone. A loss is the next-token
cross-entropy, summed over the row's completion. The labels are sampled S times from the model's own distribution, so
that the second moment of the gradients is the true Fisher information. With S = 0 the labels are the row's own tokens.
With teachers there is an additional loss, the first: KL(expert of the row's task || model), summed over the completion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mergekit_slta.checkpoints.tensors import Weights
from mergekit_slta.data.rows import Row
from mergekit_slta.models.hooks import record_calls
from mergekit_slta.models.skeleton import check_finite
from mergekit_slta.runner.directional import DirectionalDerivatives, block_rows, task_vectors
from mergekit_slta.runner.row_weights import RowWeights
from mergekit_slta.runtime.activations import ActivationStore

LOGIT_GRADIENTS = 2**24
"""Maximum number of logit gradients in memory, over rows, losses, positions and vocabulary."""


class HeadLoss:
    """The losses of all rows.

    Args:
        weights: the weights used for each row.
        store: holds the last layer's outputs; the gradients with respect to them are stored there.
        label_samples: S, labels sampled per position; 0 uses the row's own tokens.
        seed: seed of the sampled labels.
        teachers: per row, the last layer's outputs [completion, d] of the expert of its task.

    Attributes:
        num_losses: losses per row: max(1, S), and one more with teachers.
        divergences: [rows] float64, KL(expert || model) of every row in nats, summed over its completion; zeros without
            teachers.
        losses: [rows, 2] float64, the mean cross-entropy of a row's own completion in nats per token, for the model and
            the teacher; the teacher's is 0 without teachers. NaN without a completion.
    """

    def __init__(
        self,
        weights: RowWeights,
        store: ActivationStore,
        *,
        label_samples: int,
        seed: int,
        teachers: Sequence[Tensor] | None,
    ) -> None:
        self._weights, self._store, self._teachers = weights, store, teachers
        self._skeleton, self._checkpoints = weights.skeleton, weights.checkpoints
        self._label_samples, self._seed = label_samples, seed
        self.num_losses = max(1, label_samples) + (teachers is not None)
        self.divergences = torch.zeros(len(weights.rows), dtype=torch.float64)
        self.losses = torch.zeros((len(weights.rows), 2), dtype=torch.float64)
        for row, own in enumerate(weights.rows):
            if own.completion >= len(own.ids):
                self.losses[row] = torch.nan

    def run(self, derivatives: DirectionalDerivatives | None) -> None:
        """Compute all rows' losses and gradients.

        Args:
            derivatives: the derivatives of all tensors after the layers are added to it; None computes only
                divergences.

        Raises:
            ModelError: a weight holds NaN or Inf.
            RunError: a gradient holds NaN or Inf.
        """
        skeleton, checkpoints = self._skeleton, self._checkpoints
        names = self._weights.outer_tensors()[1]
        tied = checkpoints.plan.is_tied or skeleton.head_weight not in checkpoints.plan.tensors
        source = skeleton.embedding_weight if tied else skeleton.head_weight
        raw = checkpoints.raw(source)
        vocabulary = min(tensor.shape[0] for tensor in raw)
        loaded = checkpoints.load(names)
        vectors = {}
        if derivatives is not None:
            vectors = {name: task_vectors([weights[name] for weights in loaded]) for name in names}
        shared = self._weights.shared(loaded)
        if shared is not None:
            shared[skeleton.head_weight] = self._weights.shared_projection(raw, source)
        max_positions = max(1, LOGIT_GRADIENTS // vocabulary)
        for task, rows in self._weights.by_task.items():
            projection = checkpoints.place(raw[task + 1][:vocabulary], source, task + 1)
            expert = {**loaded[task + 1], skeleton.head_weight: projection}
            waiting: list[tuple[int, Tensor, Tensor]] = []  # (row, inputs [n, d], gradients [losses, n, V])
            for row in rows:
                for inputs, gradients in self._row_loss(
                    row, shared or expert, expert, vectors, max_positions, derivatives
                ):
                    waiting.append((row, inputs, gradients))
                    if sum(kept.numel() for *_, kept in waiting) >= LOGIT_GRADIENTS:
                        self._add_projection(waiting, raw, source, vocabulary, derivatives)
                        waiting = []
            self._add_projection(waiting, raw, source, vocabulary, derivatives)

    def _row_loss(
        self,
        row: int,
        weights: Weights,
        expert: Weights,
        vectors: Mapping[str, Tensor],
        max_positions: int,
        derivatives: DirectionalDerivatives | None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Compute a row's losses, at most `max_positions` positions at a time.

        Stores the gradients with respect to the last layer's output, and adds the derivatives of all tensors except
        the output projection.

        Yields:
            The inputs [n, d] of the output projection at n positions, and the gradients [losses, n, V] with respect to
            its outputs. Nothing without `derivatives`.
        """
        skeleton, num_tokens = self._skeleton, len(self._weights.rows[row].ids)
        features = self._store.features(skeleton.num_layers, row).to(skeleton.device)
        grad_in = features.new_zeros((self.num_losses, *features.shape)) if derivatives is not None else None
        for start in range(self._weights.rows[row].completion - 1, num_tokens - 1, max_positions):
            positions = slice(start, min(start + max_positions, num_tokens - 1))
            hidden = features[positions].detach().requires_grad_()
            own = {name: weights[name].detach().requires_grad_() for name in vectors}
            with torch.enable_grad(), record_calls({"head": skeleton.model.get_output_embeddings()}) as calls:
                logits = skeleton.head(hidden[None], {**weights, **own})[0]
            log_probs = torch.log_softmax(logits.detach().float(), dim=-1)
            logit_gradients = self._logit_gradients(row, positions, log_probs, expert)
            if derivatives is None or grad_in is None:
                next(logit_gradients)
                continue
            call, collected = calls["head"][0], []
            for loss, grad_out in enumerate(logit_gradients):
                gradients = torch.autograd.grad(
                    logits, [hidden, *own.values()], grad_out.to(logits.dtype),
                    retain_graph=loss < self.num_losses - 1, allow_unused=True,
                )  # fmt: skip
                grad_in[loss, positions] = check_finite(gradients[0], "head")
                derivatives.add_each(own, row, loss, gradients[1:], vectors)
                collected.append(call.gradient.flatten(0, -2))
            yield call.inputs[0].detach().flatten(0, -2), torch.stack(collected)
        if grad_in is not None:
            self._store.put_gradients(row, grad_in)

    def _logit_gradients(self, row: int, positions: slice, log_probs: Tensor, expert: Weights) -> Iterator[Tensor]:
        """Yield, for every loss, the gradients [n, V] with respect to the logits at `positions`.

        `log_probs` [n, V] are the model's. The positions' divergence and losses are added to `divergences` and `losses`
        before the first yield.
        """
        own, probs = self._weights.rows[row], log_probs.exp()
        tokens = torch.tensor(own.ids[positions.start + 1 : positions.stop + 1], device=probs.device)
        self._add_loss(row, 0, log_probs, tokens)
        first = positions.start - own.completion + 1  # position within the completion
        if self._teachers is not None:
            taught = self._teachers[row][first : first + len(log_probs)].to(log_probs.device)
            teacher_log_probs = torch.log_softmax(self._skeleton.head(taught[None], expert)[0].float(), dim=-1)
            self._add_loss(row, 1, teacher_log_probs, tokens)
            self.divergences[row] += float(
                (teacher_log_probs.exp() * (teacher_log_probs - log_probs)).sum(dtype=torch.float64)
            )
            yield probs - teacher_log_probs.exp()
        uniforms = label_uniforms(own, self._label_samples, self._seed)
        for sample in range(max(1, self._label_samples)):
            drawn = None if uniforms is None else uniforms[sample, first : first + len(probs)]
            labels = tokens if drawn is None else sample_labels(probs, drawn)
            gradient = probs.clone()
            gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
            yield gradient

    def _add_loss(self, row: int, which: int, log_probs: Tensor, tokens: Tensor) -> None:
        """Add the cross-entropy of n `tokens` under `log_probs` [n, V] to `losses`."""
        own = self._weights.rows[row]
        total = log_probs.gather(1, tokens[:, None]).sum(dtype=torch.float64)
        self.losses[row, which] -= float(total) / (len(own.ids) - own.completion)

    def _add_projection(
        self,
        waiting: Sequence[tuple[int, Tensor, Tensor]],
        raw: Sequence[Tensor],
        source: str,
        vocabulary: int,
        derivatives: DirectionalDerivatives | None,
    ) -> None:
        """Add the output projection's derivatives, in parts of the vocabulary."""
        if derivatives is None or not waiting:
            return
        block = block_rows(raw[0])
        for start in range(0, vocabulary, block):
            part = slice(start, min(start + block, vocabulary))
            vectors = task_vectors(
                [self._checkpoints.place(tensor[part], source, model) for model, tensor in enumerate(raw)]
            )
            for row, inputs, gradients in waiting:
                for loss in range(self.num_losses):
                    derivatives.add(source, row, loss, gradients[loss][:, part].T @ inputs, vectors, start)


def label_uniforms(row: Row, samples: int, seed: int) -> Tensor | None:
    """Draw uniform numbers for sampling a row's labels, [S, positions] float64; None if `samples` is 0.

    They depend only on the seed and the row's number in its dataset, not on the process or the order of rows.
    """
    if not samples:
        return None
    generator = torch.Generator().manual_seed((seed * 1_000_003 + row.number) % 2**63)
    return torch.rand((samples, len(row.ids) - row.completion), generator=generator, dtype=torch.float64)


def sample_labels(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Sample [n] int64 tokens from distributions [n, V] and uniform numbers [n], by inverse transform sampling."""
    source = probs.cpu() if probs.device.type == "mps" else probs  # MPS has no float64
    cumulative = source.double().cumsum(-1)
    labels = torch.searchsorted(cumulative, uniforms[:, None].to(cumulative.device) * cumulative[:, -1:])
    return labels.flatten().clamp(max=probs.shape[1] - 1).to(probs.device)
