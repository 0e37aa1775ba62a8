"""Settings of the data: folders or built-in scenes, sizes, augmentation. Each field is an option and a YAML key."""

from dataclasses import dataclass, field
from typing import Literal

from examples.scenes import CLASSES, Severity
from examples.workbench.ranges import BelowOne, ImageExtent, NonNegativeInt, Positive, PositiveInt, Share

LayoutName = Literal["index", "gta5", "synthia", "cityscapes"]


@dataclass(frozen=True)
class SceneSettings:
    """The built-in scenes, drawn at random with the run's seed.

    Args:
        source: number of source training images.
        target: number of target training images; the setting `labelled` says how many of them keep their masks.
        validation: number of target images for choosing settings.
        test: number of target images for the reported scores.
        severity: how much the target's appearance differs from the source's, part by part.
    """

    source: PositiveInt = 200
    target: PositiveInt = 200
    validation: PositiveInt = 60
    test: PositiveInt = 100
    severity: Severity = field(default_factory=Severity)


@dataclass(frozen=True)
class Folder:
    """The two folders of a split: images and label files.

    Args:
        images: folder of the images, below the data root. It may contain the label files too.
        labels: folder of the label files, below the data root; null if there are none (`target` only).
        layout: how files are named, and which ids they hold. With `index`, images are `NAME.jpg`, or png, bmp, tif or
            webp, and their masks are `NAME.png` with the ids of `data.classes`. The other layouts are data sets as
            distributed; class names decide which of their ids becomes which id of `data.classes`.
        label_ending: only with layout `index`: the end of a label file's name after the image's name, such as
            `_mask.png`; by default `.png`.
        colours: only with layout `index`, for masks that hold colours: red, green and blue of each class, or a file
            below the data root in the format of CVAT's `labelmap.txt`. Pixels in the colour of a name that is not in
            `data.classes` are ignored.
    """

    images: str
    labels: str | None = None
    layout: LayoutName = "index"
    label_ending: str | None = None
    colours: dict[str, tuple[int, int, int]] | str | None = None

    def __post_init__(self) -> None:
        for option in ("label_ending", "colours"):
            given = getattr(self, option)
            if given is not None and self.layout != "index":
                raise ValueError(f"{option} needs layout index, got {given} with layout {self.layout}")
            if given is not None and not given:
                raise ValueError(f"{option} must not be empty, got {given!r}; use null for the default")
        if isinstance(self.colours, dict):
            names: dict[tuple[int, ...], str] = {}
            for name, colour in self.colours.items():
                if len(colour) != 3 or not all(0 <= channel <= 255 for channel in colour):
                    raise ValueError(
                        f"expected each of colours to be three numbers from 0 to 255, got {name}: {list(colour)}"
                    )
                if (other := names.setdefault(tuple(colour), name)) != name:
                    raise ValueError(f"each of colours must differ, got {list(colour)} for {other} and {name}")


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images, the same for every domain and every method.

    Args:
        scale: smallest and largest random scale factor, above 0. At 1 an image just covers the network's size, to
            which it is then cropped.
        flip: probability, from 0 to 1, that an image is mirrored.
        colour: largest change of brightness, contrast and saturation, from 0 to below 1; each is multiplied by a random
            factor from 1 - colour to 1 + colour.
    """

    scale: tuple[Positive, Positive] = (0.75, 1.5)
    flip: Share = 0.5
    colour: BelowOne = 0.2

    def __post_init__(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"the first factor of data.augmentation.scale must be the smaller, got {list(self.scale)}")


@dataclass(frozen=True)
class Data:
    """The domains: folders below the data root, or the built-in scenes if no folder is given.

    Args:
        classes: class names in the order of their ids, from id 0 on.
        size: height and width in pixels of the images that the network sees, each at least 32.
        source_size: the same for source images, by default equal to `size`. Not allowed for the built-in scenes.
        source: labelled source images; `labelled-only` and `oracle` do not need them.
        target: target training images; any number of them may have label files.
        labelled: labelled target training images, if they are in separate folders. By default the images of `target`
            that have a label file.
        validation: labelled target images for choosing settings; optional.
        test: labelled target images for the reported scores; optional, but without them no score is reported.
        crop_endings: name endings of target images that are crops of one frame, such as `_left`. A number in
            `labelled` then counts frames, and each labelled frame includes all its crops. A text file still lists
            single images.
        ignore_index: id of pixels without a class; losses and scores ignore them.
        subsets: named lists of classes; `evaluate` reports the mean over each list.
        scenes: the built-in scenes.
        augmentation: augmentation of training images.
        workers: number of processes that load images; 0 loads them in the training process. It does not change the
            images.
        timeout: seconds to wait for a batch from the workers before the run stops with an error; 0 means no limit.
    """

    classes: list[str] = field(default_factory=lambda: list(CLASSES))
    size: tuple[ImageExtent, ImageExtent] = (64, 96)
    source_size: tuple[ImageExtent, ImageExtent] | None = None
    source: Folder | None = None
    target: Folder | None = None
    labelled: Folder | None = None
    validation: Folder | None = None
    test: Folder | None = None
    crop_endings: list[str] = field(default_factory=list)
    ignore_index: int = 255
    subsets: dict[str, list[str]] = field(default_factory=dict)
    scenes: SceneSettings = field(default_factory=SceneSettings)
    augmentation: Augmentation = field(default_factory=Augmentation)
    workers: NonNegativeInt = 0
    timeout: NonNegativeInt = 600

    def __post_init__(self) -> None:
        k = len(self.classes)
        if not 2 <= k <= 255 or len(set(self.classes)) < k:
            raise ValueError(f"expected data.classes to be 2 to 255 different names, got {self.classes}")
        if not k <= self.ignore_index <= 255:
            raise ValueError(
                f"expected data.ignore_index from {k} (the number of classes) to 255, got {self.ignore_index}"
            )
        for name, members in self.subsets.items():
            if not members or not set(members) <= set(self.classes):
                raise ValueError(f"expected data.subsets.{name} to list one or more of data.classes, got {members}")
        if "" in self.crop_endings:
            raise ValueError(f"none of data.crop_endings may be empty, got {self.crop_endings}")
        if self.source is None and self.source_size is not None:
            raise ValueError(f"data.source_size needs data.source, got {list(self.source_size)} and no folder")

    @property
    def uses_scenes(self) -> bool:
        """Whether the images are the built-in scenes, since no folder is given."""
        return not any((self.source, self.target, self.labelled, self.validation, self.test))

    @property
    def source_crop(self) -> tuple[int, int]:
        """Height and width of the source images that the network sees."""
        return self.source_size or self.size
