"""Folders of images and label files, read according to their layout."""

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
    """A folder of images and a folder of label files of the same names, in the order of names.

    The files are listed at once; each is read, and checked, when it is indexed. With `partial`, images may lack a label
    file, whose pixels then have no class; `with_labels` lists the indices of those that have one.
    """

    def __init__(
        self, root: Path, folder: Folder, *, classes: Sequence[str], ignore_index: int = 255, partial: bool = False
    ) -> None:
        self.layout = layout = LAYOUTS[folder.layout]
        if layout.ids is not None and (unknown := [name for name in classes if name not in layout.ids]):
            raise InputError(f"expected classes of {folder.layout}, {', '.join(layout.ids)}; got {unknown[0]}")
        images = _list_files(root, folder.images, layout.pattern, layout.image_ends)
        masks: dict[str, Path] = {}
        if folder.labels is not None:
            masks = _list_files(root, folder.labels, layout.pattern, (layout.label_end,))
        where = f"in {root / folder.labels}" if folder.labels is not None else "without a folder of labels"
        unlabelled = [file for name, file in images.items() if name not in masks]
        if unlabelled and not partial:
            raise InputError(f"expected a label file for every image, got none {where} for {_some(unlabelled)}")
        if alone := [file for name, file in masks.items() if name not in images]:
            raise InputError(
                f"expected an image for every label file, got none in {root / folder.images} for {_some(alone)}"
            )
        self.names = sorted(images)
        self.files = [(images[name], masks.get(name)) for name in self.names]
        self.with_labels = [index for index, name in enumerate(self.names) if name in masks]
        self._layout_name = folder.layout
        self._num_classes = len(classes)
        self._ignore_index = ignore_index
        self._table = id_table(layout, classes, ignore_index)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        image_file, mask_file = self.files[index]
        picture, bits = _read_image(image_file)
        # Pillow drops the lower half of three channels of 16 bits, and clips one channel, nearly all of it to white.
        if bits > 8:
            raise InputError(f"expected {image_file} to be an image of 8 bits a channel, got one of {bits}")
        image = np.asarray(picture.convert("RGB"))
        if mask_file is None:
            return Sample(image, np.full(image.shape[:2], self._ignore_index, np.uint8), self.names[index])
        label = _read_label(mask_file, channels=self._layout_name == "synthia")
        # A few label files of GTA5 differ in size from their images, and show the same view.
        if self._layout_name == "gta5" and label.shape != image.shape[:2]:
            label = np.asarray(Image.fromarray(label).resize(picture.size, Image.Resampling.NEAREST))
        if label.shape != image.shape[:2]:
            ours, theirs = (f"{array.shape[1]} x {array.shape[0]}" for array in (image, label))
            raise InputError(f"expected {mask_file} to have its image's size {ours}, got {theirs}")
        try:
            return Sample(image, self._class_ids(label), self.names[index])
        except ValueError as error:
            raise InputError(f"{mask_file}: {error}") from error

    def _class_ids(self, label: np.ndarray) -> np.ndarray:
        """Indices in the classes, `uint8 [H, W]`, of the file's ids."""
        # The ids that occur are remapped, not the pixels: millions of pixels would take longer than reading them.
        occurring = np.flatnonzero(np.bincount(label.ravel()))
        others = occurring[occurring != 255]
        if self._layout_name == "cityscapes" and 0 < len(others) < len(occurring) and others.max() < 19:
            raise ValueError("expected ids of gtFine_labelIds.png, got 255 and none of 19 to 33: are they train ids?")
        try:
            new = self._remap(occurring)
        except ValueError:
            # Remapping all pixels raises an error that counts them.
            self._remap(label.astype(np.int64))
            raise
        table = np.zeros(occurring[-1] + 1, np.uint8)
        table[occurring] = new
        return np.asarray(table[label])

    def _remap(self, ids: np.ndarray) -> np.ndarray:
        labels = torch.from_numpy(ids)
        if self._table is not None:
            labels = semshift.remap_labels(labels, self._table)
        semshift.check_labels(labels, self._num_classes, ignore_index=self._ignore_index)
        return labels.numpy()


def _list_files(root: Path, folder: str, pattern: str, endings: Sequence[str]) -> dict[str, Path]:
    """Files by name without the ending."""
    where = root / folder
    # Judged by its name alone: large data sets are often kept behind a link.
    if Path(folder).is_absolute() or ".." in Path(folder).parts:
        raise InputError(f"expected a folder below the data root {root}, got {folder}")
    if not where.is_dir():
        raise InputError(f"expected a folder {where}, got none")
    files: dict[str, Path] = {}
    for file in sorted(where.glob(pattern)):
        for ending in endings:
            if file.name.lower().endswith(ending.lower()):
                name = file.name[: -len(ending)]
                if name in files:
                    raise InputError(f"expected one file of a name, got {files[name]} and {file.name}")
                files[name] = file
    if not files:
        raise InputError(f"expected {where} to hold files ending in {', '.join(endings)}, got none")
    return files


def _some(files: Sequence[Path]) -> str:
    return f"{files[0]}{f' and {len(files) - 1} more' if len(files) > 1 else ''}"


def _read_image(file: Path) -> tuple[Image.Image, int]:
    """An image, and the bits of a channel in its file: up to 8, 16 or 32."""
    try:
        with Image.open(file) as image:
            # Before loading: afterwards the mode is RGB for any number of bits.
            bits = 16 if ";16" in f"{image.mode} {image.tile}" else 32 if image.mode in ("I", "F") else 8
            image.load()
            return image.copy(), bits
    # On a damaged file the decoders raise OSError, SyntaxError, ValueError and more.
    except Exception as error:
        why = str(error) or type(error).__name__
        raise InputError(f"expected {file} to be a whole image, got an unreadable file: {why}") from error


def _read_label(file: Path, *, channels: bool) -> np.ndarray:
    """An index mask, or the first of several channels of 16 bits."""
    mask, bits = _read_image(file)
    if not channels:
        if mask.mode not in ("L", "P", "I", "I;16"):
            raise InputError(f"expected {file} to be an index mask of one channel, got an image of mode {mask.mode}")
        return np.asarray(mask)
    if bits != 16 or len(mask.getbands()) < 2:
        raise InputError(f"expected {file} to hold several channels of 16 bits, got mode {mask.mode} of {bits}")
    # Pillow detects damage, but cannot read such channels.
    deep = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
    if deep is None or deep.dtype != np.uint16 or deep.ndim != 3:
        raise InputError(f"expected a label file that OpenCV can read, got {file}")
    # Blue, green, red; grey with alpha is read as three times grey.
    return np.asarray(deep[..., 2])
