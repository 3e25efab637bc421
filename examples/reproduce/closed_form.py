"""Three published merges in closed form, done here since mergekit has none of them: RegMean, RegMean++, LOT merging.

* RegMean: Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023 (arXiv 2212.09849);
  https://github.com/bloomberg/dataless-model-merging.
* RegMean++: Nguyen et al., "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model
  Merging", TMLR 2026 (arXiv 2508.03121); https://github.com/nthehai01/RegMean-plusplus, and for language models
  https://github.com/uiuctml/MergeBench.
* LOT merging: Sun et al., "Towards Minimizing Feature Drift in Model Merging: Layer-wise Task Vector Fusion for
  Adaptive Knowledge Integration", NeurIPS 2025 (arXiv 2505.23859); from the paper alone.

All three go through the decoder layer by layer and solve a least-squares problem per linear map, from the inputs that
expert t gives the map on the rows of its own task. The rest is the plain average of the experts: embeddings, output
head (tied or not), biases and, in RegMean and RegMean++, the scales of norms. For LOT merging that average is its
Eq. 14, which the paper has for biases and we use for embeddings and head too: it speaks of neither.

Made for decoders that are laid out as Llama's: `layers`, then `norm`, whose scale multiplies what it has normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel

ALPHA = 0.9
"""Factor of the off-diagonal elements of RegMean's and RegMean++'s Gram matrices.

RegMean's repository has 0.9 and 0.1 in its settings, that of RegMean++ 0.95 (for CLIP); MergeBench's script has 0.5 for
RegMean and 0.1 for RegMean++ (Llama 3.2, 3B).
"""

CUTOFF = torch.finfo(torch.float32).eps
"""Eigenvalues below cutoff x width x the largest count as 0 in LOT merging's pseudo-inverse.

