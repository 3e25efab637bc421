"""Reference for `objective: joint`: whole models in memory, transformers' forward, and autograd over all parameters.

Shares no code with the package but the description of a job: its rows, its submodules and the names of its tensors.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from conftest import Models, own_class
from torch import Tensor


def whole_model(path: Path) -> torch.nn.Module:
    return own_class(path).from_pretrained(path, dtype=torch.float32).eval()


@functools.lru_cache(maxsize=1)
def models_of(models: Models) -> list[torch.nn.Module]:
    """The base and the experts."""
    return [whole_model(path) for path in (models.base, *models.experts)]


def states_of(models: Models) -> list[dict[str, Tensor]]:
    """Parameters of the base and of the experts."""
    return [dict(model.named_parameters()) for model in models_of(models)]


@torch.no_grad()
def merged_model(models: Models, job, point) -> torch.nn.Module:
    """The base, with every submodule moved by `point`, submodule -> [T]."""
    states, merged = states_of(models), whole_model(models.base)
    parameters = dict(merged.named_parameters())
    for submodule in job.submodules:
        for tensor in submodule.tensors:
            for expert, alpha in enumerate(point[submodule.name].tolist()):
                change = alpha * (states[expert + 1][tensor] - states[0][tensor])
                pairs = zip(parts(submodule, tensor, parameters[tensor]), parts(submodule, tensor, change), strict=True)
                for own, part in pairs:
                    own.add_(part)
    return merged


def parts(submodule, tensor: str, value: Tensor) -> list[Tensor]:
    """The parts of a tensor that belong to a submodule."""
    own = [part for part in submodule.slices if part.tensor == tensor]
    return [value.narrow(part.axis, part.start, part.stop - part.start) for part in own] or [value]


def answer_log_probs(model: torch.nn.Module, example) -> Tensor:
    """[n, V] at the positions that predict a row's answer."""
    logits = model(torch.tensor([list(example.row.ids)]), use_cache=False).logits[0]
    return torch.log_softmax(logits[example.row.completion - 1 : -1].float(), dim=-1)


def divergence(expert: torch.nn.Module, model: torch.nn.Module, example) -> Tensor:
    """KL(expert || model), summed over the answer."""
    taught, ours = answer_log_probs(expert, example).detach(), answer_log_probs(model, example)
    return (taught.exp() * (taught - ours)).sum()


def loss(model: torch.nn.Module, example, labels: Tensor | None = None) -> Tensor:
    """Cross-entropy, summed over the answer, on its own tokens unless labels are given."""
    wanted = torch.tensor(list(example.row.ids[example.row.completion :])) if labels is None else labels
    return -answer_log_probs(model, example).gather(1, wanted[:, None]).sum()


def slopes_of(value: Tensor, model: torch.nn.Module, models: Models, job) -> dict[str, Tensor]:
    """submodule -> [T] float64: <d value / d parameters of model, each expert's change>."""
    states = states_of(models)
    model.zero_grad()
    value.backward()
    parameters = dict(model.named_parameters())
    found = {submodule.name: torch.zeros(len(states) - 1, dtype=torch.float64) for submodule in job.submodules}
    for submodule in job.submodules:
        for tensor in submodule.tensors:
            gradient = parameters[tensor].grad
            for expert in range(len(states) - 1) if gradient is not None else ():
                product = gradient * (states[expert + 1][tensor] - states[0][tensor]).detach()
                found[submodule.name][expert] += sum(part.double().sum() for part in parts(submodule, tensor, product))
    return found


def expert_slopes(models: Models, job, labels: list[Tensor] | None = None) -> dict[str, Tensor]:
    """submodule -> [rows, T] float64 slopes of every row's loss at its expert."""
    rows = []
    for row, example in enumerate(job.examples()):
        expert = models_of(models)[example.task + 1]
        rows.append(slopes_of(loss(expert, example, labels and labels[row]), expert, models, job))
    return {submodule.name: torch.stack([row[submodule.name] for row in rows]) for submodule in job.submodules}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """To `tolerance` of the largest slope."""
    scale = max(float(part.abs().max()) for part in expected.values())
    assert found.keys() == expected.keys()
    for name, slopes in expected.items():
        difference = (found[name].double() - slopes.double()).abs().max()
        assert difference <= tolerance * scale, (name, float(difference), scale)
        assert slopes.abs().max() > 0 or not found[name].any()
