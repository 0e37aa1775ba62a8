"""Folders of images and label files, read as their layout defines."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import semshift
from examples.scenes import Sample
from examples.workbench.data.colours import ids_of_colours, open_table
from examples.workbench.data.files import read_colour_mask, read_deep_mask, read_image, read_index_mask
from examples.workbench.data.layouts import LAYOUTS, id_table
from examples.workbench.data.listing import list_files
from examples.workbench.data_settings import Folder
from examples.workbench.errors import InputError, some

__all__ = ["FolderPair"]


class FolderPair:
    """A folder of images and a folder of label files with the same names, sorted by name.

    The constructor only lists the files. Indexing reads and checks an image and its label file. With `partial`, images
    may lack a label file; all their pixels are then ignored. `with_labels` lists the indices of images that have a
    label file. `ignored_names` are the names in the table of colours that are not classes.
    """

    def __init__(
        self, root: Path, folder: Folder, *, classes: Sequence[str], ignore_index: int = 255, partial: bool = False
    ) -> None:
        self.layout = layout = LAYOUTS[folder.layout]
        if layout.ids is not None and (unknown := [name for name in classes if name not in layout.ids]):
            known = ", ".join(layout.ids)
            raise InputError(f"expected data.classes to be classes of {folder.layout} ({known}), got {unknown[0]}")
        label_end, passed_over = folder.label_ending or layout.label_end, layout.passed_over
        # If images and label files share a folder, files that end like label files are not images.
        in_one = folder.labels is not None and Path(folder.labels) == Path(folder.images)
        no_images = (*passed_over, label_end) if in_one else passed_over
        images = list_files(root, folder.images, layout.pattern, layout.image_ends, no_images)
        masks: dict[str, Path] = {}
        if folder.labels is not None:
            masks = list_files(root, folder.labels, layout.pattern, (label_end,), passed_over)
        where = f"in {root / folder.labels}" if folder.labels is not None else "without a folder of labels"
        unlabelled = [file for name, file in images.items() if name not in masks]
        if unlabelled and not partial:
            raise InputError(f"expected a label file for every image, got none {where} for {some(unlabelled)}")
        if folder.labels is not None and not in_one and layout.ids is None:
            _refuse_other_formats(root / folder.labels, label_end, unlabelled)
        if alone := [file for name, file in masks.items() if name not in images]:
            apart = "; if labelled images are in a separate folder, set data.labelled" if partial else ""
            raise InputError(
                f"expected an image for every label file, got none in {root / folder.images} for {some(alone)}{apart}"
            )
        self.names = sorted(images)
        self.files = [(images[name], masks.get(name)) for name in self.names]
        self.with_labels = [index for index, name in enumerate(self.names) if name in masks]
        self._layout_name = folder.layout
        self._num_classes = len(classes)
        self._ignore_index = ignore_index
        self._table = id_table(layout, classes, ignore_index)
        self._colours, self.ignored_names = None, list[str]()
        if folder.colours:
            self._colours, self.ignored_names = open_table(folder.colours, root, classes, ignore_index)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        image_file, mask_file = self.files[index]
        image = read_image(image_file)
        if mask_file is None:
            return Sample(image, np.full(image.shape[:2], self._ignore_index, np.uint8), self.names[index])
        label = self._read_label(mask_file)
        # A few label files of GTA5 have a different size than their images, but show the same view.
        if self._layout_name == "gta5" and label.shape != image.shape[:2]:
            size = (image.shape[1], image.shape[0])
            label = np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
        if label.shape != image.shape[:2]:
            ours, theirs = (f"{array.shape[1]} x {array.shape[0]}" for array in (image, label))
            raise InputError(f"expected {mask_file} to have the size of its image, {ours}, got {theirs}")
        return Sample(image, label, self.names[index])

    def _read_label(self, file: Path) -> np.ndarray:
        """Class index of each pixel of a label file, `uint8 [H, W]`."""
        try:
            if self._colours is not None:
                return ids_of_colours(read_colour_mask(file), self._colours)
            return self._class_ids(read_deep_mask(file) if self._layout_name == "synthia" else read_index_mask(file))
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{file}: {error}") from error

    def _class_ids(self, label: np.ndarray) -> np.ndarray:
        """Class index, `uint8 [H, W]`, of each id in a label file."""
        # Only the ids that occur are remapped: remapping millions of pixels would take longer than reading the file.
        # Ids of 32 bits may be negative, or too large for a table of counts.
        small = label.dtype.itemsize <= 2
        occurring = np.flatnonzero(np.bincount(label.ravel())) if small else np.unique(label).astype(np.int64)
        others = occurring[occurring != 255]
        if self._layout_name == "cityscapes" and 0 < len(others) < len(occurring) and others.max() < 19:
            raise ValueError(
                "expected ids of gtFine_labelIds.png, got 255 but no id from 19 to 33; these may be train ids"
            )
        try:
            new = self._remap(occurring)
        except ValueError:
            # Remapping all pixels raises an error that also counts the wrong pixels.
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


def _refuse_other_formats(labels: Path, label_end: str, unlabelled: Sequence[Path]) -> None:
    """Refuse a label file such as `NAME.jpg` if an image has no mask `NAME.png`."""
    for image in unlabelled:
        for ending in LAYOUTS["index"].image_ends:
            file = labels / f"{image.stem}{ending}"
            if not file.name.endswith(label_end) and file.exists():
                raise InputError(f"expected masks to end in {label_end}, got {file}; save it in that lossless format")
