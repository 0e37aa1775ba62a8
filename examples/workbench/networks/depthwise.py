"""A depthwise convolution with a fast gradient on CPUs."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

__all__ = ["depthwise"]


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor, *, stride: int = 1, padding: int = 0, dilation: int = 1
) -> Tensor:
    """Depthwise `F.conv2d`: each channel is convolved separately. The gradient is faster on CPUs.

    On CPUs PyTorch uses oneDNN, which has fast gradients only for 3x3 kernels without stride and dilation. For other
    kernels the gradient costs up to a hundred times the forward. Here it is computed from those fast gradients.

    Args:
        x: images `[B, C, H, W]`.
        weight: `[C, 1, k, k]`, k odd and at least 3.
        bias: `[C]`.
        stride: stride in both directions.
        padding: padding in both directions; with a dilation above 1 it must be `dilation * (k - 1) / 2`, which keeps
            the size.
        dilation: dilation in both directions; above 1 only with stride 1.
    """
    assert weight.shape[-1] in range(3, 100, 2)
    if torch.is_autocast_enabled("cpu") and x.is_cpu:
        x, weight, bias = (t.to(torch.get_autocast_dtype("cpu")) for t in (x, weight, bias))
    if x.is_cpu and torch.is_grad_enabled() and (weight.shape[-1] > 3 or stride > 1 or dilation > 1):
        output: Tensor = _Depthwise.apply(x, weight, bias, stride, padding, dilation)  # type: ignore[no-untyped-call]
        return output
    return F.conv2d(x, weight, bias, stride, padding, dilation, len(weight))


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.dilation = stride, padding, dilation
        return F.conv2d(x, weight, bias, stride, padding, dilation, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        padding, dilation = ctx.padding // ctx.dilation, ctx.dilation
        bias = gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        size, channels, kernel = x.shape[-2:], len(weight), weight.shape[-1]
        if dilation > 1:
            # Pixels that a dilated kernel sees together become separate images.
            x, gradient = _apart(x, dilation), _apart(gradient, dilation)
        height, width = (n + 2 * padding - kernel + 1 for n in x.shape[-2:])
        if ctx.stride > 1:
            spread = x.new_zeros(len(x), height, width, channels).permute(0, 3, 1, 2)
            spread[..., :: ctx.stride, :: ctx.stride] = gradient
            gradient = spread
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_x = F.conv2d(gradient, weight.flip(-2, -1), None, padding=kernel - 1 - padding, groups=channels)
        if dilation > 1:
            of_x = _together(of_x, dilation)[..., : size[0], : size[1]]
        x, of_weight = F.pad(x, [padding] * 4), torch.empty_like(weight)
        for top in range(0, kernel - 2, 2):
            for left in range(0, kernel - 2, 2):
                seen = x[..., top : top + height + 2, left : left + width + 2]
                seen = seen.contiguous(memory_format=torch.channels_last)
                part = conv2d_weight(seen, (channels, 1, 3, 3), gradient, groups=channels)  # type: ignore[no-untyped-call]
                of_weight[..., top : top + 3, left : left + 3] = part
        return of_x, of_weight, bias, None, None, None


def _apart(x: Tensor, step: int) -> Tensor:
    """Split images into `[step * step * B, C, h, w]`, each with every step-th row and column, padded with zeros."""
    b, c, h, w = x.shape
    x = F.pad(x, (0, -w % step, 0, -h % step)).permute(0, 2, 3, 1)
    x = x.reshape(b, -(-h // step), step, -(-w // step), step, c).permute(2, 4, 0, 1, 3, 5)
    return x.flatten(0, 2).permute(0, 3, 1, 2)


def _together(x: Tensor, step: int) -> Tensor:
    """The inverse of `_apart`; the padding zeros remain."""
    x = x.permute(0, 2, 3, 1)
    x = x.reshape(step, step, -1, *x.shape[1:]).permute(2, 3, 0, 4, 1, 5)
    return x.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
