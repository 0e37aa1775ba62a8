"""Colours of the classes, and Matplotlib settings for every picture of the workbench."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb

from examples.scenes import CLASS_COLOURS, CLASSES

__all__ = ["BLUE", "IGNORED", "ORANGE", "STRIPE", "STYLE", "class_colours"]

# Twelve colours at least 18 CIE Lab units from each other and from the grey of ignored pixels, in ordinary sight and in
# all three kinds of colour blindness. A test recomputes that.
_NAMED = dict(zip(CLASSES, CLASS_COLOURS, strict=True)) | {
    "sign": "#f2d731",
    "fence": "#b4aa1f",
    "bicyclist": "#aa3f9e",
    "other": "#15de9f",
}
_ALIASES = {
    "tree": "vegetation",
    "sidewalk": "pavement",
    "non-drivable": "pavement",
    "drivable": "road",
    "vehicle": "car",
    "pedestrian": "person",
    "living": "person",
    "construction": "building",
    "far object": "building",
    "sign-symbol": "sign",
    "traffic sign": "sign",
    "roadside object": "sign",
    "rider": "bicyclist",
}
"""Other names of the same thing, in public data sets."""

IGNORED, STRIPE = np.array([0xDD, 0xDD, 0xDD]), np.array([0xF7, 0xF7, 0xF7])
"""The two colours of the hatching where a pixel has no class."""

BLUE, ORANGE = "#0072B2", "#D55E00"
"""Colours of marks and curves, told apart by colour-blind eyes."""

STYLE: Any = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
    "hatch.linewidth": 1.5,
    # A class name may hold dollars.
    "text.parse_math": False,
}


def class_colours(classes: Sequence[str]) -> np.ndarray:
    """Colours of the classes by their names, `uint8 [K, 3]`.

    A class with a known name, such as "tree", has the colour that readers expect. The others have the colours that are
    left. Up to twelve classes are distinct for colour-blind eyes too; then follow 24 shades, then repetitions.
    """
    names = list(_NAMED)
    indices: dict[int, int] = {}
    for k, name in enumerate(classes):
        plain = name.casefold().replace("_", " ")
        named = _ALIASES.get(plain, plain)
        # Where two classes mean the same thing, the first has its colour.
        if named in names and names.index(named) not in indices.values():
            indices[k] = names.index(named)
    palette = _shades()
    left = [index for index in range(len(palette)) if index not in indices.values()]
    others = itertools.chain(left, itertools.cycle(range(len(palette))))
    result: np.ndarray = palette[[indices[k] if k in indices else next(others) for k in range(len(classes))]]
    return result


def _shades() -> np.ndarray:
    """The twelve colours, darker ones and lighter ones, `uint8 [36, 3]`."""
    palette = 255 * np.array([to_rgb(colour) for colour in _NAMED.values()])
    darker, lighter = palette * 0.6, palette + (255 - palette) * 0.55
    # A darker black would be black again, and a lighter sky white: those two go towards the other end.
    darker[CLASSES.index("pole")], lighter[CLASSES.index("sky")] = [0x00, 0x45, 0x45], [0x4A, 0x90, 0xC8]
    result: np.ndarray = np.concatenate([palette, darker, lighter]).round().astype(np.uint8)
    return result
