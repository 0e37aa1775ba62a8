"""Evaluation: one confusion matrix over a whole set, intersection over union per class, prototypes per domain."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_confusion_matrix
from tqdm import tqdm

import semshift
from examples.scenes import Sample
from examples.workbench.data.samples import Samples, Subset, image_tensor, resize_image
from examples.workbench.errors import InputError

__all__ = [
    "Scores",
    "evaluate",
    "mean_iou",
    "predict",
    "save_masks",
    "score_table",
    "subset_means",
]


class Scores(NamedTuple):
    """Intersection over union of each class, and their mean."""

    iou: dict[str, float | None]
    """Class name to a value in [0, 1]; None where neither labels nor predictions hold the class."""
    miou: float
    """Mean over the classes that have a value."""


def mean_iou(iou: Mapping[str, float | None], classes: Sequence[str]) -> float:
    """Mean intersection over union of the named classes, over those that have a value.

    Raises:
        InputError: none of them has a value.
    """
    values = [value for name in classes if (value := iou[name]) is not None]
    if not values:
        raise InputError(f"expected at least one of the classes {list(classes)} in the evaluated images, got none")
    return sum(values) / len(values)


@torch.no_grad()
def predict(segmenter: nn.Module, sample: Sample, size: tuple[int, int]) -> np.ndarray:
    """Predict the class of each pixel, at the size of the sample's own labels.

    Returns:
        `uint8 [H, W]`.
    """
    logits = segmenter(_network_input(segmenter, sample, size)).logits
    logits = F.interpolate(logits.float(), size=sample.label.shape, mode="bilinear", align_corners=False)
    result: np.ndarray = logits[0].argmax(0).to("cpu", torch.uint8).numpy()
    return result


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
    """Score a segmenter by one confusion matrix summed over all images, of which each rank takes its share.

    Args:
        segmenter: maps images `[1, 3, *size]` to a `Segmentation`.
        samples: images with labels.
        classes: names in the order of their ids.
        size: height and width at which the segmenter sees the images.
        ignore_index: id of pixels that are not counted.
        predictions: folder for the predicted index masks, `NAME.png` at the labels' size.
        progress: title of the progress bar, None for no bar.
        rank: this process, in `[0, world_size)`.
        world_size: number of processes, which get the same scores; each writes the masks of its own images.
    """
    device = next(segmenter.parameters()).device
    matrix = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device)
    own = Subset(samples, range(rank, len(samples), world_size))
    for sample in tqdm(_each(own), desc=progress, total=len(own), leave=False, disable=progress is None):
        predicted = predict(segmenter, sample, size)
        pair = torch.from_numpy(predicted).long(), torch.from_numpy(sample.label).long()
        matrix += multiclass_confusion_matrix(*pair, len(classes), ignore_index=ignore_index).to(device)
        if predictions is not None:
            save_masks(predictions, {sample.name: predicted})
    counts = semshift.all_reduce_sum(matrix).cpu().double()
    intersection = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - intersection
    iou = {name: float(intersection[k] / union[k]) if union[k] > 0 else None for k, name in enumerate(classes)}
    return Scores(iou, mean_iou(iou, classes))


def save_masks(folder: Path, masks: Mapping[str, np.ndarray]) -> None:
    """Write index masks as `NAME.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, mask in masks.items():
        Image.fromarray(mask).save(folder / f"{name}.png")


def subset_means(iou: Mapping[str, float | None], subsets: Mapping[str, Sequence[str]]) -> dict[str, float | None]:
    """Mean of each named list of classes over those that have a value; None where none has."""
    return {
        name: mean_iou(iou, classes) if any(iou[label] is not None for label in classes) else None
        for name, classes in subsets.items()
    }


def score_table(scores: Scores, *, subsets: Mapping[str, Sequence[str]], only: str | None = None) -> str:
    """A table of the scores in percent, one class a line, then their mean and that of every subset; or `only` one."""
    names = list(scores.iou) if only is None else list(subsets[only])
    means: dict[str, float | None] = {} if only is not None else {"all classes": scores.miou}
    means |= {name: mean for name, mean in subset_means(scores.iou, subsets).items() if only in (None, name)}
    rows = {name: scores.iou[name] for name in names}
    rows |= {f"mean over {name}": mean for name, mean in means.items()}
    width = max(map(len, rows))
    return "\n".join(
        f"{name:<{width}}  {'absent' if value is None else format(100 * value, '6.1f')}" for name, value in rows.items()
    )


def _network_input(segmenter: nn.Module, sample: Sample, size: tuple[int, int]) -> Tensor:
    return image_tensor(resize_image(sample, size))[None].to(next(segmenter.parameters()))


def _each(samples: Samples) -> Iterator[Sample]:
    # What is made when asked for has len() and [i] only.
    return (samples[i] for i in range(len(samples)))
