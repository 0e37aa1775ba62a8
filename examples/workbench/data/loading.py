"""Batches drawn from several domains."""

import functools
import sys
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import semshift
from examples.workbench.data.augment import augment, image_tensor
from examples.workbench.data.samples import Samples
from examples.workbench.errors import InputError
from examples.workbench.settings import Augmentation

__all__ = ["TrainingSet", "load_batches"]


class TrainingSet(Dataset[dict[str, Tensor]]):
    """The concatenation of several domains, augmented by (seed, step, place in the batch of all ranks) alone.

    Args:
        domains: a domain's name to its images, in the sampler's order.
        sizes: a domain's name to the height and width of its crops.
        augmentation: what is done to them.
        seed: of the augmentation.
        ignore_index: label where a crop leaves the image.
        unlabelled: names of domains whose labels are withheld.
    """

    def __init__(
        self,
        domains: Mapping[str, Samples],
        sizes: Mapping[str, tuple[int, int]],
        augmentation: Augmentation,
        seed: int,
        *,
        ignore_index: int = 255,
        unlabelled: frozenset[str] = frozenset({"unlabelled"}),
    ) -> None:
        self.domains = dict(domains)
        self.sizes = dict(sizes)
        self.augmentation = augmentation
        self.seed = seed
        self.ignore_index = ignore_index
        self.unlabelled = unlabelled

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Tensor]:
        """The image at an index of the concatenation, as it looks at a place of a step's batch of all ranks.

        With its `label`; an unlabelled one with where the crop is `inside` of it.
        """
        step, place, index = key
        name, inside = self._find(index)
        samples = self.domains[name]
        rng = np.random.default_rng((self.seed, step, place))
        sample = samples[inside]
        if name in self.unlabelled:
            # Nothing of the labels goes further; what is left tells the image from the margin around it.
            sample = sample._replace(label=np.zeros(sample.image.shape[:2], np.uint8))
        sample = augment(sample, self.sizes[name], rng, self.augmentation, ignore_index=self.ignore_index)
        label = torch.from_numpy(sample.label)
        image = {"image": image_tensor(sample.image)}
        return image | ({"inside": label == 0} if name in self.unlabelled else {"label": label.long()})

    def _find(self, index: int) -> tuple[str, int]:
        inside = index
        for name, samples in self.domains.items():
            if 0 <= inside < len(samples):
                return name, inside
            inside -= len(samples)
        raise IndexError(f"expected an index below {index - inside}, the images of all domains, got {index}")


def load_batches(
    training: TrainingSet, sampler: semshift.MixedBatchSampler, *, workers: int = 0, timeout: int = 0
) -> Iterator[tuple[int, dict[str, dict[str, Tensor]]]]:
    """Steps and their batches, a domain's name to its images and labels; the same for any number of workers.

    Where workers give no batch for `timeout` seconds, or one of them dies, PyTorch raises a RuntimeError; 0 waits.

    Raises:
        ValueError: the sampler is over other domains, or other numbers of images, than the training set.
        InputError: a file is damaged.
    """
    lengths = [(name, len(samples)) for name, samples in training.domains.items()]
    if list(sampler.sizes.items()) != lengths:
        raise ValueError(f"expected a sampler over {dict(lengths)} in order, got one over {sampler.sizes}")
    keys = _Keys(sampler)
    collate = functools.partial(semshift.collate_by_domain, per_batch=sampler.per_batch)
    loader: DataLoader[Any] = DataLoader(
        training,
        batch_sampler=keys,
        collate_fn=collate,
        num_workers=workers,
        timeout=timeout if workers else 0,
        worker_init_fn=_say_nothing_of_the_end,
    )
    try:
        yield from enumerate(loader, start=sampler.first_step)
    except InputError as error:
        # A worker process sends its whole traceback as the message; what the user needs is the last line of it.
        raise InputError(str(error).strip().splitlines()[-1].split("InputError: ")[-1]) from None


def _say_nothing_of_the_end(worker: int) -> None:
    """Where the run ends while it takes an image from a worker, a thread of that worker would print a traceback."""

    def hook(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            sys.__excepthook__(kind, error, where)

    sys.excepthook = hook


class _Keys:
    """Indices with the step, and their place among the draws of all ranks: two ranks do what one would."""

    def __init__(self, sampler: semshift.MixedBatchSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        rank, world_size = self.sampler.rank, self.sampler.world_size
        places: list[int] = []
        before = 0
        for images in self.sampler.per_batch.values():
            places += range(before + rank * images, before + (rank + 1) * images)
            before += world_size * images
        for step, indices in enumerate(self.sampler, start=self.sampler.first_step):
            yield [(step, place, index) for place, index in zip(places, indices)]

    def __len__(self) -> int:
        return len(self.sampler)
