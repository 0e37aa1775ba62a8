"""Evaluation of a segmenter: intersection over union of each class over a whole set of images."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex
from tqdm import tqdm

from examples.scenes import Sample
from examples.workbench.data.samples import Samples, image_tensor, resize_image
from examples.workbench.errors import InputError

__all__ = ["Scores", "evaluate", "mean_iou", "predict", "save_masks", "score_table", "subset_means"]


class Scores(NamedTuple):
    """Intersection over union of each class, and their mean."""

    iou: dict[str, float | None]
    """A class's name to its IoU in [0, 1]; None for a class that is neither in the labels nor in the predictions."""
    miou: float
    """Mean over the classes that have an IoU."""


def evaluate(
    segmenter: nn.Module,
    samples: Samples,
    *,
    classes: Sequence[str],
    size: tuple[int, int],
    ignore_index: int,
    predictions: Path | None = None,
    progress: str | None = "evaluate",
    rank: int = 0,
    world_size: int = 1,
) -> Scores:
    """Scores of a segmenter over all images, counted at the labels' own size.

    Args:
        segmenter: maps images `[1, 3, *size]` to a `Segmentation`.
        samples: images with labels.
        classes: names in the order of their ids.
        size: height and width of the images that the segmenter sees.
        ignore_index: label of the pixels that do not count.
        predictions: folder for the predicted masks, `NAME.png`.
        progress: title of the progress bar; None shows no bar.
        rank: of this process. Each evaluates its own images and writes their masks.
        world_size: number of processes. All return the same scores.

    Raises:
        InputError: no image has a labelled pixel.
    """
    device = next(segmenter.parameters()).device
    metric = MulticlassJaccardIndex(len(classes), average="none", ignore_index=ignore_index, zero_division=math.nan)
    metric.to(device)
    own = range(rank, len(samples), world_size)
    for index in tqdm(own, desc=progress, leave=False, disable=progress is None):
        sample = samples[index]
        predicted = predict(segmenter, sample, size)
        metric.update(torch.from_numpy(predicted)[None].to(device), torch.from_numpy(sample.label)[None].to(device))
        if predictions is not None:
            save_masks(predictions, {sample.name: predicted})
    # Where there are several ranks, this adds up their counts.
    values = metric.compute().tolist()
    iou = {name: None if math.isnan(value) else value for name, value in zip(classes, values)}
    return Scores(iou, mean_iou(iou, classes))


@torch.no_grad()
def predict(segmenter: nn.Module, sample: Sample, size: tuple[int, int]) -> np.ndarray:
    """Predicted class of each pixel, `uint8 [H, W]` at the size of the label."""
    image = image_tensor(resize_image(sample, size))[None].to(next(segmenter.parameters()))
    logits = segmenter(image).logits.float()
    logits = F.interpolate(logits, size=sample.label.shape, mode="bilinear", align_corners=False)
    result: np.ndarray = logits[0].argmax(0).to("cpu", torch.uint8).numpy()
    return result


def save_masks(folder: Path, masks: Mapping[str, np.ndarray]) -> None:
    """Write masks of class ids as `NAME.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, mask in masks.items():
        Image.fromarray(mask).save(folder / f"{name}.png")


def mean_iou(iou: Mapping[str, float | None], classes: Sequence[str]) -> float:
    """Mean IoU of the named classes, over those that have an IoU.

    Raises:
        InputError: none of them has one.
    """
    values = [value for name in classes if (value := iou[name]) is not None]
    if not values:
        raise InputError(f"expected at least one of the classes {list(classes)} in the evaluated images, got none")
    return sum(values) / len(values)


def subset_means(iou: Mapping[str, float | None], subsets: Mapping[str, Sequence[str]]) -> dict[str, float | None]:
    """Mean IoU of each named list of classes; None where none of them has an IoU."""
    return {
        name: mean_iou(iou, classes) if any(iou[label] is not None for label in classes) else None
        for name, classes in subsets.items()
    }


def score_table(scores: Scores, *, subsets: Mapping[str, Sequence[str]], only: str | None = None) -> str:
    """Scores in percent as lines of text: each class, the mean over all, and the mean over each subset.

    With `only`, a subset's name, the classes of that subset and their mean.
    """
    means: dict[str, float | None] = {} if only else {"all classes": scores.miou}
    means |= {name: mean for name, mean in subset_means(scores.iou, subsets).items() if only in (None, name)}
    rows = {name: scores.iou[name] for name in (subsets[only] if only else scores.iou)}
    rows |= {f"mean over {name}": mean for name, mean in means.items()}
    width = max(map(len, rows))
    return "\n".join(
        f"{name:<{width}}  {'absent' if value is None else format(100 * value, '6.1f')}" for name, value in rows.items()
    )
