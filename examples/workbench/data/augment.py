"""Augmentation of training images."""

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from examples.scenes import Sample
from examples.workbench.data_settings import Augmentation

__all__ = ["augment"]


def augment(
    sample: Sample, size: tuple[int, int], rng: np.random.Generator, settings: Augmentation, *, ignore_index: int = 255
) -> Sample:
    """Scale, crop to `size`, mirror and recolour a sample; outside the image, the crop is black and ignored."""
    height, width = size
    # At scale 1 the image just covers the crop.
    cover = max(height / sample.image.shape[0], width / sample.image.shape[1])
    scale = cover * float(rng.uniform(*settings.scale))
    rows, columns = (max(1, round(extent * scale)) for extent in sample.image.shape[:2])
    picture = Image.fromarray(sample.image).resize((columns, rows), Image.Resampling.BILINEAR)
    mask = Image.fromarray(sample.label).resize((columns, rows), Image.Resampling.NEAREST)
    top, left = _offset(rows, height, rng), _offset(columns, width, rng)
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhancer(picture).enhance(float(rng.uniform(1 - settings.colour, 1 + settings.colour)))
    image, label = Image.new("RGB", (width, height)), Image.new("L", (width, height), ignore_index)
    image.paste(picture, (-left, -top))
    label.paste(mask, (-left, -top))
    if rng.random() < settings.flip:
        image, label = ImageOps.mirror(image), ImageOps.mirror(label)
    return Sample(np.array(image), np.array(label), sample.name)


def _offset(extent: int, crop: int, rng: np.random.Generator) -> int:
    """Random start of a crop in an image. It is negative if the image is smaller: the image then lies in the crop."""
    low, high = sorted((0, extent - crop))
    return int(rng.integers(low, high + 1))
