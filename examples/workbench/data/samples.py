"""Sets of images, nested subsets of them, and the conversion of images to the network's input."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from examples.scenes import Sample

__all__ = ["Joined", "Samples", "Subset", "image_tensor", "labelled_subset", "resize_image"]


class Samples(Protocol):
    """A set of images. Indexing loads an image; the names are known without loading."""

    @property
    def names(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class Subset:
    """A subset of a set of images."""

    samples: Samples
    indices: Sequence[int]

    @property
    def names(self) -> Sequence[str]:
        return [self.samples.names[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[self.indices[index]]


@dataclass(frozen=True)
class Joined:
    """Several sets of images, one after another."""

    parts: Sequence[Samples]

    @property
    def names(self) -> Sequence[str]:
        return [name for part in self.parts for name in part.names]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> Sample:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


def labelled_subset(total: int, labelled: int) -> list[int]:
    """Indices of `labelled` of `total` images, the same in every run. A larger number includes all of a smaller one."""
    order: list[int] = np.random.RandomState(0).permutation(total)[:labelled].tolist()
    return order


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image `uint8 [H, W, 3]` resized to the network's size for evaluation, `uint8 [*size, 3]`."""
    if image.shape[:2] == size:
        return image
    # Resize one axis after the other: the axis that Pillow resizes first depends on its version and on the sizes.
    wide = Image.fromarray(image).resize((size[1], image.shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(wide.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def image_tensor(image: np.ndarray) -> Tensor:
    """An image `uint8 [H, W, 3]` as the network's input: `float32 [3, H, W]` in [-2, 2]."""
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - 0.5) / 0.25
