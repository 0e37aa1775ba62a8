"""Strong augmentation for consistency training: changes of colour and sharpness that should not change predictions."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["strengthen"]


def strengthen(images: Tensor, strength: float, draws: Tensor) -> Tensor:
    """Strong augmentation of images that keeps every pixel's class.

    The use is that of FixMatch (Sohn et al. 2020, arXiv 2001.07685), the kinds of change are those of UniMatch (Yang et
    al. 2023, arXiv 2208.09910). Brightness, contrast and saturation change by factors from `1 - strength` to
    `1 + strength`. With probability 0.2 an image loses its colour. With probability 0.5 it gets a Gaussian blur with a
    deviation of up to `2 * strength` pixels.

    Args:
        images: `[B, 3, H, W]`, `(rgb / 255 - 0.5) / 0.25`; the result has the same units.
        strength: strength of the changes, in [0, 1).
        draws: random numbers `[B, 6]`, uniform in [0, 1): three for the factors, then whether the image becomes grey,
            whether it is blurred, and how much.
    """
    draws = draws.to(images)[:, :, None, None, None]
    brightness, contrast, saturation = (1 + strength * (2 * draws[:, i] - 1) for i in range(3))
    rgb = images * 0.25 + 0.5
    rgb = (rgb * brightness).clamp(0, 1)
    mean = _grey(rgb).mean((2, 3), keepdim=True)
    rgb = (mean + contrast * (rgb - mean)).clamp(0, 1)
    grey = _grey(rgb)
    rgb = (grey + torch.where(draws[:, 3] < 0.2, 0.0, saturation) * (rgb - grey)).clamp(0, 1)
    deviation = 2 * strength * draws[:, 5]
    blurred = _blur(rgb, deviation.flatten())
    return (torch.where(draws[:, 4] < 0.5, blurred, rgb) - 0.5) / 0.25


def _grey(rgb: Tensor) -> Tensor:
    """Luma `[B, 1, H, W]` as in ITU-R BT.601."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=rgb.dtype, device=rgb.device)
    return (rgb * weights[:, None, None]).sum(1, keepdim=True)


def _blur(images: Tensor, deviations: Tensor) -> Tensor:
    """Gaussian blur of each image with its own deviation in pixels, at most 2; the kernel ends at 4 pixels."""
    b, c, _, _ = images.shape
    reach = torch.arange(-4, 5, dtype=images.dtype, device=images.device)
    kernels = (-0.5 * (reach / deviations[:, None].clamp(min=0.1)) ** 2).softmax(1).repeat_interleave(c, 0)
    x = F.pad(images, (4, 4, 4, 4), mode="replicate").flatten(0, 1)[None]
    x = F.conv2d(F.conv2d(x, kernels[:, None, None, :], groups=b * c), kernels[:, None, :, None], groups=b * c)
    return x.view_as(images)
