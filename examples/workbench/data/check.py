"""A look at a run's images before it: counts, sizes, ids, class frequencies, files that do not read."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from examples.scenes import Sample
from examples.workbench.data.folders import FolderPair
from examples.workbench.data.images import Images, open_images
from examples.workbench.data.samples import Samples
from examples.workbench.errors import InputError
from examples.workbench.settings import Settings

__all__ = ["DataReport", "check_data"]

T = TypeVar("T")


class DataReport(NamedTuple):
    """What was found."""

    text: str
    """Counts, sizes and class frequencies."""
    notes: list[str]
    """One line for each thing that is odd and may be as it should."""
    problems: list[str]
    """One line for each file that could not be used."""


def check_data(settings: Settings, data_root: Path | None, *, seconds: float = 36.0) -> DataReport:
    """List all images of a run, look at as many files' ends and read as many images as time allows, the same each time.

    Args:
        settings: of the run.
        data_root: where the settings' folders lie.
        seconds: to spend on files, shared by the splits; to list them comes on top.

    Raises:
        InputError: a folder is not as described.
    """
    images = open_images(settings, data_root)
    lines, notes, problems, shares = [], [], [], {}
    # The published splits have one set for both.
    same = settings.data.test is not None and settings.data.test == settings.data.validation
    splits = [name for name in Images._fields if not (same and name == "test")]
    for name in splits:
        samples: Samples = getattr(images, name)
        found = _look(samples, name, settings, seconds / len(splits))
        problems += found.problems
        known = samples.layout.counts if isinstance(samples, FolderPair) else frozenset()
        distributed = f" (as distributed: {' or '.join(map(str, sorted(known)))})" if known else ""
        if known and len(samples) not in known:
            notes.append(f"{name} has {len(samples)} images, not as distributed: is the copy complete?")
        ends = f", {found.ends} with whole ends" if isinstance(samples, FolderPair) else ""
        sizes = ", ".join(f"{width} x {height} ({n})" for (width, height), n in found.sizes.most_common(5))
        more = f" and {len(found.sizes) - 5} more" if len(found.sizes) > 5 else ""
        lines += [
            f"{name}: {len(samples)} images{distributed}{ends}, {found.read} of them read",
            f"  sizes: {sizes or 'none'}{more}; labels of another size, to be scaled: {found.scaled}",
        ]
        shares[name] = found.pixels / max(1, found.pixels.sum())
        absent = [label for label, pixels in zip(settings.data.classes, found.pixels) if not pixels]
        if found.read and absent:
            notes.append(f"{name} has no pixel of {', '.join(absent)} in the {found.read} images that were read")
    if same:
        lines.append("test: the validation images")
    classes = [*settings.data.classes, "without a class"]
    width = max(map(len, classes))
    lines += ["share of the pixels, in percent", " ".join([" " * width, *(f"{name:>10}" for name in shares)])]
    for k, name in enumerate(classes):
        lines.append(" ".join([f"{name:<{width}}", *(f"{100 * of[k]:10.3f}" for of in shares.values())]))
    return DataReport("\n".join(lines), notes, problems)


class _Found(NamedTuple):
    ends: int
    read: int
    scaled: int
    sizes: Counter[tuple[int, int]]
    pixels: np.ndarray
    problems: list[str]


def _look(samples: Samples, name: str, settings: Settings, seconds: float) -> _Found:
    k = len(settings.data.classes)
    sizes: Counter[tuple[int, int]] = Counter()
    pixels, problems, read, scaled, ends = np.zeros(k + 1, np.int64), [], 0, 0, 0
    order = np.random.RandomState(0).permutation(len(samples)).tolist()
    now = time.monotonic()

    def both_ends(index: int) -> list[str]:
        return [problem for file in files[index] if (problem := _cut_short(file)) is not None]

    def one(index: int) -> tuple[Sample, bool] | str:
        try:
            sample = samples[index]
        except InputError as error:
            return str(error)
        other = False
        if isinstance(samples, FolderPair):
            with Image.open(samples.files[index][1]) as label:
                other = label.size != sample.label.shape[::-1]
        return sample, other

    cut = set()
    files = samples.files if isinstance(samples, FolderPair) else []
    for index, found in _in_time(both_ends, order if files else [], now + seconds / 3, f"ends of {name}", at_once=256):
        problems += found
        ends += not found
        if found:
            cut.add(index)
    whole = [index for index in order if index not in cut]
    for _, result in _in_time(one, whole, now + seconds, f"check {name}", at_once=2 * (os.cpu_count() or 1)):
        if isinstance(result, str):
            problems.append(result)
            continue
        sample, other = result
        height, width = sample.image.shape[:2]
        read, scaled = read + 1, scaled + other
        sizes[width, height] += 1
        counts = np.bincount(sample.label.ravel(), minlength=256)
        pixels[:k] += counts[:k]
        pixels[k] += counts[settings.data.ignore_index]
    return _Found(ends, read, scaled, sizes, pixels, problems)


def _in_time(
    look: Callable[[int], T], order: Sequence[int], deadline: float, title: str, *, at_once: int
) -> Iterator[tuple[int, T]]:
    """Indices and what was found there; some in any case, however slow the disk."""
    with ThreadPoolExecutor() as pool, tqdm(total=len(order), desc=title, leave=False) as bar:
        for first in range(0, len(order), at_once):
            if first and time.monotonic() > deadline:
                return
            some = order[first : first + at_once]
            for index, result in zip(some, pool.map(look, some)):
                bar.update()
                yield index, result


def _cut_short(file: Path) -> str | None:
    """What is wrong with a file that does not end as its kind does: a copy that stopped halfway."""
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, size - 12))
            end = opened.read()
    except OSError as error:
        return f"expected {file} to be a file that can be read, got: {error.strerror}"
    if size == 0:
        return f"expected {file} to be a whole image, got an empty file"
    if file.suffix.lower() == ".png" and b"IEND" not in end:
        return f"expected {file} to be a whole image, got {size} bytes without the end of a PNG"
    return None
