"""Batches of training images from several domains."""

import contextlib
import functools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import semshift
from examples.workbench.data.augment import augment
from examples.workbench.data.samples import Samples, image_tensor
from examples.workbench.data_settings import Augmentation
from examples.workbench.errors import InputError

__all__ = ["TrainingSet", "load_batches", "plain_errors", "silence_closed_connections"]


@dataclass(frozen=True, eq=False)
class TrainingSet(Dataset[dict[str, Tensor]]):
    """The augmented images of several domains, one domain after another.

    The augmentation is a function of the seed, the step, and the image's place in the batch of all ranks.
    """

    domains: Mapping[str, Samples]
    """Images by domain, in the sampler's order; the labels of `unlabelled` are dropped."""
    sizes: Mapping[str, tuple[int, int]]
    """Height and width of the crops, by domain."""
    augmentation: Augmentation
    seed: int
    ignore_index: int = 255

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Tensor]:
        """The `image` at (step, place, index), and its `label`; for unlabelled images, a mask `inside` instead.

        `inside` is true for pixels of the crop that lie inside the image.
        """
        step, place, index = key
        domain, index = self._find(index)
        sample = self.domains[domain][index]
        if domain == "unlabelled":
            # No label is passed on; zeros distinguish the image from the ignored margin around it.
            sample = sample._replace(label=np.zeros_like(sample.label))
        rng = np.random.default_rng((self.seed, step, place))
        sample = augment(sample, self.sizes[domain], rng, self.augmentation, ignore_index=self.ignore_index)
        label = torch.from_numpy(sample.label)
        more = {"inside": label == 0} if domain == "unlabelled" else {"label": label.long()}
        return {"image": image_tensor(sample.image), **more}

    def _find(self, index: int) -> tuple[str, int]:
        for domain, samples in self.domains.items():
            if index < len(samples):
                return domain, index
            index -= len(samples)
        raise IndexError(index)


def load_batches(
    training: TrainingSet, sampler: semshift.MixedBatchSampler, *, workers: int = 0, timeout: int = 0
) -> Iterator[tuple[int, dict[str, dict[str, Tensor]]]]:
    """Yield each step with its batch by domain; the batches do not depend on the number of workers.

    A RuntimeError is raised if a worker dies, or delivers no batch for `timeout` seconds; 0 means no limit.
    """
    assert list(sampler.sizes.items()) == [(domain, len(samples)) for domain, samples in training.domains.items()]
    loader: DataLoader[Any] = DataLoader(
        training,
        batch_sampler=_keys(sampler),
        collate_fn=functools.partial(semshift.collate_by_domain, per_batch=sampler.per_batch),
        num_workers=workers,
        timeout=timeout if workers else 0,
        worker_init_fn=silence_closed_connections,
    )
    with plain_errors():
        yield from enumerate(loader, start=sampler.first_step)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Shorten the InputError of a loading process: its message is a whole traceback, of which users need one line."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).strip().splitlines()[-1].split("InputError: ")[-1]) from None


def _keys(sampler: semshift.MixedBatchSampler) -> Iterator[list[tuple[int, int, int]]]:
    """(step, place, index) of each image of each batch. Places count over all ranks, so two ranks train like one."""
    places: list[int] = []
    first = 0
    for count in sampler.per_batch.values():
        places += range(first + sampler.rank * count, first + (sampler.rank + 1) * count)
        first += sampler.world_size * count
    for step, indices in enumerate(sampler, start=sampler.first_step):
        yield [(step, place, index) for place, index in zip(places, indices)]


def silence_closed_connections(worker: int) -> None:
    """Suppress the traceback of a worker that is sending an image when the run ends."""

    def hook(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            sys.__excepthook__(kind, error, where)

    # The multiprocessing thread that shares tensors reports its errors through this hook.
    sys.excepthook = hook
