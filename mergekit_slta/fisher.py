"""Gram matrices that weigh every change of a submodule's output by what the loss feels of it: `objective: fisher`.

Scope: the backward pass of `gradients.py`, with outputs of submodules compared in the place of slopes. For a row x of
task a that runs through its own expert, and labels drawn from that expert (the true Fisher information):

    df_k(x)      what expert k's version of the submodule makes of expert a's features, less what the base's makes
    g(x)         d loss / d output of the submodule, at expert a; per token
    G_x[j, k] =  mean over draws of the sum over tokens of (g . df_j)(g . df_k)

All that follows is as for the paper's Gram matrices: balance, solve, statistics, export. The one difference beside the
metric is where features come from: gradients belong to expert a's own forward pass, and so do the inputs here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from mergekit_slta.checkpoints import Weights
from mergekit_slta.gradients import Backward
from mergekit_slta.skeleton import finite
from mergekit_slta.slopes import rows_at_once
from mergekit_slta.submodules import Submodule
from mergekit_slta.watch import watched


class FisherBackward(Backward):
    """One backward pass of all rows, each at its own expert; arguments as for `Backward`.

    What `run` yields is submodule -> [rows, T, T] float64. `embed` and `head` are objectives of their own, tied or not.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_layer: dict[int, list[Submodule]] = {}
        for submodule in self._submodules:
            if submodule.layer is not None:
                self._in_layer.setdefault(submodule.layer, []).append(submodule)
        self._grams: dict[str, Tensor] = {}
        self._parallel: bool | None = None

    def _take(self) -> dict[str, Tensor]:
        found, self._grams = self._grams, {}
        return found

    def _felt(self, name: str, row: int, felt: Tensor) -> None:
        """Add the products of [T, n], g . df of n tokens."""
        shape = (len(self._examples), self._num_experts, self._num_experts)
        if name not in self._grams:
            self._grams[name] = torch.zeros(shape, dtype=torch.float64, device="cpu")
        wide = felt.cpu().double()
        self._grams[name][row] += wide @ wide.T / self._draws

    def _compare(self, name: str, row: int, output: Callable[[int], Tensor], gradients: Tensor) -> None:
        """A submodule's outputs by every model, (model) -> [n, d], under its gradients [S, n, d]."""
        base = output(0)
        changes = torch.stack([output(model + 1) - base for model in range(self._num_experts)])  # [T, n, d]
        for gradient in gradients:
            self._felt(name, row, (changes * gradient).sum(-1, dtype=torch.float64))

    def _project(
        self, waiting: Sequence[tuple[int, slice, Tensor, Tensor]], raw: Sequence[Tensor], source: str, vocabulary: int
    ) -> None:
        """Everything behind the layers, in parts of the vocabulary: a token's products are summed over all of it."""
        skeleton, checkpoints = self._skeleton, self._checkpoints
        whole = checkpoints.load(self._outside()[1])
        bias = skeleton.head_weight.removesuffix("weight") + "bias"
        projected: list[list[Tensor]] = []  # what enters every model's output projection, [n, d] of each that waits
        for model, (own, tensor) in enumerate(zip(whole, raw, strict=True)):
            one = {**own, skeleton.head_weight: checkpoints.place(tensor[:1], source, model)}
            if bias in own:
                one[bias] = own[bias][:1]
            projected.append([self._entering_head(row, asked, one) for row, asked, *_ in waiting])
        felt = [gradients.new_zeros((self._draws, self._num_experts, gradients.shape[1])) for *_, gradients in waiting]
        step = rows_at_once(raw[0])
        for start in range(0, vocabulary, step):
            part = slice(start, min(start + step, vocabulary))
            rows = [checkpoints.place(tensor[part], source, model) for model, tensor in enumerate(raw)]
            for place, (*_, gradients) in enumerate(waiting):
                logits = [
                    linear(entering[place], weight, own[bias][part] if bias in own else None)
                    for entering, weight, own in zip(projected, rows, whole, strict=True)
                ]
                for expert in range(self._num_experts):
                    felt[place][:, expert] += (gradients[:, :, part] * (logits[expert + 1] - logits[0])).sum(-1)
        for found, (row, *_) in zip(felt, waiting, strict=True):
            for draw in found:
                self._felt("head", row, draw)

    def _entering_head(self, row: int, asked: slice, weights: Weights) -> Tensor:
        """What enters the output projection [n, d] at some positions of a row, behind a model's norm."""
        hidden = self._tape.features(self._skeleton.num_layers, row)[asked].to(self._skeleton.device)
        with watched({"head": self._skeleton.model.get_output_embeddings()}) as seen:
            self._skeleton.head(hidden[None], weights)
        return seen["head"][0].inputs[0].flatten(0, -2)

    def _layer(self, index: int) -> None:
        """One decoder layer: its submodules' outputs compared, and the gradients by its input."""
        skeleton, tape = self._skeleton, self._tape
        names = self._names_of(index)
        every = self._checkpoints.load(names)
        submodules = self._in_layer[index]
        norms = [submodule.name for submodule in submodules if submodule.kind == "norm"]
        divided = submodules[0].kind != "layer"
        for task, rows in self._by_task.items():
            own = every[task + 1]
            for row in rows:
                hidden = tape.features(index, row).to(skeleton.device).detach().requires_grad_()
                if divided and self._parallel is None:
                    self._parallel = skeleton.has_parallel_blocks(index, hidden.detach()[None], own)
                with torch.enable_grad(), watched({name: skeleton.model.get_submodule(name) for name in norms}) as seen:
                    if divided and not self._parallel:
                        middle = skeleton.block(index, "attention", hidden[None], own)[0]
                        output = skeleton.block(index, "mlp", middle[None], own)[0]
                    else:
                        middle, output = hidden, skeleton.layer(index, hidden[None], own)[0]
                arriving = tape.gradients(row).to(hidden.device)
                leaving, between = torch.empty_like(arriving), torch.empty_like(arriving)
                by_norm: dict[str, list[Tensor]] = {name: [] for name in norms}
                for draw in range(self._draws):
                    gradients = torch.autograd.grad(
                        output, [hidden, middle], arriving[draw], retain_graph=draw < self._draws - 1
                    )
                    leaving[draw] = finite(gradients[0], f"layer {index}")
                    between[draw] = gradients[1]
                    for name, calls in seen.items():
                        by_norm[name].append(calls[-1].gradient[0])  # type: ignore[index] - the pass has just been
                tape.put_gradients(row, leaving)
                self._compare_layer(index, row, every, hidden.detach(), middle.detach(), arriving, between, by_norm)

    def _compare_layer(
        self, index: int, row: int, every: Sequence[Weights], hidden: Tensor, middle: Tensor, arriving: Tensor,
        between: Tensor, by_norm: dict[str, list[Tensor]],
    ) -> None:  # fmt: skip
        """Every submodule of a layer on what expert a gives it. What is no part of it is expert a's."""
        skeleton = self._skeleton
        own = every[self._examples[row].task + 1]
        for submodule in self._in_layer[index]:

            def weights(model: int, submodule: Submodule = submodule) -> Weights:
                return {**own, **{name: every[model][name] for name in submodule.tensors}}

            if submodule.kind == "layer":
                self._compare(
                    submodule.name, row, lambda model: skeleton.layer(index, hidden[None], every[model])[0], arriving
                )
            elif submodule.kind == "norm":
                self._compare(
                    submodule.name, row,
                    lambda model, name=submodule.name, of=weights: skeleton.module(name, (hidden[None],), of(model))[0],
                    torch.stack(by_norm[submodule.name]),
                )  # fmt: skip
            elif submodule.kind == "attention":
                self._compare(
                    submodule.name, row,
                    lambda model, of=weights: skeleton.block(index, "attention", hidden[None], of(model))[0],
                    arriving if self._parallel else between,
                )  # fmt: skip
            else:
                self._compare(
                    submodule.name, row,
                    lambda model, of=weights: skeleton.block(index, "mlp", middle[None], of(model))[0], arriving,
                )  # fmt: skip

    def _embed(self) -> None:
        """Everything before the layers."""
        rows_of = self._embedding_rows()
        for row in range(len(self._examples)):
            arriving = self._tape.gradients(row).to(self._skeleton.device)

            def entered(model: int, row: int = row) -> Tensor:
                weights, ids = rows_of(row, model)
                return self._skeleton.embed(ids, weights)[0]

            self._compare("embed", row, entered, arriving)
