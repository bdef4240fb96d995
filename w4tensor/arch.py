"""The only place that asks the device, or the Triton release, anything."""

from __future__ import annotations

import functools

from w4tensor.dispatch import Arch

__all__ = ["current"]


@functools.cache
def current(device: int | None = None) -> Arch | None:
    """The Arch of CUDA device `device` (the current one by default), or None without CUDA."""
    import torch

    if not torch.cuda.is_available():
        return None
    import triton

    properties = torch.cuda.get_device_properties(
        torch.cuda.current_device() if device is None else device
    )
    major, minor = triton.__version__.split(".")[:2]
    return Arch(
        capability=(properties.major, properties.minor),
        num_sms=properties.multi_processor_count,
        triton=(int(major), int(minor)),
    )
