"""FeatCal: a merge by task arithmetic, calibrated layer by layer with the experts as teachers.

Gu et al., "FeatCal: Feature Calibration for Post-Merging Models", 2026 (arXiv 2605.13030);
https://github.com/egangu/featcal, whose layers are CLIP's: here the scale of an RMSNorm is solved for as that of a
LayerNorm without bias, and no token counts for less. Biases and what is outside the layers stay as merged. For decoders
that are laid out as Llama's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from closed_form import entry, load_models, normalised, product, recorded_inputs, run_rows
from torch import Tensor, nn

RIDGE, BLEND, TEACHER = 0.05, 2.2, 0.25
"""lambda: weight of the anchor. rho: where it lies, 0 at the base, 1 at the merge. alpha: share of the expert's
features in the teacher's, beside the merge's own. These are the repository's; the paper's text has rho 2, alpha 0.3."""

EPSILON = 1e-8
"""Beside the ridge on the diagonal, and what a norm of second moments is at least, as in the repository."""

Moments = tuple[Tensor, Tensor]
"""Of a linear map, means over tokens: S^T S and S^T T [in, in] of the merge's own inputs S and the teacher's T."""


def solve_linear(moments: Sequence[Moments], weights: Sequence[Tensor], anchor: Tensor) -> Tensor:
    """W minimises the sum of |S_t W^T - T_t W_t^T|^2 / |S_t^T S_t| plus `RIDGE` |W - anchor|^2 (Frobenius norms)."""
    norms = [own.norm().clamp_min(EPSILON) for own, _ in moments]
    left = sum(own / norm for (own, _), norm in zip(moments, norms, strict=True))
    right = sum(
        cross / norm @ weight.double().T for (_, cross), norm, weight in zip(moments, norms, weights, strict=True)
    )
    ridge = torch.eye(len(left), dtype=left.dtype)
    return torch.linalg.solve(left + (RIDGE + EPSILON) * ridge, right + RIDGE * anchor.double().T).T


def solve_scale(energies: Sequence[Tensor], weights: Sequence[Tensor], anchor: Tensor) -> Tensor:
    """The same for the scale of a norm, dimension by dimension.

    Energies: mean squares of what it multiplies, [width].
    """
    wanted = sum(energy * weight for energy, weight in zip(energies, weights, strict=True))
    return (wanted + RIDGE * anchor) / (sum(energies) + RIDGE)


def calibrated(module: nn.Module) -> bool:
    """Whether the weight of a module is solved for: those of linear maps and norms."""
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) or (isinstance(weight, nn.Parameter) and weight.dim() == 1)


def statistics(layer: nn.Module, own: dict[str, list[Tensor]], expert: dict[str, list[Tensor]]) -> dict[str, object]:
    """`Moments` of every linear map, energies of every norm, by module, from what merge and expert give them."""
    found: dict[str, object] = {}
    for name in own:
        student, teacher = (torch.cat([each.flatten(0, -2) for each in inputs[name]]) for inputs in (own, expert))
        if isinstance(layer.get_submodule(name), nn.Linear):
            square, cross = product(student, student) / len(student), product(student, teacher) / len(student)
            found[name] = (square, TEACHER * cross + (1 - TEACHER) * square)
        else:
            found[name] = normalised(layer.get_submodule(name), student).double().square().mean(0)
    return found


@torch.no_grad()
def merge(
    base: Path, experts: Sequence[Path], rows: Sequence[Sequence[Sequence[int]]], out: Path, start: float
) -> None:
    """Merge experts, and write a float32 checkpoint without tokenizer.

    Args:
        base, experts: checkpoints.
        rows: by expert, the token ids of its task's calibration rows.
        out: the checkpoint.
        start: weight of the task arithmetic that is calibrated.
    """
    origin, *models = load_models(base, experts)
    (merged,) = load_models(base, [])
    for name, parameter in merged.named_parameters():
        parameter.add_(sum(model.get_parameter(name) - origin.get_parameter(name) for model in models), alpha=start)
    entries = [
        [[entry(model.get_decoder(), ids) for ids in task] for model in (merged, expert)]
        for expert, task in zip(models, rows, strict=True)
    ]
    states = [[[state for state, _ in by_row] for by_row in pair] for pair in entries]
    for number, layer in enumerate(merged.get_decoder().layers):
        sources = [model.get_decoder().layers[number] for model in models]
        others = [[of_row[number] for _, of_row in pair[0]] for pair in entries]
        found = []
        for task, source in enumerate(sources):
            with recorded_inputs(layer, calibrated) as own, recorded_inputs(source, calibrated) as expert:
                run_rows(layer, states[task][0], others[task])
                states[task][1] = run_rows(source, states[task][1], others[task])
            found.append(statistics(layer, own, expert))
        for name in found[0]:
            weight, before = (each.get_submodule(name).weight for each in (layer, origin.get_decoder().layers[number]))
            solve = solve_linear if isinstance(layer.get_submodule(name), nn.Linear) else solve_scale
            wanted = [source.get_submodule(name).weight for source in sources]
            weight.copy_(solve([of[name] for of in found], wanted, before + BLEND * (weight - before)))
        for task, pair in enumerate(states):
            pair[0] = run_rows(layer, pair[0], others[task])
    merged.save_pretrained(out)
