"""Sums over ranks as visible calls, which do nothing in one process."""

from collections.abc import Iterable
from typing import Any, Optional

import torch
from torch import Tensor
from torch import distributed as dist

from semshift._checks import check_tensor
from semshift._ranks import initialised

__all__ = ["all_gather", "all_reduce_sum", "average_gradients"]


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
        >>> semshift.all_reduce_sum(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    check_tensor("tensor", tensor)
    if tensor.dtype == torch.bool:
        raise TypeError("expected tensor to hold numbers, got torch.bool")
    if not initialised():
        return tensor
    result: Tensor = _AllReduceSum.apply(tensor, group)  # type: ignore[no-untyped-call]  # because torch's apply is untyped
    return result


def all_gather(tensor: Tensor, *, group: Optional[Any] = None) -> Tensor:
    """Stack the tensors of all ranks, differentiably.

    For losses that are weighted means of what lies on several ranks: gather a discriminator's logits and their
    weights, and every rank computes the one loss of the whole batch. As with `all_reduce_sum`, the backward adds up
    the gradients of all ranks, which `DistributedDataParallel` or `average_gradients` then bring back to the gradient
    of that loss, and all ranks must reach both.

    Args:
        tensor: of one shape and dtype on every rank; integers and bools are fine and have no gradient.
        group: a process group, None for all ranks.

    Returns:
        `[W, *tensor.shape]` in the dtype of `tensor`, rank r in row r; one row where `torch.distributed` is not
        initialised.

    Raises:
        TypeError: something else than a tensor.

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
    """Replace every parameter's gradient by its mean over all ranks: what `DistributedDataParallel` does, as a call.

    For loops that run a network several times before one backward, or that ask for gradients in between. The order in
    which ranks are added up is that of the parameters, from the first step on, so a resumed run has the same bits.
    It waits for the backward to end, and needs memory for the gradients once more.

    Args:
        parameters: the same on every rank and in the same order, such as `module.parameters()`; those that do not
            require grad are left out. One without a gradient counts as 0 and has one afterwards.
        group: a process group, None for all ranks.

    Raises:
        TypeError: something else than tensors, or a single one.
        ValueError: a group that this rank is not in.

    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> weight.square().sum().backward()
        >>> semshift.average_gradients([weight])
        >>> weight.grad
        tensor([2., 2.])
    """
    if isinstance(parameters, Tensor):
        raise TypeError("expected parameters to be several tensors, got one: [parameter] is a list of it")
    learning = list(parameters)
    for parameter in learning:
        check_tensor("each of parameters", parameter)
    if not initialised():
        return
    learning = [parameter for parameter in learning if parameter.requires_grad]
    ranks = dist.get_world_size(group)
    if ranks < 1:
        raise ValueError("expected a group that this rank is in, got one without it")
    # One reduction for all of one kind: hundreds of small ones would wait for each other.
    for kind in dict.fromkeys((parameter.device, parameter.dtype) for parameter in learning):
        alike = [parameter for parameter in learning if (parameter.device, parameter.dtype) == kind]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in alike])
        # A sum of half precision may overflow where the mean does not.
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
        # A copy that is dense, since the reduction is in place.
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # The adjoint of a sum that every rank receives is the sum of what every rank sends back.
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
        # Each rank's row went to every rank, so what they send back adds up.
        return all_reduce_sum(gradients[0], group=ctx.group)[dist.get_rank(ctx.group)], None
