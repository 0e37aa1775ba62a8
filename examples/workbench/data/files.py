"""Reading of image files. Each is read completely and upright, or refused with a one-line message."""

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
# Warning filters belong to the whole process, but several threads read images.
_FILTERS = threading.Lock()


class _Picture(NamedTuple):
    image: Image.Image
    """Upright."""
    stored: str
    """Pillow's name for the way that the file stores a pixel: `L;4` is grey with 4 bits."""
    kind: str
    """The format; for TIFF, the compression too."""

    @property
    def bits(self) -> int:
        """Bits per channel in the file; colours packed into 16 bits count as 8."""
        # Some versions of Pillow read 16-bit images as mode I.
        packed = re.match(r"(?!BGR)\w+;(\d+)", self.stored) or re.match(r"I;(\d+)", self.image.mode)
        return int(packed[1]) if packed else 32 if self.image.mode in ("I", "F") else 8


def read_image(file: Path) -> np.ndarray:
    """Read an image as `uint8 [H, W, 3]`, red first."""
    picture = _read(file)
    # From three channels of 16 bits, Pillow drops the lower half; it clips a single channel, most of it to white.
    if picture.bits > 8:
        raise InputError(f"expected {file} to be an image with 8 bits per channel, got {picture.bits} bits")
    return np.asarray(_to_rgb(picture.image))


def read_index_mask(file: Path) -> np.ndarray:
    """Read the numbers `[H, W]` in a mask of one channel, or the indices in a mask with a palette."""
    image, stored, _ = picture = _read_mask(file)
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        fix = "; if its colours mean classes, list them in the folder's `colours`" if len(image.getbands()) > 1 else ""
        raise InputError(f"expected {file} to be an index mask of one channel, got an image of mode {image.mode}{fix}")
    ids = np.asarray(image)
    # Pillow reads white as 1 from 1 bit, and as 255 from 2, 4 and 8 bits, even if the file stores white as 0.
    largest = 1 if image.mode == "1" else 255
    if image.mode in ("1", "L") and re.search(r";\d?I", stored):
        ids = largest - ids.astype(np.uint8)
    if image.mode == "L" and picture.bits < 8:
        ids = ids // (largest // (2**picture.bits - 1))
    return ids.astype(np.uint8) if image.mode == "1" else ids


def read_colour_mask(file: Path) -> Image.Image:
    """Read a mask whose colours mean classes, as an image of mode RGB."""
    picture = _read_mask(file)
    if picture.bits > 8:
        raise InputError(f"expected {file} to be a mask with 8 bits per channel, got {picture.bits} bits")
    image = picture.image
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        if transparent := sum(image.getchannel("A").histogram()[:255]):
            raise InputError(f"expected the colour mask {file} to be opaque, got {transparent} pixels that are not")
    return _to_rgb(image)


def read_deep_mask(file: Path) -> np.ndarray:
    """Read the first of several channels of 16 bits, `uint16 [H, W]`."""
    picture = _read_mask(file)
    mode, bits = picture.image.mode, picture.bits
    if bits != 16 or len(picture.image.getbands()) < 2:
        raise InputError(f"expected {file} to hold several channels of 16 bits, got mode {mode} with {bits} bits")
    # Pillow detects damaged files, but cannot read such channels.
    deep = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
    if deep is None or deep.dtype != np.uint16 or deep.ndim != 3:
        raise InputError(f"expected a label file that OpenCV can read, got {file}")
    # The order is blue, green, red. OpenCV reads grey with alpha as three grey channels.
    return np.asarray(deep[..., 2])


def _read_mask(file: Path) -> _Picture:
    picture = _read(file)
    if picture.kind in _LOSSY:
        raise InputError(
            f"expected {file} to be a mask in a lossless format such as PNG, got {picture.kind}, whatever its name "
            "says: lossy formats change ids and colours"
        )
    return picture


def _read(file: Path) -> _Picture:
    try:
        # If Pillow 13 opens a rotated TIFF file by its name, it mixes up the pixels.
        with file.open("rb") as opened, _open(opened) as image:
            # This must be read before loading; loading discards how the file stores its pixels.
            stored = image.tile[0][3] if image.tile else ""
            compression = f" {image.info.get('compression')}" if image.format == "TIFF" else ""
            # For TIFF files, Pillow checks its size limit here.
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
            "tiles or resize it first"
        ) from error
    # For a damaged file the decoders raise OSError, SyntaxError, ValueError and others.
    except Exception as error:
        why = f"an unreadable file: {error or type(error).__name__}"
        if isinstance(error, UnidentifiedImageError):
            why = "a file of an unknown format" if file.stat().st_size else "an empty file"
        raise InputError(f"expected {file} to be a whole image, got {why}") from error


def _open(file: BinaryIO) -> Image.Image:
    with _quiet():
        return Image.open(file)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The rotation that the image's EXIF tag asks of a viewer; None if there is none or the EXIF data are damaged."""
    try:
        with _quiet():
            return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Pillow's warnings, such as the one about images larger than half of its size limit."""
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _to_rgb(image: Image.Image) -> Image.Image:
    # Pillow warns if an image with a partly transparent palette is converted directly.
    return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
