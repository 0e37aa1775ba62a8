"""Augmentation of training images, and images as the network takes them."""

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from examples.scenes import Sample
from examples.workbench.settings import Augmentation

__all__ = ["augment", "resize_image", "image_tensor"]


def augment(
    sample: Sample, size: tuple[int, int], rng: np.random.Generator, settings: Augmentation, *, ignore_index: int = 255
) -> Sample:
    """Scale, crop to `size`, mirror and recolour; where the crop leaves the image, pixels are black and ignored."""
    height, width = size
    # At scale 1 the image just fills the crop along one axis and overfills it along the other.
    fill = max(height / sample.image.shape[0], width / sample.image.shape[1])
    scale = fill * float(rng.uniform(*settings.scale))
    scaled = [max(1, round(extent * scale)) for extent in sample.image.shape[:2]]
    picture = Image.fromarray(sample.image).resize((scaled[1], scaled[0]), Image.Resampling.BILINEAR)
    mask = Image.fromarray(sample.label).resize((scaled[1], scaled[0]), Image.Resampling.NEAREST)
    top, left = (_offset(inside, crop, rng) for inside, crop in zip(scaled, size))
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhancer(picture).enhance(float(rng.uniform(1 - settings.colour, 1 + settings.colour)))
    image, label = np.zeros((height, width, 3), np.uint8), np.full((height, width), ignore_index, np.uint8)
    inside = (slice(max(0, -top), min(height, scaled[0] - top)), slice(max(0, -left), min(width, scaled[1] - left)))
    taken = tuple(slice(part.start + start, part.stop + start) for part, start in zip(inside, (top, left)))
    image[inside] = np.asarray(picture)[taken]
    label[inside] = np.asarray(mask)[taken]
    if rng.random() < settings.flip:
        image, label = image[:, ::-1], label[:, ::-1]
    return Sample(np.ascontiguousarray(image), np.ascontiguousarray(label), sample.name)


def resize_image(sample: Sample, size: tuple[int, int]) -> np.ndarray:
    """The image at the network's size, for evaluation; `uint8 [h, w, 3]`."""
    if sample.image.shape[:2] == size:
        return sample.image
    return np.asarray(Image.fromarray(sample.image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def image_tensor(image: np.ndarray) -> Tensor:
    """`uint8 [H, W, 3]` to `float32 [3, H, W]` in about [-2, 2]."""
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - 0.5) / 0.25


def _offset(inside: int, crop: int, rng: np.random.Generator) -> int:
    """Where a crop begins: anywhere inside, or such that a smaller image lies anywhere in it."""
    low, high = sorted((0, inside - crop))
    return int(rng.integers(low, high + 1))
