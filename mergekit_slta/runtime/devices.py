"""Whether a device is on this machine, what is free there, and giving freed memory back."""

from __future__ import annotations

import ctypes
import sys

import torch


def is_here(device: torch.device) -> bool:
    """Whether this machine has a device. It is not opened: that takes seconds and memory."""
    if device.type in ("cpu", "meta"):
        return True
    try:
        module = torch.get_device_module(device)
    except RuntimeError:  # this build of torch does not know the type
        return False
    return bool(module.is_available()) and (device.index or 0) < module.device_count()


FEATURES_SHARE = 0.2
"""Share of a device's free memory that the features of all rows may take."""


def holds_features(device: torch.device, size: int) -> bool:
    """Whether features of `size` bytes can stay on a device. Always on the CPU."""
    if device.type != "cuda":
        return True
    return size <= FEATURES_SHARE * torch.cuda.mem_get_info(device)[0]


def trim_heap() -> None:
    """Give freed memory back to the system, where glibc is the C library: it keeps what lies between blocks in use."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
