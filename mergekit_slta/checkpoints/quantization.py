"""Recognize quantized weights by the names and dtypes of a checkpoint's tensors, and refuse them.

Scope: names and dtypes. mergekit reads packed or scaled numbers as if they were the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mergekit_slta.checkpoints.headers import StoredTensor
from mergekit_slta.errors import ModelError, show
from mergekit_slta.libraries.mergekit import LazyTensorLoader

_WHOLE_FLOATS = ("F64", "F32", "F16", "BF16")
_COMPANION = re.compile(
    r"(?<!parametrizations)\.weight\."  # bitsandbytes 4-bit (absmax, quant_map, quant_state), quanto
    r"|\._?weight_\w+$"  # FP8 (scale_inv, scale), compressed-tensors (packed, shape, zero_point), torchao (qdata)
    r"|\.(SCB|CB)$"  # bitsandbytes 8-bit
    r"|\.(qweight|q_weight|qzeros|scales|g_idx|W_q|codes|codebooks)$"  # GPTQ, AWQ, EXL2, HQQ, AQLM
    r"|_(blocks|scales|scale_inv)$|proj_scale$"  # MXFP4, fused experts in FP8
)
"""Names of the tensors that quantization methods store beside, or in place of, a weight."""


def refuse_quantized(loader: LazyTensorLoader, stored: Mapping[str, StoredTensor], name: str) -> None:
    """Refuse a checkpoint with quantized weights.

    Integer buffers (masks, positions) are no weights: of integers only tensors called `weight` count here. `reconcile`
    looks at the other parameters, when it knows the model class.

    Args:
        loader: the checkpoint's loader.
        stored: its tensors.
        name: the model's name, for messages.

    Raises:
        ModelError: a tensor is stored in 8 bits or fewer, or belongs to a quantized weight.
    """
    found = [key for key, tensor in stored.items() if _is_quantized(key, tensor.dtype)]
    if found:
        raise quantized(loader, stored, found, name)


def _is_quantized(key: str, dtype: str) -> bool:
    if _COMPANION.search(key):
        return True
    if is_whole_float(dtype):
        return False
    return dtype.startswith("F") or key.endswith(".weight")


def is_whole_float(dtype: str) -> bool:
    """Whether a dtype of a safetensors file is a float of 16 bits or more."""
    return dtype in _WHOLE_FLOATS


def quantized(loader: LazyTensorLoader, stored: Mapping[str, StoredTensor], found: list[str], name: str) -> ModelError:
    """The error for quantized weights, which names the file and some of the tensors `found`."""
    examples = ", ".join(f"{show(key, 80)} in {stored[key].dtype}" for key in found[:2])
    file = loader.index.tensor_paths.get(found[0], "its checkpoint")
    return ModelError(
        f"{show(file)} of {show(name)} holds quantized weights ({examples}{', …' * (len(found) > 2)}): dequantize "
        "first (transformers: `from_pretrained`, `.dequantize()`, `save_pretrained`), or name the 16-bit model",
        code="quantized-weights",
    )
