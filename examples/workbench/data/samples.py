"""Sets of images, and the choice of those that keep their labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from examples.scenes import Sample
from examples.workbench.errors import InputError

__all__ = ["Samples", "Subset", "labelled_subset"]


class Samples(Protocol):
    """Images that are made when asked for; their names are known before."""

    @property
    def names(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class Subset:
    """Subset of a set of images."""

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
    """The target images that keep their labels: nested for growing `labelled`, the same in every run.

    Raises:
        InputError: `labelled` is not in 1 to `total`.
    """
    if not 1 <= labelled <= total:
        raise InputError(f"expected labelled in 1 to the {total} target training images, got {labelled}")
    order: list[int] = np.random.RandomState(0).permutation(total)[:labelled].tolist()
    return order
