"""A pass waits for its device a fixed number of times for each layer, whatever the number of rows."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import PLAIN_JOINT
from test_architectures import job_of
from torch.utils._python_dispatch import TorchDispatchMode

from mergekit_slta.calibration.calibrate import gather_statistics
from mergekit_slta.models.skeleton import Skeleton
from mergekit_slta.objectives.gradient_passes import Passes
from mergekit_slta.runtime.distributed import ALONE
from mergekit_slta.runtime.progress import Progress


class Waits(TorchDispatchMode):
    """Counts what makes a program wait for a GPU, by decoder layer: reading a number, and copies to the CPU.

    Attributes:
        counts: decoder layer -> waits while it was the last one that had run.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()
        self.layer = -1
        to_cpu = torch.Tensor.cpu

        def entering(method, layer=None):
            def run(skeleton, *arguments):
                self.layer = arguments[0] if layer is None else layer
                return method(skeleton, *arguments)

            return run

        def copied(tensor):
            self.counts[self.layer] += 1
            return to_cpu(tensor)

        monkeypatch.setattr(Skeleton, "_run_layer", entering(Skeleton._run_layer))
        for name in ("embed", "head"):
            monkeypatch.setattr(Skeleton, name, entering(getattr(Skeleton, name), layer=-1))
        monkeypatch.setattr(torch.Tensor, "cpu", copied)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[self.layer] += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def waits_of_features(job) -> None:
    gather_statistics(job)


@torch.no_grad()
def waits_of_derivatives(job) -> None:
    point = {part.name: torch.full((2,), 0.5, dtype=torch.float64) for part in job.submodules}
    with Passes(job, None, ALONE, Progress("", 1, quiet=True)) as passes:
        passes.derivatives("", job.examples(), point, label_samples=2, seed=0)
        passes.measure("", job.examples(), [None, point])


@pytest.mark.parametrize(
    ("run", "settings"),
    [
        (waits_of_features, {"granularity": "attn_mlp"}),
        (waits_of_features, {"granularity": "linear"}),
        (waits_of_derivatives, {**PLAIN_JOINT, "granularity": "linear", "steps": 1}),
    ],
    ids=["blocks", "matrices", "derivatives"],
)
def test_waits_do_not_grow_with_rows(specimen, with_rows, run, settings):
    counted = []
    for rows in (2, 12):
        job = job_of(with_rows(specimen("qwen3")), **{**settings, "num_samples": rows})
        with pytest.MonkeyPatch.context() as monkeypatch, Waits(monkeypatch) as waits:
            run(job)
        counted.append([waits.counts[layer] for layer in range(job.skeleton.num_layers)])
    assert counted[0] == counted[1]
    assert min(counted[0]) > 0
