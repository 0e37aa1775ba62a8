"""How the trainer's pictures look: colours of classes, Matplotlib's settings, and one way to save."""

from typing import Any

import numpy as np

__all__ = ["IGNORED", "STRIPE", "STYLE", "class_colours"]

# Twelve colours at least 18 CIE Lab units from each other and from the grey of ignored pixels, in ordinary
# sight and in all three kinds of colour blindness; a test recomputes that.
_PALETTE = np.array(
    [
        [0x33, 0x22, 0x88],
        [0xF0, 0xE4, 0x42],
        [0x22, 0x88, 0x33],
        [0xEE, 0x66, 0x77],
        [0x99, 0xDD, 0xFF],
        [0xAA, 0x44, 0x99],
        [0x44, 0xBB, 0x99],
        [0x55, 0x55, 0x55],
        [0xAA, 0xAA, 0x00],
        [0x6E, 0x2C, 0x00],
        [0x78, 0x5E, 0xF0],
        [0x22, 0x22, 0x22],
    ]
)

_DPI = 120

IGNORED, STRIPE = np.array([0xDD, 0xDD, 0xDD]), np.array([0xF7, 0xF7, 0xF7])
"""The two colours of the hatching where a pixel has no class."""

STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "legend.frameon": False,
    "hatch.linewidth": 1.5,
    # A class name may hold dollars.
    "text.parse_math": False,
}
"""Matplotlib's settings for every picture of the trainer."""


def class_colours(num_classes: int) -> np.ndarray:
    """Give each class a colour: twelve that colour-blind eyes can tell apart too, then shades of them.

    Args:
        num_classes: at least 0; the colours repeat after 36.

    Returns:
        `uint8 [K, 3]`, red, green and blue.
    """
    darker, lighter = _PALETTE * 0.6, _PALETTE + (255 - _PALETTE) * 0.55
    # A darker black would be black again, and a lighter sky white: those two go towards the other end.
    darker[11], lighter[4] = [0x00, 0x45, 0x45], [0x4A, 0x90, 0xC8]
    rounds = np.concatenate([_PALETTE, darker, lighter]).round().astype(np.uint8)
    colours: np.ndarray = rounds[np.arange(num_classes) % len(rounds)]
    return colours
