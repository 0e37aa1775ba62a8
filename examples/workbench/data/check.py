"""Check of a run's images before training: counts, sizes, class frequencies, unreadable files."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pandas as pd
from PIL import Image

from examples.scenes import Sample
from examples.workbench.data.classes import describe_absent
from examples.workbench.data.folders import FolderPair
from examples.workbench.data.images import open_images
from examples.workbench.data.layouts import LAYOUTS
from examples.workbench.data.samples import Samples
from examples.workbench.data_settings import Data
from examples.workbench.errors import InputError
from examples.workbench.progress import bar
from examples.workbench.settings import Settings

__all__ = ["DataReport", "check_data"]

T = TypeVar("T")


class DataReport(NamedTuple):
    """The result of a check: counts, sizes and class frequencies as `text`, then lists of notes and of problems.

    A note is a line about something unusual that may be intended. A problem is a line about an unusable file.
    """

    text: str
    notes: list[str]
    problems: list[str]


@dataclass
class _Findings:
    whole: int = 0
    scaled: int = 0
    sizes: Counter[str] = field(default_factory=Counter)
    pixels_by_id: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    problems: list[str] = field(default_factory=list)


def check_data(settings: Settings, data_root: Path | None, *, seconds: float = 36.0) -> DataReport:
    """Check as many images of a run as `seconds` allow, in a fixed order. Listing the files takes additional time."""
    images, data = open_images(settings, data_root), settings.data
    # The published splits use the same images for validation and test.
    one_set = data.test is not None and data.test == data.validation
    splits = {
        split: of for split, of in images._asdict().items() if of is not None and (split, one_set) != ("test", True)
    }
    lines, notes, problems, shares = [], [], [], {}
    for split, samples in splits.items():
        found = _inspect(samples, split, data, seconds / len(splits))
        read, published, whole = found.sizes.total(), "", ""
        if isinstance(samples, FolderPair):
            whole = f", {len(samples.with_labels)} with a label file, {found.whole} with complete file ends"
            if samples.ignored_names:
                names = ", ".join(samples.ignored_names)
                notes.append(f"{split} has colours of {names}, which are not in data.classes: such pixels are ignored")
            if counts := samples.layout.counts:
                published = f" (as distributed: {' or '.join(map(str, counts))})"
                if len(samples) not in counts:
                    notes.append(
                        f"{split} has {len(samples)} images, but {' or '.join(map(str, counts))} are distributed: is "
                        "the copy complete?"
                    )
        sizes = ", ".join(f"{size} ({count})" for size, count in found.sizes.most_common(5)) or "none"
        more = f" and {len(found.sizes) - 5} more" if len(found.sizes) > 5 else ""
        lines += [
            f"{split}: {len(samples)} images{published}{whole}, {read} of them read",
            f"  sizes: {sizes}{more}{f'; {found.scaled} labels of a different size, resized' if found.scaled else ''}",
        ]
        # The labelled images are target images too, so each of their problems would appear twice.
        problems += [problem for problem in found.problems if problem not in problems]
        pixels = found.pixels_by_id[[*range(len(data.classes)), data.ignore_index]]
        # Unlabelled images need no class.
        if split != "target":
            shares[split] = 100 * pixels / max(1, pixels.sum())
            if read and (absent := describe_absent(found.pixels_by_id, data, read)):
                notes.append(f"{split} has {absent}")
    if one_set:
        lines.append("test: the validation images")
    lines += [f"{split}: none" for split, samples in images._asdict().items() if samples is None]
    table = pd.DataFrame(shares, index=[*data.classes, "without a class"])
    lines += ["share of the pixels, in percent", table.to_string(float_format="{:.3f}".format)]
    return DataReport("\n".join(lines), notes, problems)


def _inspect(samples: Samples, split: str, data: Data, seconds: float) -> _Findings:
    """Check the ends of files for a third of the time, then read complete images."""
    found, now = _Findings(), time.monotonic()
    order = np.random.RandomState(0).permutation(len(samples)).tolist()
    if isinstance(samples, FolderPair):
        pairs = samples.files
        ends = dict(_map_until(now + seconds / 3, lambda i: _have_ends(pairs[i]), order, f"ends of {split}", 256))
        found.whole = sum(ends.values())
        # Suspicious files are read first; only reading a complete file shows whether it is usable.
        order.sort(key=lambda index: ends.get(index, True))

    def read(index: int) -> Sample | InputError:
        try:
            return samples[index]
        except InputError as error:
            return error

    for index, sample in _map_until(now + seconds, read, order, f"check {split}", 2 * (os.cpu_count() or 1)):
        if isinstance(sample, InputError):
            found.problems.append(str(sample))
            continue
        height, width = sample.label.shape
        if isinstance(samples, FolderPair) and samples.layout is LAYOUTS["gta5"] and (file := samples.files[index][1]):
            with Image.open(file) as label:
                found.scaled += label.size != (width, height)
        if split == "labelled" and not (sample.label < len(data.classes)).any():
            found.problems.append(f"expected the labelled image {sample.name} to have labelled pixels, got none")
        found.sizes[f"{width} x {height}"] += 1
        found.pixels_by_id += np.bincount(sample.label.ravel(), minlength=256)
    return found


def _map_until(
    deadline: float, function: Callable[[int], T], order: Sequence[int], title: str, at_once: int
) -> Iterator[tuple[int, T]]:
    """Yield indices and results until the deadline; the first batch always completes, even on a slow disk."""
    with ThreadPoolExecutor() as pool, bar(total=len(order), desc=title, leave=False) as shown:
        for first in range(0, len(order), at_once):
            if first and time.monotonic() > deadline:
                return
            batch = order[first : first + at_once]
            for index, result in zip(batch, pool.map(function, batch)):
                shown.update()
                yield index, result


def _have_ends(files: Sequence[Path | None]) -> bool:
    """Whether files end as their formats require. Truncated files do not; a few usable files do not either."""
    for file in filter(None, files):
        try:
            with file.open("rb") as opened:
                start, size = opened.read(8), opened.seek(0, os.SEEK_END)
                opened.seek(max(0, size - 12))
                end = opened.read()
        except OSError:
            return False
        known = b"IEND" if start.startswith(b"\x89PNG") else b"\xff\xd9" if start.startswith(b"\xff\xd8") else b""
        if not size or known not in end:
            return False
    return True
