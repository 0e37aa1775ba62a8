"""The images of a run, by what they are for."""

from pathlib import Path
from typing import Literal, NamedTuple

from examples.scenes import CLASSES, Scenes
from examples.workbench.data.folders import FolderPair
from examples.workbench.data.samples import Samples
from examples.workbench.errors import InputError
from examples.workbench.settings import Settings

__all__ = ["Images", "open_images"]


class Images(NamedTuple):
    """Every image of a run, by what it is for."""

    source: Samples
    target: Samples
    validation: Samples
    test: Samples


def open_images(settings: Settings, data_root: Path | None) -> Images:
    """List the images of a run; pixels are read when they are asked for.

    Raises:
        InputError: a folder is not as described, or the settings describe neither folders nor scenes.
    """
    data = settings.data
    folders = {name: getattr(data, name) for name in Images._fields}
    given = [name for name, folder in folders.items() if folder is not None]
    if not given:
        if data.classes != list(CLASSES):
            raise InputError(f"expected data.classes {list(CLASSES)} for the built-in scenes, got {data.classes}")
        scenes = data.scenes

        def draw(domain: Literal["source", "target"], split: Literal["train", "val", "test"], count: int) -> Scenes:
            return Scenes(domain, split, count, seed=settings.seed, size=data.size, severity=scenes.severity)

        try:
            images = Images(
                draw("source", "train", scenes.source),
                draw("target", "train", scenes.target),
                draw("target", "val", scenes.validation),
                draw("target", "test", scenes.test),
            )
        except ValueError as error:
            raise InputError(str(error)) from error
    else:
        missing = [name for name in Images._fields if name not in given]
        if missing:
            raise InputError(
                f"expected a folder for each of data.{', data.'.join(Images._fields)}, got none for {missing[0]}"
            )
        if data_root is None:
            raise InputError("expected --data-root, below which the settings' folders lie, got none")
        images = Images(
            *(
                FolderPair(data_root, folder, classes=data.classes, ignore_index=data.ignore_index)
                for folder in folders.values()
            )
        )
    if settings.labelled > len(images.target):
        raise InputError(
            f"expected labelled to be at most the {len(images.target)} target training images, got {settings.labelled}"
        )
    return images
