"""Reductions over ranks as explicit calls, which also run in a single process."""

from collections.abc import Iterable
from typing import Any, Optional

import torch
from torch import Tensor
from torch import distributed as dist

from semshift._checks import check_tensor
from semshift._ranks import initialised

__all__ = ["all_gather", "all_reduce_sum", "average_gradients"]


def all_reduce_sum(tensor: Tensor, *, group: Optional[Any] = None) -> Tensor:
    """Sum of a tensor over all ranks, differentiable.

    Every rank gets the same sum. The backward also adds up the gradients of all ranks, since each rank's input affects
    every rank's loss. So if all W ranks compute the same loss from the sum, each rank gets W times the gradient of that
    loss. `DistributedDataParallel` then averages over ranks, which gives the gradient of the loss. All ranks must reach
    the forward and the backward, in the same order. If a rank leaves the sum out of its loss, the other ranks wait for
    it. Such a rank must multiply the sum by 0 instead.

    Args:
        tensor: of the same shape and dtype on every rank; integers are allowed and have no gradient.
        group: a process group, None for all ranks.

    Returns:
        The sum in the shape and dtype of `tensor`; `tensor` itself where `torch.distributed` is not initialised.

    Raises:
        TypeError: not a tensor, or a bool tensor, since its sum would not be bool.

    Example:
        >>> semshift.all_reduce_sum(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    check_tensor("tensor", tensor)
    if tensor.dtype == torch.bool:
        raise TypeError("expected tensor to hold numbers, got torch.bool; pass tensor.long() to count")
    if not initialised():
        return tensor
    result: Tensor = _AllReduceSum.apply(tensor, group)  # type: ignore[no-untyped-call]  # because torch's apply is untyped
    return result


def all_gather(tensor: Tensor, *, group: Optional[Any] = None) -> Tensor:
    """Stack of the tensors of all ranks, differentiable.

    Use it for a loss that is a weighted mean over several ranks. Gather a discriminator's logits and their weights;
    every rank then computes the same loss over the whole batch. As with `all_reduce_sum`, the backward adds up the
    gradients of all ranks, and all ranks must reach the forward and the backward. `DistributedDataParallel` or
    `average_gradients` then averages the gradients, which gives the gradient of that loss.

    Args:
        tensor: of the same shape and dtype on every rank; integers and bools are allowed and have no gradient.
        group: a process group, None for all ranks.

    Returns:
        `[W, *tensor.shape]` in the dtype of `tensor`, rank r in row r; one row where `torch.distributed` is not
        initialised.

    Raises:
        TypeError: not a tensor.

    Example:
        >>> semshift.all_gather(torch.tensor([1.0, 2.0]))
        tensor([[1., 2.]])
    """
    check_tensor("tensor", tensor)
    if not initialised():
        return tensor[None]
    if tensor.dtype == torch.bool:
        return all_gather(tensor.to(torch.uint8), group=group).to(torch.bool)
    result: Tensor = _AllGather.apply(tensor, group)  # type: ignore[no-untyped-call]  # because torch's apply is untyped
    return result


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor], *, group: Optional[Any] = None) -> None:
    """Average of the parameters' gradients over all ranks, in place: `DistributedDataParallel`'s averaging as a call.

    Use it in loops that run a network several times before one backward, or that compute gradients in between.
    Gradients are reduced in the order of the parameters from the first step on, so a run resumes bit-identically. The
    reduction starts only after the backward, and needs memory for a second copy of the gradients.

    Args:
        parameters: the same on every rank and in the same order, such as `module.parameters()`. Parameters that do not
            require grad are left out. A missing gradient counts as 0, and is set to the average too.
        group: a process group, None for all ranks.

    Raises:
        TypeError: not tensors, or a single tensor.
        ValueError: a group without this rank.

    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> weight.square().sum().backward()
        >>> semshift.average_gradients([weight])
        >>> weight.grad
        tensor([2., 2.])
    """
    if isinstance(parameters, Tensor):
        raise TypeError("expected parameters to be an iterable of tensors, got a single tensor; pass [parameter]")
    learning = list(parameters)
    for parameter in learning:
        check_tensor("each of parameters", parameter)
    if not initialised():
        return
    learning = [parameter for parameter in learning if parameter.requires_grad]
    ranks = dist.get_world_size(group)
    if ranks < 1:
        raise ValueError("expected a group that contains this rank, got one without it")
    # One reduction per device and dtype: hundreds of small ones would wait for each other.
    for kind in dict.fromkeys((parameter.device, parameter.dtype) for parameter in learning):
        alike = [parameter for parameter in learning if (parameter.device, parameter.dtype) == kind]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in alike])
        # A half-precision sum may overflow where the mean does not.
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        dist.all_reduce(flat, group=group)
        for parameter, mean in zip(alike, torch.split(flat.div_(ranks), [p.numel() for p in alike])):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(mean.view(parameter.shape))


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        # A contiguous copy, since the reduction is in place.
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # Every rank receives the sum, so the gradients from all ranks are added up.
        return _AllReduceSum.apply(gradients[0], ctx.group), None  # type: ignore[no-untyped-call]  # because torch's apply is untyped


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        rows = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
        dist.all_gather(list(rows), tensor.contiguous(), group=group)
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # Each rank's row went to every rank, so its gradients from all ranks are added up.
        return all_reduce_sum(gradients[0], group=ctx.group)[dist.get_rank(ctx.group)], None
