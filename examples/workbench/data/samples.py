"""Sets of images, and the choice of those that keep their labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from examples.scenes import Sample

__all__ = ["Samples", "Subset", "labelled_subset"]


class Samples(Protocol):
    """A set of images that are loaded when indexed; their names are known before."""

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


def labelled_subset(total: int, labelled: int) -> list[int]:
    """Indices of the target images that keep their labels: nested for growing `labelled`, the same in every run."""
    order: list[int] = np.random.RandomState(0).permutation(total)[:labelled].tolist()
    return order
