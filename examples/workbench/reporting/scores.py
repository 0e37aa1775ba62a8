"""Evaluation of a segmenter: intersection over union (IoU) of each class over a set of images."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

import semshift
from examples.workbench.data.samples import Samples, image_tensor, resize_image
from examples.workbench.data_settings import Data
from examples.workbench.errors import InputError
from examples.workbench.networks.segmentation import upsample
from examples.workbench.progress import bar
from examples.workbench.reporting.masks import save_mask

__all__ = ["Scores", "classes_of", "evaluate", "mean_iou", "predict", "score_table", "segment", "subset_means"]


class Scores(NamedTuple):
    """IoU of each class, and their mean."""

    iou: dict[str, float | None]
    """Name of a class to its IoU in [0, 1]; None for a class that is neither in the labels nor in the predictions."""
    miou: float | None
    """Mean over the classes that have an IoU; None where nothing was evaluated."""
    unlabelled: list[str]
    """Classes without a labelled pixel; if such a class is predicted, its IoU is 0."""


def evaluate(
    segmenter: nn.Module,
    samples: Samples,
    data: Data,
    *,
    predictions: Path | None = None,
    progress: str | None = "evaluate",
    rank: int = 0,
    world_size: int = 1,
) -> Scores:
    """Scores of a segmenter over all images, counted at the size of the labels.

    Args:
        segmenter: maps images `[1, 3, *data.size]` to a `Segmentation`, in evaluation mode.
        samples: images with labels.
        data: the classes, the size at which the segmenter sees the images, and the label of ignored pixels.
        predictions: folder for the predicted masks, `NAME.png`, see `save_mask`.
        progress: title of the progress bar; None shows no bar.
        rank: of this process. Each process evaluates its own images and writes their masks.
        world_size: number of processes. All processes return the same scores.
    """
    device = next(segmenter.parameters()).device
    metric = MulticlassJaccardIndex(
        len(data.classes), average="none", ignore_index=data.ignore_index, zero_division=math.nan
    ).to(device)
    pixels = torch.zeros(256, dtype=torch.int64)
    own = range(rank, len(samples), world_size)
    for index in bar(own, desc=progress, leave=False, disable=progress is None):
        sample = samples[index]
        predicted = predict(segmenter, sample.image, data.size, sample.label.shape)
        pixels += torch.from_numpy(np.bincount(sample.label.ravel(), minlength=256))
        metric.update(torch.from_numpy(predicted)[None].to(device), torch.from_numpy(sample.label)[None].to(device))
        if predictions is not None:
            save_mask(predictions / f"{sample.name}.png", predicted, data.classes)
    # With several ranks, this adds up their counts.
    values = metric.compute().tolist()
    iou = {name: None if math.isnan(value) else value for name, value in zip(data.classes, values)}
    miou = mean_iou(iou, data.classes)
    if miou is None:
        raise InputError(f"expected at least one of the classes {data.classes} in the evaluated images, got none")
    shown = semshift.all_reduce_sum(pixels.to(device))
    return Scores(iou, miou, [name for name, count in zip(data.classes, shown.tolist()) if not count])


@torch.no_grad()
def segment(
    segmenter: nn.Module, image: np.ndarray, size: tuple[int, int], shape: Sequence[int] | None = None
) -> Tensor:
    """Logits `float32 [K, *shape]` of an image `uint8 [H, W, 3]` that the segmenter sees at `size`.

    By default, `shape` is that of the image.
    """
    images = image_tensor(resize_image(image, size))[None].to(next(segmenter.parameters()))
    return upsample(segmenter(images).logits.float(), shape or image.shape[:2])[0]


def predict(
    segmenter: nn.Module, image: np.ndarray, size: tuple[int, int], shape: Sequence[int] | None = None
) -> np.ndarray:
    """Predicted class of each pixel, `uint8 [*shape]`; arguments as in `segment`."""
    return classes_of(segment(segmenter, image, size, shape))


def classes_of(logits: Tensor) -> np.ndarray:
    """The class of the largest logit `uint8 [H, W]` of logits `[K, H, W]`."""
    result: np.ndarray = logits.argmax(0).to("cpu", torch.uint8).numpy()
    return result


def mean_iou(iou: Mapping[str, float | None], classes: Sequence[str]) -> float | None:
    """Mean IoU of the named classes that have an IoU; None if no class has one."""
    values = [value for name in classes if (value := iou[name]) is not None]
    return sum(values) / len(values) if values else None


def subset_means(iou: Mapping[str, float | None], subsets: Mapping[str, Sequence[str]]) -> dict[str, float | None]:
    """Mean IoU of each named list of classes."""
    return {name: mean_iou(iou, classes) for name, classes in subsets.items()}


def score_table(scores: Scores, *, subsets: Mapping[str, Sequence[str]], only: str | None = None) -> str:
    """Scores in percent as lines of text: each class, the mean over all, and the mean over each subset.

    Beside each mean stands how many of its classes have an IoU. `only` is the name of a subset: the table then has the
    classes of that subset and their mean.
    """
    lists = {"all classes": list(scores.iou), **subsets}
    rows = {name: scores.iou[name] for name in (subsets[only] if only else scores.iou)}
    notes = {name: "no labelled pixel" for name in rows if name in scores.unlabelled}
    for name in [only] if only else lists:
        counted = sum(scores.iou[member] is not None for member in lists[name])
        rows[f"mean over {name}"] = mean_iou(scores.iou, lists[name])
        notes[f"mean over {name}"] = f"over {counted} of {len(lists[name])} classes"
    width = max(map(len, rows))
    lines = []
    for name, value in rows.items():
        line = f"{name:<{width}}  {'absent' if value is None else format(100 * value, '6.1f')}"
        lines.append(f"{line}  ({notes[name]})" if name in notes else line)
    return "\n".join(lines)
