"""Tensors under tracing and torch.func: whether their values can be read, and whether a transform is active."""

from typing import Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["readable", "transformed", "values_of"]


def values_of(tensor: Tensor) -> Optional[Tensor]:
    """The tensor with values inside the wrappers of torch.func; None for a fake or meta tensor."""
    # torch.func.debug_unwrap is public, but newer than torch 2.4.
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return None if tensor.untyped_storage().device.type == "meta" else tensor


def readable(tensor: Tensor) -> Optional[Tensor]:
    """`values_of` where reading values neither forces a device sync nor breaks a graph; None elsewhere."""
    return None if tensor.device.type != "cpu" or torch.compiler.is_compiling() else values_of(tensor)


def transformed(*tensors: Tensor) -> bool:
    """Whether a transform of torch.func is active or a tensor has a tangent: our own backward supports neither."""
    active: bool = torch._C._are_functorch_transforms_active()
    unpack = forward_ad.unpack_dual
    return active or any(unpack(tensor).tangent is not None for tensor in tensors)  # type: ignore[no-untyped-call]  # because torch's is untyped
