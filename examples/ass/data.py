"""Images: folders of them, what is done to them in training, and batches drawn from several domains."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from semshift.labels import check_labels
from semshift.sampling import MixedBatchSampler, collate_by_domain

__all__ = [
    "Augmentation",
    "Folder",
    "FolderPair",
    "InputError",
    "Sample",
    "Samples",
    "Some",
    "TrainingSet",
    "augment",
    "batches",
    "fit",
    "image_tensor",
    "labelled_subset",
]

IMAGES = (".jpg", ".jpeg", ".png")


class InputError(ValueError):
    """Something that the user gave is wrong: one line, shown without a traceback."""


class Sample(NamedTuple):
    """An image and its labels."""

    image: np.ndarray
    """`uint8 [H, W, 3]`."""
    label: np.ndarray
    """`uint8 [H, W]`."""
    name: str


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


@dataclass(frozen=True)
class Folder:
    """Where the images of a split lie.

    Args:
        images: folder of `NAME.jpg` or `NAME.png` below the data root.
        labels: folder of index masks `NAME.png` below the data root.
    """

    images: str
    labels: str


class FolderPair:
    """A folder of images and a folder of index masks of the same names, in name order.

    Files are listed at once and read when asked for, each checked as it is read.

    Args:
        root: the data root; a folder outside it is refused.
        folder: the two folders.
        num_classes: K, in 1 to 256; labels lie in `[0, K)`.
        ignore_index: id of pixels without a class, in 0 to 255.

    Raises:
        InputError: a folder is missing, empty or outside the root, a file has no partner or a double, or labels
            would not fit into 8 bits.
    """

    def __init__(self, root: Path, folder: Folder, *, num_classes: int, ignore_index: int = 255) -> None:
        if not (1 <= num_classes <= 256 and 0 <= ignore_index <= 255):
            raise InputError(
                f"expected num_classes in 1 to 256 and ignore_index in 0 to 255, got {num_classes} and {ignore_index}"
            )
        images = _list(root, folder.images, IMAGES)
        masks = _list(root, folder.labels, (".png",))
        for name in images:
            if name not in masks:
                raise InputError(
                    f"expected a mask for every image, got none in {root / folder.labels} for {images[name]}"
                )
        for name in masks:
            if name not in images:
                raise InputError(
                    f"expected an image for every mask, got none in {root / folder.images} for {masks[name]}"
                )
        self.names = sorted(images)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self._files = [(images[name], masks[name]) for name in self.names]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Read an image and its mask.

        Raises:
            InputError: a file is damaged, no image or no index mask, or the two do not fit.
        """
        image_file, mask_file = self._files[index]
        picture, bits = _read(image_file)
        # Pillow drops the lower half of three channels of 16 bits, and clips one channel, nearly all of it to white.
        if bits > 8:
            raise InputError(f"expected {image_file} to be an image of 8 bits a channel, got one of {bits}")
        image = np.asarray(picture.convert("RGB"))
        mask, _ = _read(mask_file)
        if mask.mode not in ("L", "P", "I", "I;16"):
            raise InputError(
                f"expected {mask_file} to be an index mask of one channel, got an image of mode {mask.mode}"
            )
        label = np.asarray(mask)
        if label.shape != image.shape[:2]:
            sizes = [f"{array.shape[1]} x {array.shape[0]}" for array in (image, label)]
            raise InputError(f"expected {mask_file} to have its image's size {sizes[0]}, got {sizes[1]}")
        try:
            check_labels(torch.from_numpy(label.astype(np.int64)), self.num_classes, ignore_index=self.ignore_index)
        except ValueError as error:
            raise InputError(f"{mask_file}: {error}") from error
        return Sample(image, label.astype(np.uint8), self.names[index])


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
        size: height and width of the crops.
        augmentation: what is done to them.
        seed: of the augmentation.
        ignore_index: label where a crop leaves the image.
        unlabelled: names of domains whose labels are withheld.
    """

    def __init__(
        self,
        domains: Mapping[str, Samples],
        size: tuple[int, int],
        augmentation: Augmentation,
        seed: int,
        *,
        ignore_index: int = 255,
        unlabelled: frozenset[str] = frozenset({"unlabelled"}),
    ) -> None:
        self.domains = dict(domains)
        self.size = size
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
        sample = augment(sample, self.size, rng, self.augmentation, ignore_index=self.ignore_index)
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
    training: TrainingSet, sampler: MixedBatchSampler, *, workers: int = 0
) -> Iterator[tuple[int, dict[str, dict[str, Tensor]]]]:
    """Steps and their batches, a domain's name to its images and labels; the same for any number of workers.

    Raises:
        ValueError: the sampler is over other domains, or other numbers of images, than the training set.
        InputError: a file is damaged.
    """
    lengths = [(name, len(samples)) for name, samples in training.domains.items()]
    if list(sampler.sizes.items()) != lengths:
        raise ValueError(f"expected a sampler over {dict(lengths)} in order, got one over {sampler.sizes}")
    keys = _Keys(sampler)
    collate = functools.partial(collate_by_domain, per_batch=sampler.per_batch)
    loader: DataLoader[Any] = DataLoader(training, batch_sampler=keys, collate_fn=collate, num_workers=workers)
    try:
        yield from enumerate(loader, start=sampler.first_step)
    except InputError as error:
        # A worker process sends its whole traceback as the message; what the user needs is the last line of it.
        raise InputError(str(error).strip().splitlines()[-1].split("InputError: ")[-1]) from None


class _Keys:
    """Indices with the step, and their place among the draws of all ranks: two ranks do what one would."""

    def __init__(self, sampler: MixedBatchSampler) -> None:
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


def _list(root: Path, folder: str, endings: Sequence[str]) -> dict[str, Path]:
    where = root / folder
    # By its name alone: a link below the root is how large data sets are often kept.
    if Path(folder).is_absolute() or ".." in Path(folder).parts:
        raise InputError(f"expected a folder below the data root {root}, got {folder}")
    if not where.is_dir():
        raise InputError(f"expected a folder {where}, got none")
    files: dict[str, Path] = {}
    for file in sorted(where.iterdir()):
        if file.suffix.lower() not in endings:
            continue
        if file.stem in files:
            raise InputError(f"expected one file of a name, got {files[file.stem]} and {file.name}")
        files[file.stem] = file
    if not files:
        raise InputError(f"expected {where} to hold files ending in {', '.join(endings)}, got none")
    return files


def _read(file: Path) -> tuple[Image.Image, int]:
    """An image, and the bits of a channel in its file: up to 8, 16 or 32."""
    try:
        with Image.open(file) as image:
            # Before it is loaded: the mode of colours is RGB for any number of bits.
            bits = 16 if ";16" in f"{image.mode} {image.tile}" else 32 if image.mode in ("I", "F") else 8
            image.load()
            return image.copy(), bits
    # Whatever it is: on a damaged file the decoders raise OSError, SyntaxError, ValueError and more.
    except Exception as error:
        why = str(error) or type(error).__name__
        raise InputError(f"expected {file} to be a whole image, got one that does not read: {why}") from error
