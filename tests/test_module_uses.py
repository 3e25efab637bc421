"""Derivatives where a module's weights are used in an unusual way: not only by calls that follow the hidden states."""

from __future__ import annotations

import pytest
import torch
import transformers.models.llama.modeling_llama as llama
from test_backward import at_experts
from test_gradient_passes import passes_of, some_point, stepping
from torch import nn
from whole_models import assert_close, expert_slopes

from mergekit_slta.calibration.calibrate import gather_statistics
from mergekit_slta.data import batches

FORWARD, INIT = llama.LlamaMLP.forward, llama.LlamaMLP.__init__


def reshaped(mlp, x):
    """A norm over parts of all tokens at once."""
    return FORWARD(mlp, mlp.extra(x.reshape(-1, 8)).reshape(x.shape))


def constant(mlp, x):
    """A linear map of constants, like one of relative positions."""
    return FORWARD(mlp, x) * mlp.extra(torch.linspace(-1, 1, 8).to(x)).sum()


def direct(mlp, x):
    """A weight that is used by a call, and without one."""
    return FORWARD(mlp, x) + nn.functional.linear(x, mlp.gate_proj.weight[:32])


def named(mlp, x):
    """Linear maps that get their input by name."""
    return mlp.down_proj(input=mlp.act_fn(mlp.gate_proj(input=x)) * mlp.up_proj(input=x))


CASES = {
    reshaped: lambda: nn.RMSNorm(8),
    constant: lambda: nn.Linear(8, 8, bias=False),
    direct: None,
    named: None,
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_slopes_equal_autograd_and_do_not_depend_on_batches(specimen, with_rows, monkeypatch, case):
    def init(mlp, config):
        INIT(mlp, config)
        if CASES[case] is not None:
            mlp.extra = CASES[case]()

    monkeypatch.setattr(llama.LlamaMLP, "__init__", init)
    monkeypatch.setattr(llama.LlamaMLP, "forward", case)
    models = specimen("llama", max_position_embeddings=1000 + list(CASES).index(case))  # models of its own
    job = at_experts(models, granularity="linear")
    found = gather_statistics(job).by_submodule
    assert_close({key: slopes[:, 0] for key, slopes in found.items()}, expert_slopes(models, job))
    job = stepping(with_rows(models), granularity="linear", max_seq_length=40)
    together = []
    for padding in (1.0, 10.0):
        monkeypatch.setattr(batches, "PADDING", padding)
        with torch.no_grad(), passes_of(job) as passes:
            together.append(passes.derivatives("", job.examples(), some_point(job), label_samples=1, seed=0))
    assert_close(*together)
