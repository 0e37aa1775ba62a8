"""Predictions of a segmenter as pictures in the colours of the classes."""

import math

import numpy as np
from torch import nn

from examples.scenes import Sample
from examples.workbench.data.samples import Samples, Subset
from examples.workbench.data_settings import Data
from examples.workbench.reporting.scores import predict
from examples.workbench.reporting.style import IGNORED, STRIPE, class_colours

__all__ = ["choose_shown", "draw_predictions", "paint_classes", "spread"]

_SHOWN, _LONGEST = 4, 512
"""Number of images in a report, and the longest side of an image in it, in pixels."""


def choose_shown(samples: Samples) -> list[Sample]:
    """A few images, evenly spaced from the first to the last."""
    few = spread(samples, _SHOWN)
    return [few[index] for index in range(len(few))]


def spread(samples: Samples, most: int) -> Samples:
    """At most `most` of the images, evenly spaced from the first to the last."""
    indices = np.linspace(0, len(samples) - 1, min(most, len(samples))).round().astype(int)
    return Subset(samples, indices.tolist())


def draw_predictions(segmenter: nn.Module, samples: Samples, data: Data) -> list[np.ndarray]:
    """Pictures `uint8 [H, 3 * W, 3]` of a few images: image, ground truth and prediction side by side.

    The segmenter must be in evaluation mode. Large images are subsampled.
    """
    pictures = []
    for sample in choose_shown(samples):
        masks = [sample.label, predict(segmenter, sample.image, data.size, sample.label.shape)]
        thin = math.ceil(max(sample.label.shape) / _LONGEST)
        parts = [part[::thin, ::thin] for part in (sample.image, *(paint_classes(ids, data) for ids in masks))]
        pictures.append(np.concatenate(parts, axis=1))
    return pictures


def paint_classes(ids: np.ndarray, data: Data) -> np.ndarray:
    """Class ids `[H, W]` as a picture in the colours of the classes, hatched where a pixel has no class."""
    ignored = ids == data.ignore_index
    picture: np.ndarray = class_colours(data.classes)[np.where(ignored, 0, ids)]
    period = max(4, ids.shape[1] // 24)
    stripe = np.indices(ids.shape).sum(0) % period < period // 3
    picture[ignored] = IGNORED
    picture[ignored & stripe] = STRIPE
    return picture
