"""Calls of the Triton kernels, which are imported on first use."""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["launched"]


@functools.cache
def _kernels(name: str, device: torch.device) -> Any:
    """The module of kernels with this name, for NVIDIA devices of compute capability 8.0 or higher; None elsewhere.

    On the CPU the module is returned too: tests run its kernels in Triton's interpreter.
    """
    on_cuda = device.type == "cuda"
    if on_cuda and (torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0)):
        return None
    try:
        version = importlib.import_module("triton").__version__
        module = importlib.import_module(f"semshift._{name}_triton")
    except ImportError:
        return None
    # Earlier versions of Triton crash the process when they compile a product of bfloat16 with a factor from a bit
    # shift.
    return None if on_cuda and tuple(map(int, version.split(".")[:2])) < (3, 2) else module


def launched(name: str, launcher: str, first: Tensor, *arguments: Any) -> Any:
    """The result of a launcher; None where its kernels do not run or do not support the arguments."""
    module = _kernels(name, first.device)
    if module is None:
        return None
    # Triton launches on the current device, which may not be that of `first`.
    with torch.cuda.device_of(first):
        return getattr(module, launcher)(first, *arguments)
