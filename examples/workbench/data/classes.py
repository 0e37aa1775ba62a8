"""Which classes the labels of a set of images show."""

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
    """Pixels of each id in the labels of all images, `int64 [256]`; an image without a labelled pixel is refused."""
    total = np.zeros(256, np.int64)
    for index, pixels in count_pixels(samples, data, range(len(samples)), progress):
        if not pixels[: len(data.classes)].any():
            raise InputError(
                f"expected {samples.names[index]}, which counts as labelled, to have labelled pixels, got none: finish "
                "its label file or remove it"
            )
        total += pixels
    return total


def find_absent(samples: Samples, data: Data, *, seconds: float, progress: str | None) -> str | None:
    """What to say about classes of which no label shows a pixel; None where each class has been seen.

    Images are read in a fixed random order, until each class has been seen or the time is over.
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
    """What to say about the classes of which `read` images show no pixel; None where each has some."""
    absent = [name for name, count in zip(data.classes, pixels) if not count]
    if not absent:
        return None
    text = f"no labelled pixel of {', '.join(absent)} in the {read} images that were read"
    return f"{text}: {_BINARY}" if _looks_binary(pixels, data) else text


_BINARY = (
    "the labels hold 0 and 255 only, as masks of one object do, and 255 means no class here; for two classes set the "
    "folder's colours, such as {background: [0, 0, 0], object: [255, 255, 255]}"
)


def _looks_binary(pixels: np.ndarray, data: Data) -> bool:
    """Whether the ids that occur are 0 and 255, and 255 is the ignored one."""
    return data.ignore_index == 255 and np.flatnonzero(pixels).tolist() == [0, 255]


@dataclass(frozen=True, eq=False)
class _Counts(Dataset[np.ndarray]):
    """The pixels of each id in an image's label, `int64 [256]`."""

    samples: Samples

    def __getitem__(self, index: int) -> np.ndarray:
        return np.bincount(self.samples[index].label.ravel(), minlength=256)


def count_pixels(
    samples: Samples, data: Data, order: Sequence[int], progress: str | None
) -> Iterator[tuple[int, np.ndarray]]:
    """Indices, and the pixels of each id in that image's label; loaded as in training, with its time limit."""
    loader: DataLoader[Any] = DataLoader(
        _Counts(samples),
        batch_size=None,
        sampler=order,
        num_workers=data.workers,
        timeout=data.timeout if data.workers else 0,
        worker_init_fn=silence_closed_connections,
        # The loader draws a seed, and must not take it from the generator that the run uses.
        generator=torch.Generator(),
    )
    with plain_errors():
        for index, pixels in zip(order, bar(loader, desc=progress, leave=False, disable=not progress)):
            yield index, pixels.numpy()