The paper says "Moore-Penrose inverse" and no more. This is torch's default for float32, the precision that the
activations are in.
"""

TOKENS_AT_ONCE = 1024
"""Products of activations are float32 over so many tokens, and summed in float64."""

Solver = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], Tensor]
"""(second moments of every expert's inputs, weights of every expert, weights of the base) -> merged weights.

For a linear map Gram matrices [in, in] and weights [out, in]; for a norm's scale sums of squares of what it multiplies,
and scales, all [width]. Moments are float64.
"""


def regmean_linear(grams: Sequence[Tensor], weights: Sequence[Tensor], base: Tensor, alpha: float = ALPHA) -> Tensor:
    """RegMean: W = (sum of G_t)^-1 (sum of G_t W_t), the off-diagonals of every G_t multiplied by `alpha`.

    With `alpha` below 1 the sum can be inverted unless an input is 0 on all rows; torch raises an error where it is.
    """
    shrunk = [alpha * gram + (1 - alpha) * torch.diag(gram.diagonal()) for gram in grams]
    wanted = sum(gram @ weight.double().T for gram, weight in zip(shrunk, weights, strict=True))
    # Cholesky decomposition does not mind inputs of very different size, as massive activations are.
    return torch.cholesky_solve(wanted, torch.linalg.cholesky(sum(shrunk))).T


def lot_linear(grams: Sequence[Tensor], weights: Sequence[Tensor], base: Tensor, cutoff: float = CUTOFF) -> Tensor:
    """LOT merging, Eq. 9 and 15: W = base + (sum of G_t)^+ (sum of G_t T_t), with the task vectors T_t."""
    wanted = sum(gram @ (weight - base).double().T for gram, weight in zip(grams, weights, strict=True))
    inverse = torch.linalg.pinv(sum(grams), rtol=cutoff * len(wanted), hermitian=True)
    return base + (inverse @ wanted).T


def lot_scale(squares: Sequence[Tensor], weights: Sequence[Tensor], base: Tensor) -> Tensor:
    """LOT merging, Eq. 12: per dimension, the mean of the task vectors, weighted by the squares of what they scale."""
    wanted = sum(square * (weight - base) for square, weight in zip(squares, weights, strict=True))
    return base + wanted / sum(squares).clamp_min(torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class Method:
    """What tells the methods apart.

    Attributes:
        linear: merges the weights of a linear map.
        scale: merges the scale of a norm; None: the plain average.
        reads_merged: a layer's input comes from the layers merged so far; else from the expert's own.
        per_token: second moments are means over tokens, so that longer rows do not count for more; else sums.
    """

    linear: Solver
    scale: Solver | None
    reads_merged: bool
    per_token: bool

    def solver(self, module: nn.Module) -> Solver | None:
        """How the weight of a module is merged; None: the plain average."""
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear):
            return self.linear
        return self.scale if isinstance(weight, nn.Parameter) and weight.dim() == 1 else None


METHODS: dict[str, Method] = {
    # The papers write X^T X; all three repositories divide it by the number of tokens.
    "RegMean": Method(regmean_linear, None, reads_merged=False, per_token=True),
    # Only what enters a layer is the merged model's: within it the expert's own modules run, as in both repositories.
    "RegMean++": Method(regmean_linear, None, reads_merged=True, per_token=True),
    # Algorithm 1: inputs from the experts. Its factor (Eq. 15) is 1, which the paper gives for use without tuning; the
    # values it has tuned are 1.2 and 1.5, for two vision transformers.
    "LOT merging": Method(lot_linear, lot_scale, reads_merged=False, per_token=False),
}


def load_models(base: Path, experts: Sequence[Path]) -> list[PreTrainedModel]:
    """Base and experts, in float32."""
    return [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (base, *experts)]


def entry(decoder: nn.Module, ids: Sequence[int]) -> tuple[Tensor, list[dict[str, Any]]]:
    """The hidden state that a decoder's first layer reads on a row, and what else transformers gives every layer."""
    found: list[tuple[Tensor, dict[str, Any]]] = []

    def pass_on(hidden: Tensor, **others: Any) -> Tensor:
        found.append((hidden, others))
        return hidden

    for layer in decoder.layers:
        layer.forward = pass_on
    try:
        decoder(input_ids=torch.tensor([list(ids)]), use_cache=False)
    finally:
        for layer in decoder.layers:
            del layer.forward  # uncovers the method of the class
    return found[0][0], [*(others for _, others in found), {}]  # the last norm reads the hidden state alone


def units(model: PreTrainedModel) -> list[nn.Module]:
    """What a hidden state goes through from embedding to head: the layers and the last norm."""
    return [*model.get_decoder().layers, model.get_decoder().norm]


@contextmanager
def recorded_inputs(unit: nn.Module, chosen: Callable[[nn.Module], Any]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what the chosen modules (those that a method solves for) read, by their names, a tensor a call."""
    inputs: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: inputs.setdefault(name, []).append(args[0])

    modules = [(name, module) for name, module in unit.named_modules() if chosen(module)]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def product(one: Tensor, other: Tensor) -> Tensor:
    """X^T Y of two tensors [tokens, width], float64."""
    # Twice as fast as products in float64; what they lose is far below the cutoff and what ALPHA puts in.
    blocks = zip(one.split(TOKENS_AT_ONCE), other.split(TOKENS_AT_ONCE), strict=True)
    return sum((left.T @ right).double() for left, right in blocks)


def normalised(norm: nn.Module, rows: Tensor) -> Tensor:
    """What a norm multiplies with its scale."""
    neutral = {kind: torch.full_like(value, kind == "weight") for kind, value in norm.named_parameters()}
    return functional_call(norm, neutral, (rows,))


def second_moments(unit: nn.Module, inputs: dict[str, list[Tensor]], per_token: bool) -> dict[str, Tensor]:
    """X^T X of every linear map [in, in], sums of squares of what every norm scales [width]; float64, by module."""
    found: dict[tuple[type, int], Tensor] = {}  # q, k and v read one tensor, and so do gate and up
    keys = {name: (type(unit.get_submodule(name)), id(tensors[0])) for name, tensors in inputs.items()}
    for name, tensors in inputs.items():
        if keys[name] in found:
            continue
        module, rows = unit.get_submodule(name), torch.cat([tensor.flatten(0, -2) for tensor in tensors])
        if isinstance(module, nn.Linear):
            moment = product(rows, rows)
        else:
            moment = normalised(module, rows).double().square().sum(0)
        found[keys[name]] = moment / len(rows) if per_token else moment
    return {name: found[key] for name, key in keys.items()}


def mean(values: Sequence[Tensor]) -> Tensor:
    """Plain average."""
    return torch.stack(list(values)).mean(0)


def run_rows(unit: nn.Module, states: Sequence[Tensor], others: Sequence[dict[str, Any]]) -> list[Tensor]:
    """What a layer makes of the hidden states of rows, each with what else the layer is given."""
    return [unit(state, **other) for state, other in zip(states, others, strict=True)]


def merge_unit(
    method: Method, target: nn.Module, sources: Sequence[nn.Module], moments: list[dict[str, Tensor]]
) -> None:
    """Turn a layer of the base into the merged one, in place."""
    for name, module in target.named_modules():
        solve = method.solver(module) if name in moments[0] else None
        for kind, parameter in module.named_parameters(recurse=False):
            values = [source.get_submodule(name).get_parameter(kind) for source in sources]
            solved = solve and kind == "weight"
            parameter.copy_(solve([of[name] for of in moments], values, parameter) if solved else mean(values))


@torch.no_grad()
def merge(method: str, base: Path, experts: Sequence[Path], rows: Sequence[Sequence[Sequence[int]]], out: Path) -> None:
    """Merge experts by one of `METHODS`, and write a float32 checkpoint without tokenizer.

    ``rows[t]``: token ids of the calibration rows of expert t's task.
    """
    if len(rows) != len(experts):
        raise ValueError(f"{len(experts)} experts, but calibration rows of {len(rows)}: give rows for every expert")
    how = METHODS[method]
    merged, *models = load_models(base, experts)
    solved_below = {id(parameter) for unit in units(merged) for parameter in unit.parameters()}
    for name, parameter in merged.named_parameters():
        if id(parameter) not in solved_below:
            parameter.copy_(mean([model.get_parameter(name) for model in models]))
    entries = [
        [entry((merged if how.reads_merged else model).get_decoder(), ids) for ids in task]
        for model, task in zip(models, rows, strict=True)
    ]
    hidden = [[state for state, _ in task] for task in entries]
    for number, target in enumerate(units(merged)):
        others = [[of_row[number] for _, of_row in task] for task in entries]
        sources, moments, outputs = [units(model)[number] for model in models], [], []
        for task, source in enumerate(sources):
            with recorded_inputs(source, how.solver) as inputs:
                outputs.append(run_rows(source, hidden[task], others[task]))
            moments.append(second_moments(source, inputs, how.per_token))
        merge_unit(how, target, sources, moments)
        hidden = [run_rows(target, *each) for each in zip(hidden, others, strict=True)] if how.reads_merged else outputs
    merged.save_pretrained(out)
