"""A look at a run's images before it: counts, sizes, ids, class frequencies, files that do not read."""

import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from examples.ass.data import InputError, Sample, Samples
from examples.ass.folders import FolderPair
from examples.ass.images import Images, open_images
from examples.ass.settings import Settings

__all__ = ["DataReport", "check_data"]


class DataReport(NamedTuple):
    """What was found."""

    text: str
    """Counts, sizes and class frequencies."""
    problems: list[str]
    """One line for each file that could not be used."""


def check_data(settings: Settings, data_root: Path | None, *, seconds: float = 48.0) -> DataReport:
    """List all images of a run, and read as many of them as time allows, drawn at random, the same ones each time.

    Args:
        settings: of the run.
        data_root: where the settings' folders lie.
        seconds: to spend on reading, shared by the four splits.

    Raises:
        InputError: a folder is not as described.
    """
    images = open_images(settings, data_root)
    lines, problems, shares = [], [], {}
    for name in Images._fields:
        samples: Samples = getattr(images, name)
        found = _look(samples, name, settings, time.monotonic() + seconds / len(Images._fields))
        problems += found.problems
        known = samples.layout.counts if isinstance(samples, FolderPair) else frozenset()
        distributed = f" (as distributed: {' or '.join(map(str, sorted(known)))})" if known else ""
        sizes = ", ".join(f"{width} x {height} ({n})" for (width, height), n in found.sizes.most_common(5))
        more = f" and {len(found.sizes) - 5} more" if len(found.sizes) > 5 else ""
        lines += [
            f"{name}: {len(samples)} images{distributed}, {found.read} of them read",
            f"  sizes: {sizes or 'none'}{more}; labels of another size, to be scaled: {found.scaled}",
        ]
        shares[name] = found.pixels / max(1, found.pixels.sum())
    classes = [*settings.data.classes, "without a class"]
    width = max(map(len, classes))
    lines += ["share of the pixels, in percent", " ".join([" " * width, *(f"{name:>10}" for name in shares)])]
    for k, name in enumerate(classes):
        lines.append(" ".join([f"{name:<{width}}", *(f"{100 * of[k]:10.3f}" for of in shares.values())]))
    return DataReport("\n".join(lines), problems)


class _Found(NamedTuple):
    read: int
    scaled: int
    sizes: Counter[tuple[int, int]]
    pixels: np.ndarray
    problems: list[str]


def _look(samples: Samples, name: str, settings: Settings, deadline: float) -> _Found:
    k = len(settings.data.classes)
    sizes: Counter[tuple[int, int]] = Counter()
    pixels, problems, read, scaled = np.zeros(k + 1, np.int64), [], 0, 0

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

    order = np.random.RandomState(0).permutation(len(samples)).tolist()
    at_once = 2 * (os.cpu_count() or 1)
    with ThreadPoolExecutor() as pool, tqdm(total=len(samples), desc=f"check {name}", leave=False) as bar:
        for first in range(0, len(order), at_once):
            # Some are read in any case, however slow the disk.
            if first and time.monotonic() > deadline:
                break
            for result in pool.map(one, order[first : first + at_once]):
                bar.update()
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
    return _Found(read, scaled, sizes, pixels, problems)
