"""Sums over ranks as visible calls, which do nothing in one process."""

from typing import Any, Optional

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["all_reduce_sum"]


def all_reduce_sum(tensor: Tensor, *, group: Optional[Any] = None) -> Tensor:
    """Add a tensor up over all ranks, differentiably.

    Every rank gets the same sum. In the backward the gradients of all ranks are added up too, since each rank's input
    feeds every rank's loss. So if every rank computes the same loss from the sum, each gets the gradient W times over,
    for W ranks; `DistributedDataParallel`, which averages over ranks, brings that back to the gradient of the loss.
    Forward and backward are reductions that all ranks must reach, in one order: a rank whose loss leaves the sum out
    keeps the others waiting. Multiply by 0 instead.

    Args:
        tensor: of one shape and dtype on every rank; integers are fine and have no gradient.
        group: a process group, None for all ranks.

    Returns:
        The sum in the shape and dtype of `tensor`; `tensor` itself where `torch.distributed` is not initialised.

    Raises:
        TypeError: something else than a tensor, or a bool one, whose sum is no bool.

    Example:
        >>> all_reduce_sum(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected tensor to be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype == torch.bool:
        raise TypeError("expected tensor to hold numbers, got torch.bool")
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    result: Tensor = _AllReduceSum.apply(tensor, group)  # type: ignore[no-untyped-call]  # because torch's apply is untyped
    return result


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        # A copy that is dense, since the reduction is in place.
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # The adjoint of a sum that every rank receives is the sum of what every rank sends back.
        return _AllReduceSum.apply(gradients[0], ctx.group), None  # type: ignore[no-untyped-call]  # because torch's apply is untyped
