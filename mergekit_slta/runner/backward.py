"""The streamed backward pass: how each submodule's change by each expert would move a row's loss, to first order.

Scope: rows forward and back through their own experts, or through a merged model, layer by layer, one layer of every
model in memory at a time. Knows no solve; a step's slopes are handed out as soon as all rows have passed it.

    u[s, t] = <d loss_s / d theta^m at theta, theta_t^m - theta_0^m>      row of task a, loss summed over its answer

The loss is the next-token cross-entropy with labels drawn from the model at theta itself (the true Fisher information),
or with the row's own tokens. With teachers, what comes first is the slope of the divergence KL(expert a || model at
theta), summed over the answer. Gradients of a linear map are never kept whole (`slopes.py`); all else goes through
autograd as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mergekit_slta.checkpoints.tensors import Checkpoints, Weights
from mergekit_slta.models.hooks import record_calls
from mergekit_slta.models.skeleton import Skeleton, finite
from mergekit_slta.models.submodules import Submodule
from mergekit_slta.runner.directional import DirectionalDerivatives, block_rows, task_vectors
from mergekit_slta.runtime.activations import ActivationStore

DIVERGENCE = "divergence"
"""Beside the slopes of the head: [rows] float64, KL(expert || model) of every row, in nats."""
MergeWeights = Callable[[Sequence[Weights]], Weights]
"""The tensors of every model -> the merged ones."""
LOGITS = 2**24
"""Gradients by logits that are held at a time, over rows and label samples."""


@dataclass(frozen=True)
class Example:
    """A calibration row.

    Attributes:
        ids: its tokens.
        completion: the first token whose loss counts, at least 1.
        task: canonical number of its expert, from 0.
        number: in its dataset; seeds the labels.
    """

    ids: Sequence[int]
    completion: int
    task: int
    number: int


def stages_of(skeleton: Skeleton) -> list[str]:
    """Names of the steps, in the order of a backward pass."""
    layers = [f"{skeleton.layers_path}.{index}" for index in range(skeleton.num_layers)]
    return ["head", *reversed(layers), "embed"]


class Backward:
    """One backward pass of all rows.

    Args:
        skeleton, checkpoints: the model's code, and every model's tensors; experts in canonical order.
        submodules: which slopes are positions for.
        examples: the rows.
        samples: S label draws per row; 0 takes the row's own tokens.
        seed: of the draws.
        tape: for the rows' features.
        at: where gradients are taken: every row at its own expert, or all at what a function merges, or at the base.
        teachers: what left the last layer of each row's expert, [answer, d], see `completion_features`; S grows by one.
        announce: called with the name of what is being worked on.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        checkpoints: Checkpoints,
        submodules: Sequence[Submodule],
        examples: Sequence[Example],
        *,
        samples: int,
        seed: int,
        tape: ActivationStore,
        at: MergeWeights | Literal["experts", "base"] = "experts",
        teachers: Sequence[Tensor] | None = None,
        announce: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._skeleton, self._checkpoints, self._tape, self.announce = skeleton, checkpoints, tape, announce
        self._submodules, self._examples, self._samples, self._seed = submodules, examples, samples, seed
        self._at, self._teachers = at, teachers
        self._draws = max(1, samples) + (teachers is not None)
        self._divergence = torch.zeros(len(examples), dtype=torch.float64)
        self._num_experts = len(checkpoints.plan.models) - 1
        self._by_task = {
            task: [row for row, example in enumerate(examples) if example.task == task]
            for task in sorted({example.task for example in examples})
        }
        self._slopes = DirectionalDerivatives(submodules, (len(examples), self._draws, self._num_experts))
        self._linears: dict[int, dict[str, nn.Linear]] = {}

    def run(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Every step's slopes: (name, submodule -> [rows, S, T] float64). Steps that the tape has done are left out.

        With teachers, the first step brings the rows' `DIVERGENCE`, too.

        Raises:
            ModelError: a weight holds NaN or Inf.
            RunError: a feature or a gradient does.
        """
        self.forward()
        for number, stage in enumerate(stages_of(self._skeleton)):
            if number < self._tape.layers_done:
                continue
            self.announce(stage)
            if stage == "head":
                self._head()
            elif stage == "embed":
                self._embed()
            else:
                self._layer(self._skeleton.num_layers - number)
            self._checkpoints.flush()
            found = self._take()
            if stage == "head" and self._teachers is not None:
                found[DIVERGENCE] = self._divergence
            yield stage, found
            self._tape.finish_layer()

    def _take(self) -> dict[str, Tensor]:
        """What a step has found."""
        return self._slopes.take()

    def completion_features(self) -> list[Tensor]:
        """What has left the last layer where answers are predicted, [answer, d] of every row; behind a forward pass."""
        last = self._skeleton.num_layers
        return [
            self._tape.features(last, row)[example.completion - 1 : len(example.ids) - 1].clone()
            for row, example in enumerate(self._examples)
        ]

    def divergences(self) -> Tensor:
        """[rows] float64, KL(expert || model) of every row, by a forward pass alone.

        Raises:
            ModelError, RunError: as in `run`.
        """
        self.forward()
        self._head(backward=False)
        self._checkpoints.flush()
        return self._divergence

    # --- forward ------------------------------------------------------------------------------------------------------

    def forward(self) -> None:
        """Every row through the weights it is `at`, layer by layer; the tape keeps as many layers' inputs as it holds.

        Raises:
            ModelError, RunError: as in `run`.
        """
        rows_of = self._embedding_rows()
        for row in range(len(self._examples)):  # again in a run that goes on: positions and masks are made here
            weights, ids = self._entering(rows_of, row)
            entered = self._skeleton.embed(ids, weights)[0]
            if self._tape.depths_done == 0:
                self._tape.put_features(0, row, finite(entered, "embed"))
        if self._tape.depths_done == 0:
            self._tape.finish_depth()
        for index in range(self._tape.depths_done - 1, self._skeleton.num_layers):
            names = self._names_of(index)
            self.announce(f"{self._skeleton.layers_path}.{index}")
            for weights, rows in self._points(names):
                for row in rows:
                    hidden = self._tape.features(index, row).to(self._skeleton.device)[None]
                    output = self._skeleton.layer(index, hidden, weights)[0]
                    self._tape.put_features(index + 1, row, finite(output, f"layer {index}"))
            self._tape.finish_depth()
            self._checkpoints.flush()

    def _points(self, names: Sequence[str], merged: Weights | None = None) -> Iterator[tuple[Weights, Sequence[int]]]:
        """The weights that rows run through, each with its rows; `merged` where it is there already."""
        every = range(len(self._examples))
        if self._at == "base":
            yield self._checkpoints.load(names, [0])[0], every
        elif self._at == "experts":
            for task, rows in self._by_task.items():
                yield self._checkpoints.load(names, [task + 1])[0], rows
        else:
            yield merged or self._at(self._checkpoints.load(names)), every

    def _names_of(self, layer: int) -> list[str]:
        prefix = f"{self._skeleton.layers_path}.{layer}."
        return [name for name in self._checkpoints.plan.tensors if name.startswith(prefix)]

    def _outside(self) -> tuple[list[str], list[str]]:
        """Names of the tensors before and behind the layers; the embedding table and the output projection left out."""
        skeleton = self._skeleton
        names = [name for name in self._checkpoints.plan.tensors if not name.startswith(skeleton.layers_path + ".")]
        prefix = skeleton.head_weight.removesuffix("weight")
        behind = [name for name in names if name.startswith((skeleton.anatomy.final_norm + ".", prefix))]
        known = (skeleton.embedding_weight, skeleton.head_weight)
        return [name for name in names if name not in (*behind, *known)], [name for name in behind if name not in known]

    def _embedding_rows(self) -> Callable[[int, int], tuple[Weights, Tensor]]:
        """(row, model) -> the tensors before the layers, of the table only the row's own tokens, and their places."""
        table = self._skeleton.embedding_weight
        used = torch.unique(torch.cat([torch.as_tensor(list(example.ids)) for example in self._examples]))
        others = self._checkpoints.load(self._outside()[0])
        rows = self._checkpoints.table_rows(table, used)

        def of(row: int, model: int) -> tuple[Weights, Tensor]:
            own, places = torch.unique(torch.as_tensor(list(self._examples[row].ids)), return_inverse=True)
            where = torch.searchsorted(used, own).to(self._skeleton.device)
            return {**others[model], table: rows[model][where]}, places[None].to(self._skeleton.device)

        return of

    def _entering(self, rows_of: Callable[[int, int], tuple[Weights, Tensor]], row: int) -> tuple[Weights, Tensor]:
        """What a row enters the model through, and its tokens' places there."""
        if self._at == "base":
            return rows_of(row, 0)
        if self._at == "experts":
            return rows_of(row, self._examples[row].task + 1)
        every = [rows_of(row, model) for model in range(self._num_experts + 1)]
        return self._at([weights for weights, _ in every]), every[0][1]

    # --- backward -----------------------------------------------------------------------------------------------------

    def _head(self, backward: bool = True) -> None:
        """Losses, their gradients by the last layer's output, and all behind the layers; or divergences alone."""
        skeleton, checkpoints = self._skeleton, self._checkpoints
        names = self._outside()[1]
        tied = checkpoints.plan.is_tied or skeleton.head_weight not in checkpoints.plan.tensors
        source = skeleton.embedding_weight if tied else skeleton.head_weight
        raw = checkpoints.raw(source)
        vocabulary = min(tensor.shape[0] for tensor in raw)
        whole = checkpoints.load(names)
        changes = {name: task_vectors([weights[name] for weights in whole]) for name in names} if backward else {}
        shared: Weights = {}
        if self._at == "base":
            shared = {**whole[0], skeleton.head_weight: checkpoints.place(raw[0][:vocabulary], source, 0)}
        elif self._at != "experts":
            shared = {**self._at(whole), skeleton.head_weight: self._merged_table(raw, source, vocabulary)}
        for task, rows in self._by_task.items():
            projection = checkpoints.place(raw[task + 1][:vocabulary], source, task + 1)
            expert = {**whole[task + 1], skeleton.head_weight: projection}
            waiting: list[tuple[int, slice, Tensor, Tensor]] = []  # (row, where, inputs [n, d], gradients [S, n, v])
            for row in rows:
                parts = self._loss(row, shared or expert, expert, changes, max(1, LOGITS // vocabulary), backward)
                for positions, inputs, gradients in parts:
                    waiting.append((row, positions, inputs, gradients))
                    if sum(kept.numel() for *_, kept in waiting) >= LOGITS:
                        self._project(waiting, raw, source, vocabulary)
                        waiting = []
            self._project(waiting, raw, source, vocabulary)

    def _merged_table(self, raw: Sequence[Tensor], source: str, vocabulary: int) -> Tensor:
        """The merged output projection, made in parts of the vocabulary."""
        whole = torch.empty((vocabulary, raw[0].shape[1]), dtype=self._checkpoints.dtype, device=self._skeleton.device)
        block = block_rows(raw[0])
        for start in range(0, vocabulary, block):
            part = slice(start, min(start + block, vocabulary))
            placed = [self._checkpoints.place(tensor[part], source, model) for model, tensor in enumerate(raw)]
            whole[part] = self._at([{source: rows} for rows in placed])[source]  # type: ignore[operator] - a function here
        return whole

    def _loss(
        self, row: int, weights: Weights, expert: Weights, changes: Mapping[str, Tensor], most: int, backward: bool
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """One row's loss, `most` positions at a time: which, what enters the output projection there [n, d], and the
        gradients by what leaves it [S, n, v].

        Keeps the gradients by the last layer's output, and the slopes of everything here but the projection.
        """
        skeleton, example = self._skeleton, self._examples[row]
        features = self._tape.features(skeleton.num_layers, row).to(skeleton.device)
        back = features.new_zeros((self._draws, *features.shape)) if backward else None
        for start in range(example.completion - 1, len(example.ids) - 1, most):
            positions = slice(start, min(start + most, len(example.ids) - 1))
            hidden = features[positions].detach().requires_grad_()
            own = {name: weights[name].detach().requires_grad_() for name in changes}
            with torch.enable_grad(), record_calls({"head": skeleton.model.get_output_embeddings()}) as seen:
                logits = skeleton.head(hidden[None], {**weights, **own})[0]
            slopes = self._by_logits(row, positions, torch.log_softmax(logits.detach().float(), dim=-1), expert)
            if back is None:
                next(slopes)
                continue
            call, collected = seen["head"][0], []
            for draw, slope in enumerate(slopes):
                gradients = torch.autograd.grad(
                    logits, [hidden, *own.values()], slope.to(logits.dtype), retain_graph=draw < self._draws - 1,
                    allow_unused=True,
                )  # fmt: skip
                back[draw, positions] = finite(gradients[0], "head")
                for name, gradient in zip(own, gradients[1:], strict=True):
                    if gradient is not None:
                        self._slopes.add(name, row, draw, gradient, changes[name])
                collected.append(call.gradient.flatten(0, -2))
            yield positions, call.inputs[0].detach().flatten(0, -2), torch.stack(collected)
        if back is not None:
            self._tape.put_gradients(row, back)

    def _by_logits(self, row: int, positions: slice, log_probs: Tensor, expert: Weights) -> Iterator[Tensor]:
        """Gradients [n, v] with respect to the logits of `positions`, whose log-probabilities are [n, v]: of the
        divergence where there are teachers, then of every draw's loss."""
        example, probs = self._examples[row], log_probs.exp()
        first = positions.start - example.completion + 1
        if self._teachers is not None:
            taught = self._teachers[row][first : first + len(log_probs)].to(log_probs.device)
            teacher_log_probs = torch.log_softmax(self._skeleton.head(taught[None], expert)[0].float(), dim=-1)
            self._divergence[row] += float(
                (teacher_log_probs.exp() * (teacher_log_probs - log_probs)).sum(dtype=torch.float64)
            )
            yield probs - teacher_log_probs.exp()
        uniforms = self._label_uniforms(example)
        for draw in range(max(1, self._samples)):
            if uniforms is None:
                labels = torch.as_tensor(
                    list(example.ids[positions.start + 1 : positions.stop + 1]), device=probs.device
                )
            else:
                labels = _sample_labels(probs, uniforms[draw, first : first + len(probs)])
            slope = probs.clone()
            slope[torch.arange(len(labels), device=labels.device), labels] -= 1
            yield slope

    def _label_uniforms(self, example: Example) -> Tensor | None:
        """[S, positions] uniform numbers that choose the labels; None where these are the row's own tokens."""
        if not self._samples:
            return None
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + example.number) % 2**63)
        shape = (self._samples, len(example.ids) - example.completion)
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def _project(
        self, waiting: Sequence[tuple[int, slice, Tensor, Tensor]], raw: Sequence[Tensor], source: str, vocabulary: int
    ) -> None:
        """The output projection's slopes, in parts of the vocabulary."""
        block = block_rows(raw[0])
        for start in range(0, vocabulary, block):
            part = slice(start, min(start + block, vocabulary))
            placed = [self._checkpoints.place(tensor[part], source, model) for model, tensor in enumerate(raw)]
            changes = task_vectors(placed)
            for row, _, inputs, gradients in waiting:
                for draw in range(self._draws):
                    self._slopes.add(source, row, draw, gradients[draw][:, part].T @ inputs, changes, start)

    def _layer(self, index: int) -> None:
        """One decoder layer: its slopes, and the gradients by its input."""
        names = self._names_of(index)
        loaded = self._checkpoints.load(names)
        merged = self._at(loaded) if callable(self._at) else None
        changes = {name: task_vectors([weights.pop(name) for weights in loaded]) for name in names}  # one tensor twice
        prefix = f"{self._skeleton.layers_path}.{index}."
        for weights, rows in self._points(names, merged):
            linears = self._linear_maps(index, names, weights, rows[0])
            rest = [name for name in names if name.removesuffix(".weight") not in linears]
            for row in rows:
                hidden = self._tape.features(index, row).to(self._skeleton.device).detach().requires_grad_()
                own = {name: weights[name].detach().requires_grad_() for name in rest}
                with torch.enable_grad(), record_calls(linears) as seen:
                    output = self._skeleton.layer(index, hidden[None], {**weights, **own})[0]
                grad_out = self._tape.gradients(row).to(hidden.device)
                grad_in = torch.empty_like(grad_out)
                for draw in range(self._draws):
                    gradients = torch.autograd.grad(
                        output, [hidden, *own.values()], grad_out[draw], retain_graph=draw < self._draws - 1,
                        allow_unused=True,
                    )  # fmt: skip
                    grad_in[draw] = finite(gradients[0], prefix[:-1])
                    for name, gradient in zip(own, gradients[1:], strict=True):
                        if gradient is not None:
                            self._slopes.add(name, row, draw, gradient, changes[name])
                    for path, calls in seen.items():
                        name = f"{path}.weight"
                        for call in calls:
                            self._slopes.add_linear(name, row, draw, call.inputs[0], call.gradient, changes[name])
                self._tape.put_gradients(row, grad_in)

    def _linear_maps(self, index: int, names: Sequence[str], weights: Weights, row: int) -> dict[str, nn.Linear]:
        """The layer's linear maps by path: modules that are exactly that, and are called as such."""
        if index not in self._linears:
            prefix = f"{self._skeleton.layers_path}.{index}."
            paths = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
            layer = self._skeleton.layers[index]
            found = {path: layer.get_submodule(path.removeprefix(prefix)) for path in paths}
            exact = {path: module for path, module in found.items() if type(module) is nn.Linear}
            hidden = self._tape.features(index, row).to(self._skeleton.device)[None]
            with record_calls(exact) as seen:
                self._skeleton.layer(index, hidden, weights)
            self._linears = {index: {path: module for path, module in exact.items() if seen[path]}}
        return self._linears[index]

    def _embed(self) -> None:
        """Everything before the layers."""
        table = self._skeleton.embedding_weight
        rows_of = self._embedding_rows()
        for row in range(len(self._examples)):
            weights, ids = self._entering(rows_of, row)
            every = [rows_of(row, model)[0] for model in range(self._num_experts + 1)]
            changes = {name: task_vectors([other[name] for other in every]) for name in weights}
            own = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
            with torch.enable_grad():
                output = self._skeleton.embed(ids, own)[0]
            grad_out = self._tape.gradients(row).to(output.device)
            for draw in range(self._draws):
                gradients = torch.autograd.grad(
                    output, list(own.values()), grad_out[draw], retain_graph=draw < self._draws - 1, allow_unused=True
                )
                for name, gradient in zip(own, gradients, strict=True):
                    if gradient is not None:
                        self._slopes.add(name, row, draw, gradient, changes[name], whole=name == table)


def _sample_labels(probs: Tensor, uniforms: Tensor) -> Tensor:
    """[n] tokens, each from its own distribution [n, v], where its uniform number [n] falls."""
    source = probs.cpu() if probs.device.type == "mps" else probs  # the one backend without float64
    below = source.double().cumsum(-1)
    places = torch.searchsorted(below, uniforms[:, None].to(below.device) * below[:, -1:])
    return places.flatten().clamp(max=probs.shape[1] - 1).to(probs.device)
