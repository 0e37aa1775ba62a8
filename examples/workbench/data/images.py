"""The images of a run, by split, and the choice of the labelled target images."""

import functools
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from examples.scenes import CLASSES, Scenes
from examples.workbench.data.folders import FolderPair
from examples.workbench.data.samples import Joined, Samples, Subset, labelled_subset
from examples.workbench.data_settings import Folder
from examples.workbench.errors import InputError
from examples.workbench.settings import Settings

__all__ = ["Images", "open_images"]


class Images(NamedTuple):
    """The images of a run by split; None for a split without a folder."""

    source: Samples | None
    labelled: Subset
    """The target images that keep their labels."""
    target: Samples
    validation: Samples | None
    test: Samples | None


def open_images(settings: Settings, data_root: Path | None) -> Images:
    """List the images of a run, from the settings' folders or the built-in scenes. Indexing loads an image."""
    if settings.data.uses_scenes:
        return _open_scenes(settings, data_root)
    data = settings.data
    needed = {"target": data.target} | ({"source": data.source} if "source" in settings.parts else {})
    if missing := [name for name, folder in needed.items() if folder is None]:
        raise InputError(f"method {settings.method} needs images in data.{missing[0]}, got no folder")
    if data_root is None:
        raise InputError("expected --data-root, the folder that contains the settings' image folders, got none")

    def open_split(folder: Folder | None, *, partial: bool = False) -> FolderPair | None:
        if folder is None:
            return None
        return FolderPair(data_root, folder, classes=data.classes, ignore_index=data.ignore_index, partial=partial)

    source, labelled, validation, test = map(open_split, (data.source, data.labelled, data.validation, data.test))
    target = open_split(data.target, partial=True)
    assert target is not None
    # The labelled images are those of data.labelled; without it, target images with a label file.
    if labelled is None:
        return Images(source, _choose(settings, target, target.with_labels, data_root), target, validation, test)
    both = Joined([target, labelled])
    return Images(source, _choose(settings, both, range(len(target), len(both)), data_root), both, validation, test)


def _open_scenes(settings: Settings, data_root: Path | None) -> Images:
    data, scenes = settings.data, settings.data.scenes
    if data.classes != list(CLASSES):
        raise InputError(f"the built-in scenes need data.classes {list(CLASSES)}, got {data.classes}")
    draw = functools.partial(Scenes, seed=settings.seed, size=data.size, severity=scenes.severity)
    target = draw("target", "train", scenes.target)
    return Images(
        draw("source", "train", scenes.source),
        _choose(settings, target, range(len(target)), data_root),
        target,
        draw("target", "val", scenes.validation),
        draw("target", "test", scenes.test),
    )


def _choose(settings: Settings, target: Samples, candidates: Sequence[int], data_root: Path | None) -> Subset:
    """The labelled images: all candidates, a number of images or frames, or the images listed in a file."""
    names, endings = target.names, settings.data.crop_endings
    if unused := [ending for ending in endings if not any(name.endswith(ending) for name in names)]:
        raise InputError(f"no target image's name ends in {unused[0]}, one of data.crop_endings")
    asked = None if settings.method == "oracle" else settings.labelled
    if isinstance(asked, str):
        return Subset(target, _read_names(asked, target, candidates, data_root))
    if not candidates and "labelled" in settings.parts:
        raise InputError(
            f"method {settings.method} needs labelled target images, got {len(target)} images without a label file"
        )
    frames = _frames(names, candidates, endings)
    if asked is not None and asked > len(frames) and "labelled" in settings.parts:
        what = "frames" if endings else "target images"
        raise InputError(f"expected labelled to be at most {len(frames)}, the {what} with labels, got {asked}")
    return Subset(target, [index for i in labelled_subset(len(frames), asked or len(frames)) for index in frames[i]])


def _frames(names: Sequence[str], candidates: Sequence[int], endings: Sequence[str]) -> list[list[int]]:
    """The candidates grouped by frame, in the order of first occurrence; without crop endings each image is a frame."""
    frames: dict[str, list[int]] = {}
    for index in candidates:
        name = names[index]
        ending = next((ending for ending in endings if name.endswith(ending)), "")
        frames.setdefault(name.removesuffix(ending), []).append(index)
    return list(frames.values())


def _read_names(file: str, target: Samples, candidates: Sequence[int], data_root: Path | None) -> list[int]:
    """Indices of the images that a text file names, sorted. Each line is a name, with or without the file's ending."""
    places = [Path(file), *([data_root / file] if data_root else [])]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise InputError(
            f"expected labelled to be a number of at least 1, a text file of names or null, got {file}, which is not "
            f"a file{'' if data_root is None else f', also not in {data_root}'}"
        )
    try:
        lines = unicodedata.normalize("NFC", found.read_text(encoding="utf-8-sig")).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"expected labelled to be a text file in UTF-8, got {found}: {error}") from error
    names = {target.names[index]: index for index in candidates}
    chosen: list[int] = []
    for line in filter(None, map(str.strip, lines)):
        name = line if line in names else Path(line).stem
        if name not in names:
            why = "has no label file" if name in target.names else "is not a target image"
            raise InputError(f"expected {found} to list target images that have labels, got {line}, which {why}")
        if names[name] in chosen:
            raise InputError(f"expected {found} to list each image once, got {name} twice")
        chosen.append(names[name])
    if not chosen:
        raise InputError(f"expected {found} to list target images, got an empty file")
    return sorted(chosen)
