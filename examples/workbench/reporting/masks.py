"""Index masks as files whose palette shows the classes in colour."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from examples.workbench.files import write_whole
from examples.workbench.reporting.style import IGNORED, class_colours

__all__ = ["blend", "save_mask", "save_picture"]


def save_mask(file: Path, ids: np.ndarray, classes: Sequence[str]) -> None:
    """Write class ids `uint8 [H, W]` as a PNG whose pixels are the ids and whose palette has the report's colours."""
    picture = Image.fromarray(ids)
    palette = np.tile(IGNORED.astype(np.uint8), (256, 1))
    palette[: len(classes)] = class_colours(classes)
    picture.putpalette(palette.tobytes())
    save_picture(file, picture)


def save_picture(file: Path, picture: Image.Image) -> None:
    """Write a picture as a PNG."""
    # The temporary name does not say the format.
    write_whole(file, lambda to: picture.save(to, format="png"))


def blend(image: np.ndarray, ids: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """Mix an image `uint8 [H, W, 3]` and the colours of its classes in equal parts."""
    return Image.blend(Image.fromarray(image), Image.fromarray(class_colours(classes)[ids]), 0.5)
