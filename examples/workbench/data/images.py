"""The images of a run, by split."""

import functools
from pathlib import Path
from typing import NamedTuple

from examples.scenes import CLASSES, Scenes
from examples.workbench.data.folders import FolderPair
from examples.workbench.data.samples import Samples
from examples.workbench.errors import InputError
from examples.workbench.settings import Settings

__all__ = ["Images", "open_images"]


class Images(NamedTuple):
    """The images of a run, by split."""

    source: Samples
    target: Samples
    validation: Samples
    test: Samples


def open_images(settings: Settings, data_root: Path | None) -> Images:
    """List the images of a run, those of the settings' folders or the built-in scenes; each is loaded when indexed."""
    data, scenes = settings.data, settings.data.scenes
    folders = [getattr(data, split) for split in Images._fields]
    if not any(folders):
        if data.classes != list(CLASSES):
            raise InputError(f"expected data.classes {list(CLASSES)} for the built-in scenes, got {data.classes}")
        draw = functools.partial(Scenes, seed=settings.seed, size=data.size, severity=scenes.severity)
        images = Images(
            draw("source", "train", scenes.source),
            draw("target", "train", scenes.target),
            draw("target", "val", scenes.validation),
            draw("target", "test", scenes.test),
        )
    elif None in folders:
        missing = Images._fields[folders.index(None)]
        raise InputError(f"expected a folder for each of data.{', data.'.join(Images._fields)}, got none for {missing}")
    elif data_root is None:
        raise InputError("expected --data-root, the folder that holds the settings' folders, got none")
    else:
        open_folder = functools.partial(FolderPair, classes=data.classes, ignore_index=data.ignore_index)
        images = Images(*(open_folder(data_root, folder) for folder in folders))
    if settings.labelled > len(images.target):
        raise InputError(f"expected labelled of at most {len(images.target)} target images, got {settings.labelled}")
    return images
