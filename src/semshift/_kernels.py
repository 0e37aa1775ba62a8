"""Where Triton's kernels run; they are imported on first use."""

import functools
import importlib
from typing import Any

import torch

__all__ = ["kernels"]


@functools.cache
def kernels(name: str, device: torch.device) -> Any:
    """The module of kernels of this name, for NVIDIA's devices from compute capability 8.0 on; None elsewhere.

    The CPU has them too, by Triton's interpreter: that is how they are tested.
    """
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0)):
        return None
    try:
        return importlib.import_module(f"semshift._{name}_triton")
    except ImportError:
        return None
