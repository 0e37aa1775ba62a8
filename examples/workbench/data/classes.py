"""The classes that occur in the labels of a set of images."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from examples.workbench.data.loading import plain_errors, silence_closed_connections
from examples.workbench.data.samples import Samples
from examples.workbench.data_settings import Data
from examples.workbench.errors import InputError
from examples.workbench.progress import bar

__all__ = ["count_pixels", "describe_absent", "find_absent", "require_labels"]


def require_labels(samples: Samples, data: Data, *, progress: str | None) -> np.ndarray:
    """Number of pixels of each id in the labels of all images, `int64 [256]`.

    Raises:
        InputError: an image has no labelled pixel.
    """
    total = np.zeros(256, np.int64)
    for index, pixels in count_pixels(samples, data, range(len(samples)), progress):
        if not pixels[: len(data.classes)].any():
            raise InputError(
                f"expected the labelled image {samples.names[index]} to have labelled pixels, got none: finish its "
                "label file or remove it"
            )
        total += pixels
    return total


def find_absent(samples: Samples, data: Data, *, seconds: float, progress: str | None) -> str | None:
    """A warning about classes that occur in no label; None if every class has been seen.

    Images are read in a fixed random order, until every class has been seen or the time is over.
    """
    total, read, end = np.zeros(256, np.int64), 0, time.monotonic() + seconds
    order = np.random.RandomState(0).permutation(len(samples)).tolist()
    for _, pixels in count_pixels(samples, data, order, progress):
        total += pixels
        read += 1
        if total[: len(data.classes)].all() or time.monotonic() > end:
            break
    return describe_absent(total, data, read)


def describe_absent(pixels: np.ndarray, data: Data, read: int) -> str | None:
    """A warning about classes without a pixel in the `read` images; None if every class has pixels."""
    absent = [name for name, count in zip(data.classes, pixels) if not count]
    if not absent:
        return None
    text = f"no labelled pixel of {', '.join(absent)} in the {read} images that were read"
    return f"{text}: {_BINARY}" if _looks_binary(pixels, data) else text


_BINARY = (
    "the labels hold only 0 and 255, like masks of one object, but here 255 means no class; for two classes set the "
    "folder's colours, such as {background: [0, 0, 0], object: [255, 255, 255]}"
)


def _looks_binary(pixels: np.ndarray, data: Data) -> bool:
    """Whether only the ids 0 and 255 occur, and 255 is the ignored id."""
    return data.ignore_index == 255 and np.flatnonzero(pixels).tolist() == [0, 255]


@dataclass(frozen=True, eq=False)
class _Counts(Dataset[np.ndarray]):
    """Number of pixels of each id in an image's label, `int64 [256]`."""

    samples: Samples

    def __getitem__(self, index: int) -> np.ndarray:
        return np.bincount(self.samples[index].label.ravel(), minlength=256)


def count_pixels(
    samples: Samples, data: Data, order: Sequence[int], progress: str | None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each index in `order` with the number of pixels of each id in that image's label.

    The labels are loaded by as many processes as in training, with the same time limit.
    """
    loader: DataLoader[Any] = DataLoader(
        _Counts(samples),
        batch_size=None,
        sampler=order,
        num_workers=data.workers,
        timeout=data.timeout if data.workers else 0,
        worker_init_fn=silence_closed_connections,
        # The loader draws a seed, which must not change the state of the run's generator.
        generator=torch.Generator(),
    )
    with plain_errors():
        for index, pixels in zip(order, bar(loader, desc=progress, leave=False, disable=not progress)):
            yield index, pixels.numpy()
