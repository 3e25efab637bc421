"""Behaviours of torch that this package relies on and torch does not document."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["TorchDispatchMode", "tree_leaves", "tree_map"]
"""Names that other files import from here."""
ONEDNN_KERNELS = 256
"""Kernels that oneDNN keeps, unless the environment says otherwise. It compiles one for every shape of a product, of
0.6 MB each, and keeps 1,024: batches of calibration rows have hundreds of shapes."""


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the `forward` of modules inside the context.

    Relies on `nn.Module.__call__` and `torch.func.functional_call` calling `self.forward`: an attribute of the instance
    hides the method of the class.
    """
    try:
        for module, forward in forwards.items():
            module.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is from torch's CPU allocator. It is a plain RuntimeError, recognized only by its text."""
    return "not enough memory" in str(error) or "can't allocate memory" in str(error)


class NoMeta(TorchDispatchMode):
    """Refuse tensors without data: torch multiplies one with a tensor on the CPU, and the product is arbitrary.

    Raises:
        ValueError: an operation gets a tensor on the meta device, and another on the CPU.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
        if len({tensor.is_meta for tensor in tensors}) == 2:
            raise ValueError("a tensor that was not loaded is used")
        return func(*args, **(kwargs or {}))


@contextmanager
def product_precision(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """Set how float32 matrix products are computed inside the context.

    On CUDA in float32, or in TF32 if asked for. On a CPU by oneDNN where its products are exact: MKL, the default, does
    not use all instructions of an AMD CPU. There oneDNN also keeps fewer kernels than usual, see `ONEDNN_KERNELS`.

    Args:
        device: the device of the products.
        tf32: use TF32, 10 bits of mantissa.
    """
    settings: dict[Any, dict[str, Any]] = {}
    if device.type == "cpu":  # oneDNN reads this at its first product
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(ONEDNN_KERNELS))
    if device.type == "cuda":
        products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
        if hasattr(products, "fp32_precision"):
            own = {"fp32_precision": "tf32" if tf32 else "ieee"}
            settings = {products: own, convolutions.conv: own}
        else:  # torch < 2.9
            settings = {products: {"allow_tf32": tf32}, convolutions: {"allow_tf32": tf32}}
    elif device.type == "cpu" and _is_onednn_exact():
        settings = {torch.backends.mkldnn.matmul: {"fp32_precision": "bf16"}}
    before = {module: {key: getattr(module, key) for key in values} for module, values in settings.items()}
    try:
        _set(settings)
        yield
    finally:
        _set(before)


def _set(settings: Mapping[Any, Mapping[str, Any]]) -> None:
    for module, values in settings.items():
        for key, value in values.items():
            setattr(module, key, value)


@cache
def _is_onednn_exact() -> bool:
    """Whether oneDNN computes float32 products as exactly as MKL where it is allowed to use bfloat16.

    It rounds to bfloat16 only on CPUs with instructions for that (AMX).
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if not torch.backends.mkldnn.is_available() or not hasattr(matmul, "fp32_precision"):  # torch < 2.9
        return False
    left, right = torch.rand((2, 512, 512), generator=torch.Generator().manual_seed(0))
    exact, before = left.double() @ right.double(), matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        found = left @ right
    finally:
        matmul.fp32_precision = before
    return bool(((found - exact).abs() <= 1e-5 * exact).all())


def attention_kernel(hidden: Tensor, num_heads: int) -> AbstractContextManager[Any]:
    """The kernel of scaled dot product attention, for hidden states [b, s, d]: on a CPU by plain matrix products where
    the scores fit its cache, which is faster, most of all backward."""
    limit = 2**22 if torch.is_grad_enabled() else 2**20
    if hidden.device.type == "cpu" and num_heads * hidden.shape[0] * hidden.shape[1] ** 2 <= limit:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bfloat16 by instructions of its own."""
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch >= 2.10
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
