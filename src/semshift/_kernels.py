"""Where Triton's kernels run; they are imported on first use."""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["launched"]


@functools.cache
def _kernels(name: str, device: torch.device) -> Any:
    """The module of kernels of this name, for NVIDIA's devices from compute capability 8.0 on; None elsewhere.

    The CPU has them too, by Triton's interpreter: that is how they are tested.
    """
    on_cuda = device.type == "cuda"
    if on_cuda and (torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0)):
        return None
    try:
        version = importlib.import_module("triton").__version__
        module = importlib.import_module(f"semshift._{name}_triton")
    except ImportError:
        return None
    # Earlier compilers end the process where a product of bfloat16 takes its factor from a shift.
    return None if on_cuda and tuple(map(int, version.split(".")[:2])) < (3, 2) else module


def launched(name: str, launcher: str, first: Tensor, *arguments: Any) -> Any:
    """What a launcher returns; None where its kernels do not run, or it does not serve such arguments."""
    module = _kernels(name, first.device)
    if module is None:
        return None
    # Triton launches on the current device, which may be another.
    with torch.cuda.device_of(first):
        return getattr(module, launcher)(first, *arguments)
