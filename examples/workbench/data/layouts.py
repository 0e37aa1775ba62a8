"""Data sets as they are distributed: how their files are named, and which class each id means."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from examples.workbench.settings import LayoutName

__all__ = ["LAYOUTS", "Layout", "id_table"]


class Layout(NamedTuple):
    """What tells one data set's files from another's."""

    pattern: str
    """Of the files below their folder."""
    image_ends: tuple[str, ...]
    """What may follow an image's name."""
    label_end: str
    """What follows the same name in the folder of labels."""
    ids: Mapping[str, int] | None
    """Class name to its id in the files; None where they hold the ids of `data.classes`."""
    void: frozenset[int]
    """Further ids that occur, of no class."""
    counts: frozenset[int]
    """Numbers of images in the splits as they are distributed."""


# Ids of Cityscapes (Cordts et al. 2016, arXiv 1604.01685), which GTA5's palette indices share (Richter et al. 2016,
# arXiv 1608.02192).
_CITYSCAPES = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
# Ids of SYNTHIA-RAND-CITYSCAPES (Ros et al. 2016) in the first channel of its label files; the second numbers things.
_SYNTHIA = {
    "sky": 1,
    "building": 2,
    "road": 3,
    "sidewalk": 4,
    "fence": 5,
    "vegetation": 6,
    "pole": 7,
    "car": 8,
    "traffic sign": 9,
    "person": 10,
    "bicycle": 11,
    "motorcycle": 12,
    "traffic light": 15,
    "terrain": 16,
    "rider": 17,
    "truck": 18,
    "bus": 19,
    "train": 20,
    "wall": 21,
}


def _rest(ids: Mapping[str, int], last: int, *more: int) -> frozenset[int]:
    return frozenset({*range(last + 1), *more} - set(ids.values()))


LAYOUTS: dict[LayoutName, Layout] = {
    "index": Layout("*", (".jpg", ".jpeg", ".png"), ".png", None, frozenset(), frozenset()),
    # 34 is the licence plate.
    "gta5": Layout("*", (".png",), ".png", _CITYSCAPES, _rest(_CITYSCAPES, 34), frozenset({24_966})),
    "synthia": Layout("*", (".png",), ".png", _SYNTHIA, _rest(_SYNTHIA, 22), frozenset({9_400})),
    # The licence plate, -1, comes as 255.
    "cityscapes": Layout(
        "*/*",
        ("_leftImg8bit.png",),
        "_gtFine_labelIds.png",
        _CITYSCAPES,
        _rest(_CITYSCAPES, 33, 255),
        frozenset({2_975, 500}),
    ),
}
"""Name of a layout to what it means; `index` is a folder of images and one of index masks with the same names."""


def id_table(layout: Layout, classes: Sequence[str], ignore_index: int) -> dict[int, int] | None:
    """Id in the files to id among `classes`, `ignore_index` for those of other classes; None for ids as they are."""
    if layout.ids is None:
        return None
    table = dict.fromkeys({*layout.ids.values(), *layout.void}, ignore_index)
    return table | {layout.ids[name]: k for k, name in enumerate(classes)}
