"""Image resizing with Pillow's results, written in operations that can be exported."""

import torch
from torch import Tensor

__all__ = ["resize_as_pillow"]

_ONE = 2**22
"""Pillow's weights are integer multiples of 1 / 2**22."""


def resize_as_pillow(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images with the same result as `data.samples.resize_image`, which the evaluation uses.

    The function rounds to integers, resizes the width, rounds, resizes the height and rounds, with the weights of
    Pillow's `BILINEAR`. In float64 all products and sums are exact, so the result equals Pillow's bit for bit.

    Args:
        images: `[..., H, W]` in [0, 255].
        size: new height and width.

    Returns:
        `[..., *size]`, integers stored as float64 (as float32 on mps, which has no float64).
    """
    dtype = torch.float32 if images.device.type == "mps" else torch.float64
    wide = images.to(dtype).round() @ _weights(images.shape[-1], size[1], dtype, images.device).T
    narrow = ((wide + _ONE / 2) / _ONE).floor()
    resized = _weights(images.shape[-2], size[0], dtype, images.device) @ narrow
    return ((resized + _ONE / 2) / _ONE).floor()


def _weights(old: int, new: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Weights `[new, old]`: a triangle around each new pixel, on each side as wide as the larger kind of pixel."""
    # The width of a new pixel in old pixels. It is a tensor, since ONNX would compute a quotient of sizes in float32.
    scale = torch.scalar_tensor(old, dtype=dtype, device=device) / new
    centres = (torch.arange(new, dtype=dtype, device=device) + 0.5) * scale
    distances = (torch.arange(old, dtype=dtype, device=device) + 0.5 - centres[:, None]).abs()
    triangles = (1 - distances / scale.clamp(min=1)).clamp(min=0)
    weights: Tensor = triangles / triangles.sum(1, keepdim=True)
    return (weights * _ONE + 0.5).floor()
