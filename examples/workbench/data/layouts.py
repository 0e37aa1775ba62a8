"""Layouts of data sets: the names of their files, and the class of each id."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["LAYOUTS", "Layout", "id_table"]


class Layout(NamedTuple):
    """The layout of a data set."""

    pattern: str
    """Glob pattern of the files in a folder."""
    image_ends: tuple[str, ...]
    """Possible endings of an image's file name."""
    label_end: str
    """Ending of the label file's name; it replaces the image's ending."""
    ids: Mapping[str, int] | None
    """Id in the files by class name; None if the files hold the ids of `data.classes`."""
    known: Sequence[int]
    """All ids that the files may hold, including ids without a class."""
    counts: Sequence[int]
    """Number of images in each published split, ascending."""
    passed_over: Sequence[str] = ()
    """Endings of files to skip, which conversions write beside the label files."""


# fmt: off
# Ids of Cityscapes (Cordts et al. 2016, arXiv 1604.01685). The palette indices of GTA5 are the same ids (Richter et al.
# 2016, arXiv 1608.02192).
_CITYSCAPES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}
# Ids of SYNTHIA-RAND-CITYSCAPES (Ros et al. 2016), in the first channel of its label files. The second holds instances.
_SYNTHIA = {
    "sky": 1, "building": 2, "road": 3, "sidewalk": 4, "fence": 5, "vegetation": 6, "pole": 7, "car": 8,
    "traffic sign": 9, "person": 10, "bicycle": 11, "motorcycle": 12, "traffic light": 15, "terrain": 16, "rider": 17,
    "truck": 18, "bus": 19, "train": 20, "wall": 21,
}
# fmt: on

LAYOUTS: dict[str, Layout] = {
    "index": Layout("*", (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"), ".png", None, (), ()),
    # Id 34 is the licence plate.
    "gta5": Layout("*", (".png",), ".png", _CITYSCAPES, range(35), (24_966,), ("_labelTrainIds.png",)),
    "synthia": Layout("*", (".png",), ".png", _SYNTHIA, range(23), (9_400,), ("_labelTrainIds.png",)),
    # The licence plate has id -1, which is stored as 255.
    "cityscapes": Layout(
        "*/*", ("_leftImg8bit.png",), "_gtFine_labelIds.png", _CITYSCAPES, (*range(34), 255), (500, 2_975)
    ),
}
"""Layouts by name. `index` means a folder of images and a folder of index masks with the same names."""


def id_table(layout: Layout, classes: Sequence[str], ignore_index: int) -> dict[int, int] | None:
    """Index in `classes` for each id in the files, `ignore_index` for other classes; None if the ids do not change."""
    if layout.ids is None:
        return None
    return dict.fromkeys(layout.known, ignore_index) | {layout.ids[name]: k for k, name in enumerate(classes)}
