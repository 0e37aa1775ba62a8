"""Folders of images and labels, read as their layout says."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

import semshift
from examples.scenes import Sample
from examples.workbench.data.layouts import LAYOUTS, id_table
from examples.workbench.errors import InputError
from examples.workbench.settings import Folder

__all__ = ["FolderPair"]


class FolderPair:
    """A folder of images and a folder of label files of the same names, in name order.

    Files are listed at once and read when asked for, each checked as it is read.

    Args:
        root: the data root; a folder outside it is refused.
        folder: the two folders.
        classes: their names in the order of their ids, 1 to 256 of them.
        ignore_index: id of pixels without a class, in 0 to 255.

    Raises:
        InputError: a folder is missing, empty or outside the root, a file has no partner or a double, labels would
            not fit into 8 bits, or the layout lacks a class.
    """

    def __init__(self, root: Path, folder: Folder, *, classes: Sequence[str], ignore_index: int = 255) -> None:
        if not (1 <= len(classes) <= 256 and 0 <= ignore_index <= 255):
            raise InputError(
                f"expected 1 to 256 classes and ignore_index in 0 to 255, got {len(classes)} and {ignore_index}"
            )
        self.layout = LAYOUTS[folder.layout]
        unknown = [name for name in classes if self.layout.ids is not None and name not in self.layout.ids]
        if unknown:
            raise InputError(
                f"expected the classes to be among those of {folder.layout}, {', '.join(self.layout.ids or ())}; "
                f"got {unknown[0]}"
            )
        images = _list(root, folder.images, self.layout.pattern, self.layout.image_ends)
        masks = _list(root, folder.labels, self.layout.pattern, (self.layout.label_end,))
        for what, of, others, where, files in (
            ("a mask for every image", images, masks, folder.labels, images),
            ("an image for every mask", masks, images, folder.images, masks),
        ):
            alone = [name for name in of if name not in others]
            if alone:
                more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
                raise InputError(f"expected {what}, got none in {root / where} for {files[alone[0]]}{more}")
        self.names = sorted(images)
        self.name = folder.layout
        self.num_classes = len(classes)
        self.ignore_index = ignore_index
        self.files = [(images[name], masks[name]) for name in self.names]
        self._table = id_table(self.layout, classes, ignore_index)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        """Read an image and its labels.

        Raises:
            InputError: a file is damaged, no image or no label file, has other ids, or the two do not fit.
        """
        image_file, mask_file = self.files[index]
        picture, bits = _read(image_file)
        # Pillow drops the lower half of three channels of 16 bits, and clips one channel, nearly all of it to white.
        if bits > 8:
            raise InputError(f"expected {image_file} to be an image of 8 bits a channel, got one of {bits}")
        image = np.asarray(picture.convert("RGB"))
        label = _first_channel(mask_file) if self.name == "synthia" else _index_mask(mask_file)
        # GTA5 comes with a few label files that are not of their image's size, and show the same view.
        if self.name == "gta5" and label.shape != image.shape[:2]:
            label = np.asarray(Image.fromarray(label).resize(picture.size, Image.Resampling.NEAREST))
        if label.shape != image.shape[:2]:
            sizes = [f"{array.shape[1]} x {array.shape[0]}" for array in (image, label)]
            raise InputError(f"expected {mask_file} to have its image's size {sizes[0]}, got {sizes[1]}")
        try:
            ids = self._by_class(label)
        except ValueError as error:
            raise InputError(f"{mask_file}: {error}") from error
        return Sample(image, ids, self.names[index])

    def _by_class(self, label: np.ndarray) -> np.ndarray:
        """Ids of the file to those of the classes, `uint8 [H, W]`."""
        # By way of the ids that occur: to remap millions of pixels one by one takes longer than to read them.
        occurring = np.flatnonzero(np.bincount(label.ravel()))
        classless, others = occurring[occurring == 255], occurring[occurring != 255]
        if self.name == "cityscapes" and classless.size and others.size and others.max() < 19:
            raise ValueError(
                f"expected ids of {self.layout.label_end[1:]}, got 255 and none of 19 to 33: are they train ids?"
            )
        try:
            ids = self._checked(occurring)
        except ValueError:
            # Once more, for an error that counts the pixels.
            self._checked(label.astype(np.int64))
            raise
        table = np.zeros(occurring[-1] + 1, np.uint8)
        table[occurring] = ids
        result: np.ndarray = table[label]
        return result

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        labels = torch.from_numpy(ids)
        if self._table is not None:
            labels = semshift.remap_labels(labels, self._table)
        semshift.check_labels(labels, self.num_classes, ignore_index=self.ignore_index)
        return labels.numpy()


def _list(root: Path, folder: str, pattern: str, endings: Sequence[str]) -> dict[str, Path]:
    where = root / folder
    # By its name alone: a link below the root is how large data sets are often kept.
    if Path(folder).is_absolute() or ".." in Path(folder).parts:
        raise InputError(f"expected a folder below the data root {root}, got {folder}")
    if not where.is_dir():
        raise InputError(f"expected a folder {where}, got none")
    files: dict[str, Path] = {}
    for file in sorted(where.glob(pattern)):
        ending = next((end for end in endings if file.name.lower().endswith(end.lower())), None)
        if ending is None:
            continue
        name = file.name[: -len(ending)]
        if name in files:
            raise InputError(f"expected one file of a name, got {files[name]} and {file.name}")
        files[name] = file
    if not files:
        raise InputError(f"expected {where} to hold files ending in {', '.join(endings)}, got none")
    return files


def _read(file: Path) -> tuple[Image.Image, int]:
    """An image, and the bits of a channel in its file: up to 8, 16 or 32."""
    try:
        with Image.open(file) as image:
            # Before it is loaded: the mode of colours is RGB for any number of bits.
            bits = 16 if ";16" in f"{image.mode} {image.tile}" else 32 if image.mode in ("I", "F") else 8
            image.load()
            return image.copy(), bits
    # Whatever it is: on a damaged file the decoders raise OSError, SyntaxError, ValueError and more.
    except Exception as error:
        why = str(error) or type(error).__name__
        raise InputError(f"expected {file} to be a whole image, got one that does not read: {why}") from error


def _index_mask(file: Path) -> np.ndarray:
    mask, _ = _read(file)
    if mask.mode not in ("L", "P", "I", "I;16"):
        raise InputError(f"expected {file} to be an index mask of one channel, got an image of mode {mask.mode}")
    return np.asarray(mask)


def _first_channel(file: Path) -> np.ndarray:
    """The first of several channels of 16 bits, which Pillow cannot read whole; it finds damage, though."""
    picture, bits = _read(file)
    if bits != 16 or len(picture.getbands()) < 2:
        raise InputError(
            f"expected {file} to be a label file of several channels of 16 bits, got mode {picture.mode} of {bits}"
        )
    channels = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
    if channels is None or channels.dtype != np.uint16 or channels.ndim != 3:
        raise InputError(f"expected {file} to be a label file that OpenCV reads, got one that it does not")
    # Blue, green, red; grey with alpha comes as three times grey.
    result: np.ndarray = channels[..., 2]
    return result
