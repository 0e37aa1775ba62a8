"""Image files: each is read whole and upright, or refused in one line."""

import contextlib
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from examples.workbench.errors import InputError

__all__ = ["read_colour_mask", "read_deep_mask", "read_image", "read_index_mask"]

_LOSSY = {"JPEG", "MPO", "WEBP", "JPEG2000", "AVIF", "TIFF jpeg", "TIFF tiff_jpeg", "TIFF webp"}
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Filters of warnings are of the process, and several threads read images.
_FILTERS = threading.Lock()


class _Picture(NamedTuple):
    image: Image.Image
    """Upright."""
    stored: str
    """Pillow's name of how the file stores a pixel: `L;4` is grey of 4 bits."""
    kind: str
    """The format; of TIFF, the compression too."""

    @property
    def bits(self) -> int:
        """Bits of a channel in the file; those of colours packed into 16 bits count as 8."""
        # Some versions of Pillow read 16 bits as mode I.
        packed = re.match(r"(?!BGR)\w+;(\d+)", self.stored) or re.match(r"I;(\d+)", self.image.mode)
        return int(packed[1]) if packed else 32 if self.image.mode in ("I", "F") else 8


def read_image(file: Path) -> np.ndarray:
    """An image, `uint8 [H, W, 3]`, red first."""
    picture = _read(file)
    # Pillow drops the lower half of three channels of 16 bits, and clips one channel, nearly all of it to white.
    if picture.bits > 8:
        raise InputError(f"expected {file} to be an image of 8 bits a channel, got one of {picture.bits}")
    return np.asarray(_to_rgb(picture.image))


def read_index_mask(file: Path) -> np.ndarray:
    """The numbers `[H, W]` that a mask of one channel holds, or its palette's indices."""
    image, stored, _ = picture = _read_mask(file)
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        way_out = "; if its colours mean classes, list them in `colours`" if len(image.getbands()) > 1 else ""
        raise InputError(
            f"expected {file} to be an index mask of one channel, got an image of mode {image.mode}{way_out}"
        )
    ids = np.asarray(image)
    # Pillow shows white as 1 of 1 bit, and as 255 of 2, 4 and 8 bits, also where the file stores white as 0.
    largest = 1 if image.mode == "1" else 255
    if image.mode in ("1", "L") and re.search(r";\d?I", stored):
        ids = largest - ids.astype(np.uint8)
    if image.mode == "L" and picture.bits < 8:
        ids = ids // (largest // (2**picture.bits - 1))
    return ids.astype(np.uint8) if image.mode == "1" else ids


def read_colour_mask(file: Path) -> Image.Image:
    """A mask whose colours mean classes, in mode RGB."""
    picture = _read_mask(file)
    if picture.bits > 8:
        raise InputError(f"expected {file} to be a mask of 8 bits a channel, got one of {picture.bits}")
    image = picture.image
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        if transparent := sum(image.getchannel("A").histogram()[:255]):
            raise InputError(
                f"expected {file} to be opaque, as a mask of colours is, got {transparent} pixels that are not"
            )
    return _to_rgb(image)


def read_deep_mask(file: Path) -> np.ndarray:
    """The first of several channels of 16 bits, `uint16 [H, W]`."""
    picture = _read_mask(file)
    mode, bits = picture.image.mode, picture.bits
    if bits != 16 or len(picture.image.getbands()) < 2:
        raise InputError(f"expected {file} to hold several channels of 16 bits, got mode {mode} of {bits}")
    # Pillow detects damage, but cannot read such channels.
    deep = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
    if deep is None or deep.dtype != np.uint16 or deep.ndim != 3:
        raise InputError(f"expected a label file that OpenCV can read, got {file}")
    # Blue, green, red; grey with alpha is read as three times grey.
    return np.asarray(deep[..., 2])


def _read_mask(file: Path) -> _Picture:
    picture = _read(file)
    if picture.kind in _LOSSY:
        raise InputError(
            f"expected {file} to be a mask in a lossless format such as PNG, got {picture.kind}, whatever its name: "
            "it changes ids and colours"
        )
    return picture


def _read(file: Path) -> _Picture:
    try:
        # Opened by its name, Pillow 13 mixes up the pixels of a TIFF file that lies on its side.
        with file.open("rb") as opened, _open(opened) as image:
            # Before loading: afterwards nothing tells how the file stores its pixels.
            stored = image.tile[0][3] if image.tile else ""
            compression = f" {image.info.get('compression')}" if image.format == "TIFF" else ""
            # Pillow compares the size of TIFF files with its limit here.
            with _quiet() if image.format == "TIFF" else contextlib.nullcontext():
                image.load()
            turn = _turn(image)
            upright = image.copy() if turn is None else image.transpose(turn)
            return _Picture(
                upright, str(stored[0] if isinstance(stored, tuple) else stored), f"{image.format}{compression}"
            )
    except Image.DecompressionBombError as error:
        limit, size = 2 * (Image.MAX_IMAGE_PIXELS or 0), re.search(r"\d+", str(error))
        raise InputError(
            f"{file} is too large: expected at most {limit} pixels, got {size[0] if size else 'more'}; cut it into "
            "tiles or resize it before"
        ) from error
    # On a damaged file the decoders raise OSError, SyntaxError, ValueError and more.
    except Exception as error:
        why = f"an unreadable file: {error or type(error).__name__}"
        if isinstance(error, UnidentifiedImageError):
            why = "a file of no known format" if file.stat().st_size else "an empty file"
        raise InputError(f"expected {file} to be a whole image, got {why}") from error


def _open(file: BinaryIO) -> Image.Image:
    with _quiet():
        return Image.open(file)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How a viewer turns the image, by its EXIF tag; not at all where the block is damaged."""
    try:
        with _quiet():
            return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings, such as of images of more than half the largest size that it reads."""
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _to_rgb(image: Image.Image) -> Image.Image:
    # With a palette whose colours are partly transparent, Pillow warns on the direct way.
    return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
