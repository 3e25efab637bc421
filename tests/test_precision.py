"""The precision of matrix products, and what `compute_dtype` sets."""

from __future__ import annotations

import os

import pytest
import torch
from conftest import PLAIN_JOINT, refused
from test_architectures import job_of

from mergekit_slta.calibration.calibrate import gather_statistics
from mergekit_slta.errors import RunError
from mergekit_slta.job.preflight import prepare
from mergekit_slta.libraries import torch as torch_library
from mergekit_slta.libraries.torch import attention_kernel, has_fast_bfloat16, product_precision
from mergekit_slta.recipe.load import as_config
from mergekit_slta.recipe.read import read_recipe

CPU = torch.device("cpu")
KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


@pytest.mark.parametrize("sizes", [(3, 5, 7), (130, 576, 1536), (512, 64, 512)])
def test_products_on_a_cpu_are_true_float32(sizes):
    """Also where oneDNN may use bfloat16; afterwards the setting is as before."""
    tokens, inner, out = sizes
    left, right = torch.randn(tokens, inner), torch.randn(inner, out)
    before = torch.backends.mkldnn.matmul.fp32_precision
    with product_precision(CPU, tf32=False):
        found = left @ right
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    exact = left.double() @ right.double()
    assert (found - exact).norm() <= 1e-6 * exact.norm()


def test_a_cpu_that_rounds_is_left_alone(monkeypatch):
    """With AMX, oneDNN would round to bfloat16: torch's default stays."""
    monkeypatch.setattr(torch_library, "_is_onednn_exact", lambda: False)
    with product_precision(CPU, tf32=False):
        assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_onednn_keeps_few_kernels_unless_told(monkeypatch):
    """It compiles one for each shape of a product, and reads the limit from the environment."""
    monkeypatch.delenv(KERNELS, raising=False)
    with product_precision(CPU, tf32=False):
        assert os.environ[KERNELS] == str(torch_library.ONEDNN_KERNELS)
    monkeypatch.setenv(KERNELS, "7")
    with product_precision(CPU, tf32=False):
        assert os.environ[KERNELS] == "7"


@pytest.mark.parametrize("tokens", [8, 3000])
def test_attention_is_the_same_by_every_kernel(tokens):
    query, key, value = torch.randn(3, 1, 2, tokens, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    with attention_kernel(torch.empty(1, tokens, 8), num_heads=2):
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "jamba"])
def test_auto_rounds_products_of_joint_alone(specimen, monkeypatch, name):
    """Where the device has instructions for bfloat16: `features` is in float32 all the same, and the slopes of `joint`
    are those of float32 to the precision of bfloat16."""
    monkeypatch.setattr("mergekit_slta.job.preflight.has_fast_bfloat16", lambda _: True)

    def found(dtype, **settings):
        return gather_statistics(job_of(specimen(name), compute_dtype=dtype, **settings)).by_submodule

    own = {"granularity": "attn_mlp", "num_samples": 3}
    for key, grams in found("auto", **own).items():
        assert torch.equal(grams, found("float32", **own)[key])
    settings = {key: value for key, value in PLAIN_JOINT.items() if key != "compute_dtype"}
    settings |= {**own, "steps": 0, "label_samples": 0}
    exact, rounded = (torch.cat([*found(dtype, **settings).values()], dim=-1) for dtype in ("float32", "auto"))
    difference = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < difference < 3e-2


def test_joint_never_subtracts_outputs_in_tf32(specimen, with_rows, monkeypatch):
    """Its search may use TF32 on a GPU; the pass of `features` that it starts with may not."""
    asked = []

    def record(device, *, tf32):
        asked.append(tf32)
        return product_precision(device, tf32=tf32)

    monkeypatch.setattr("mergekit_slta.job.preflight.has_fast_bfloat16", lambda _: True)
    monkeypatch.setattr("mergekit_slta.job.job.product_precision", record)
    settings = {key: value for key, value in PLAIN_JOINT.items() if key != "compute_dtype"} | {"steps": 1}
    gather_statistics(job_of(with_rows(specimen("llama")), compute_dtype="auto", **settings))
    assert asked == [False, True]  # features, search
    asked.clear()
    gather_statistics(job_of(specimen("llama"), compute_dtype="auto", granularity="attn_mlp"))
    assert asked == [False]


def test_tf32_needs_a_gpu(tiny, options):
    with refused(RunError, "unusable-device", "`compute_dtype` is tf32", "cpu", "auto"):
        prepare(read_recipe(as_config(tiny.recipe(compute_dtype="tf32"))), options, for_merge=False)


def test_whether_a_device_is_fast_is_told_without_opening_it():
    assert has_fast_bfloat16(torch.device("meta")) is False
    assert isinstance(has_fast_bfloat16(CPU), bool)
