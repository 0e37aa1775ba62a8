"""Colours of the classes, and Matplotlib's settings for every picture of the workbench."""

from typing import Any

import numpy as np

__all__ = ["IGNORED", "STRIPE", "STYLE", "class_colours"]

# Twelve colours at least 18 CIE Lab units from each other and from the grey of ignored pixels, in ordinary
# sight and in all three kinds of colour blindness; a test recomputes that.
_COLOURS = "332288 F0E442 228833 EE6677 99DDFF AA4499 44BB99 555555 AAAA00 6E2C00 785EF0 222222"
_PALETTE = np.frombuffer(bytes.fromhex(_COLOURS), np.uint8).reshape(-1, 3)

IGNORED, STRIPE = np.array([0xDD, 0xDD, 0xDD]), np.array([0xF7, 0xF7, 0xF7])
"""The two colours of the hatching where a pixel has no class."""

STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "hatch.linewidth": 1.5,
    # A class name may hold dollars.
    "text.parse_math": False,
}


def class_colours(num_classes: int) -> np.ndarray:
    """Colours of the classes, `uint8 [K, 3]`: twelve for colour-blind eyes too, 24 shades of them, then repetitions."""
    darker, lighter = _PALETTE * 0.6, _PALETTE + (255 - _PALETTE) * 0.55
    # A darker black would be black again, and a lighter sky white: those two go towards the other end.
    darker[11], lighter[4] = [0x00, 0x45, 0x45], [0x4A, 0x90, 0xC8]
    colours = np.concatenate([_PALETTE, darker, lighter]).round().astype(np.uint8)
    result: np.ndarray = colours[np.arange(num_classes) % len(colours)]
    return result
