"""Images: what is done to them in training, and batches drawn from several domains."""

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import semshift
from examples.scenes import Sample

__all__ = [
    "Augmentation",
    "InputError",
    "Samples",
    "Some",
    "TrainingSet",
    "augment",
    "batches",
    "fit",
    "image_tensor",
    "labelled_subset",
]


class InputError(ValueError):
    """Something that the user gave is wrong: one line, shown without a traceback."""


class Samples(Protocol):
    """Images that are made when asked for; their names are known before."""

    @property
    def names(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class Some:
    """Some of a set of images."""

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


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image, the same for every domain and every method.

    Args:
        scale: smallest and largest factor by which it is scaled before a crop of the network's size is taken.
        flip: how often it is mirrored, in [0, 1].
        colour: largest change of brightness, contrast and saturation, as a factor from 1 - colour to 1 + colour.
    """

    scale: tuple[float, float] = (0.75, 1.5)
    flip: float = 0.5
    colour: float = 0.2

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high < float("inf"):
            raise InputError(
                f"expected augmentation.scale to be two positive numbers, the smaller first, got {self.scale}"
            )
        if not 0 <= self.flip <= 1:
            raise InputError(f"expected augmentation.flip in [0, 1], got {self.flip}")
        if not 0 <= self.colour < 1:
            raise InputError(f"expected augmentation.colour in [0, 1), got {self.colour}")


def augment(
    sample: Sample, size: tuple[int, int], rng: np.random.Generator, settings: Augmentation, *, ignore_index: int = 255
) -> Sample:
    """Scale, crop to `size`, mirror and recolour; where the crop leaves the image, pixels are black and ignored."""
    height, width = size
    # At scale 1 the image just fills the crop along one axis and overfills it along the other.
    fill = max(height / sample.image.shape[0], width / sample.image.shape[1])
    scale = fill * float(rng.uniform(*settings.scale))
    scaled = [max(1, round(extent * scale)) for extent in sample.image.shape[:2]]
    picture = Image.fromarray(sample.image).resize((scaled[1], scaled[0]), Image.Resampling.BILINEAR)
    mask = Image.fromarray(sample.label).resize((scaled[1], scaled[0]), Image.Resampling.NEAREST)
    top, left = (_offset(inside, crop, rng) for inside, crop in zip(scaled, size))
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhancer(picture).enhance(float(rng.uniform(1 - settings.colour, 1 + settings.colour)))
    image, label = np.zeros((height, width, 3), np.uint8), np.full((height, width), ignore_index, np.uint8)
    inside = (slice(max(0, -top), min(height, scaled[0] - top)), slice(max(0, -left), min(width, scaled[1] - left)))
    taken = tuple(slice(part.start + start, part.stop + start) for part, start in zip(inside, (top, left)))
    image[inside] = np.asarray(picture)[taken]
    label[inside] = np.asarray(mask)[taken]
    if rng.random() < settings.flip:
        image, label = image[:, ::-1], label[:, ::-1]
    return Sample(np.ascontiguousarray(image), np.ascontiguousarray(label), sample.name)


def fit(sample: Sample, size: tuple[int, int]) -> np.ndarray:
    """The image at the network's size, for evaluation; `uint8 [h, w, 3]`."""
    if sample.image.shape[:2] == size:
        return sample.image
    return np.asarray(Image.fromarray(sample.image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def image_tensor(image: np.ndarray) -> Tensor:
    """`uint8 [H, W, 3]` to `float32 [3, H, W]` in about [-2, 2]."""
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - 0.5) / 0.25


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


def batches(
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


def _offset(inside: int, crop: int, rng: np.random.Generator) -> int:
    """Where a crop begins: anywhere inside, or such that a smaller image lies anywhere in it."""
    low, high = sorted((0, inside - crop))
    return int(rng.integers(low, high + 1))
