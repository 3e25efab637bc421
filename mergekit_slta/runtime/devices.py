"""Whether a device is on this machine."""

from __future__ import annotations

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
