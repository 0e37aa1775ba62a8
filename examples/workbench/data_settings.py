"""Settings of the data: folders or built-in scenes, sizes, augmentation. Each field is an option and a line of YAML."""

from dataclasses import dataclass, field
from typing import Literal

from examples.scenes import CLASSES, Severity
from examples.workbench.ranges import BelowOne, ImageExtent, NonNegativeInt, Positive, PositiveInt, Share

LayoutName = Literal["index", "gta5", "synthia", "cityscapes"]


@dataclass(frozen=True)
class SceneSettings:
    """The built-in scenes, drawn from the run's seed.

    Args:
        source: number of source training images.
        target: number of target training images, of which `labelled` keep their masks.
        validation: number of target images to choose settings on.
        test: number of target images to report on.
        severity: how much the target's appearance differs from the source's.
    """

    source: PositiveInt = 200
    target: PositiveInt = 200
    validation: PositiveInt = 60
    test: PositiveInt = 100
    severity: Severity = field(default_factory=Severity)


@dataclass(frozen=True)
class Folder:
    """The two folders of a split.

    Args:
        images: folder of images below the data root, which may hold the label files too.
        labels: folder of their label files below the data root; null where the images have none (`target` only).
        layout: `index` is `NAME.jpg`, or png, bmp, tif or webp, with index masks `NAME.png` of the ids of
            `data.classes`; the others are data sets as distributed, whose ids become those of `data.classes` by the
            classes' names.
        label_ending: of layout `index`: what follows an image's name in its label file's, such as `_mask.png`.
        colours: of layout `index`: each class's red, green and blue where masks hold colours, or a file below the data
            root in the format of CVAT's `labelmap.txt`; colours of names outside `data.classes` are ignored pixels.
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
                raise ValueError(f"expected {option} with layout index only, got {given} with {self.layout}")
            if given is not None and not given:
                raise ValueError(f"expected {option} to be null or not empty, got {given!r}")
        if isinstance(self.colours, dict):
            names: dict[tuple[int, ...], str] = {}
            for name, colour in self.colours.items():
                if len(colour) != 3 or not all(0 <= channel <= 255 for channel in colour):
                    raise ValueError(f"expected colours of three numbers from 0 to 255, got {name}: {list(colour)}")
                if (other := names.setdefault(tuple(colour), name)) != name:
                    raise ValueError(f"expected a colour for each name, got {list(colour)} for {other} and {name}")


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images, the same for every domain and every method.

    Args:
        scale: smallest and largest factor of the scaling, before a crop of the network's size is taken.
        flip: probability of mirroring.
        colour: largest change of brightness, contrast and saturation, a factor from 1 - colour to 1 + colour.
    """

    scale: tuple[Positive, Positive] = (0.75, 1.5)
    flip: Share = 0.5
    colour: BelowOne = 0.2

    def __post_init__(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"expected data.augmentation.scale with the smaller factor first, got {list(self.scale)}")


@dataclass(frozen=True)
class Data:
    """The domains: folders below the data root, or the built-in scenes where no folder is named.

    Args:
        classes: names in the order of their ids.
        size: height and width of the images that the network sees, each at least 32.
        source_size: those of the source images, where they differ; not for the built-in scenes.
        source: labelled source images; not needed by `labelled-only` and `oracle`.
        target: target training images, of which any number have label files.
        labelled: labelled target training images, where they have folders of their own.
        validation: labelled target images to choose settings on; may be left out.
        test: labelled target images to report on; may be left out, and then no score is reported.
        crop_endings: endings of the names of target images that are crops of one frame. A number as `labelled`
            then counts frames, and a labelled frame brings its crops; a text file still lists images.
        ignore_index: id of pixels that have no class.
        subsets: named lists of classes that `evaluate` can average over.
        scenes: the built-in scenes.
        augmentation: of training images.
        workers: processes that load images; the images do not depend on it.
        timeout: seconds to wait for a batch of the workers before the run ends with an error; 0 waits for ever.
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
            raise ValueError(f"expected data.ignore_index in {k} (num_classes) to 255, got {self.ignore_index}")
        for name, members in self.subsets.items():
            if not members or not set(members) <= set(self.classes):
                raise ValueError(f"expected data.subsets.{name} to list names of data.classes, got {members}")
        if "" in self.crop_endings:
            raise ValueError(f"expected data.crop_endings to be endings of names, got {self.crop_endings}")
        if self.source is None and self.source_size is not None:
            raise ValueError(f"expected data.source_size with data.source only, got {list(self.source_size)}")

    @property
    def uses_scenes(self) -> bool:
        """Whether no folder is named, so that the images are the built-in scenes."""
        return not any((self.source, self.target, self.labelled, self.validation, self.test))

    @property
    def source_crop(self) -> tuple[int, int]:
        """Height and width of the source images that the network sees."""
        return self.source_size or self.size
