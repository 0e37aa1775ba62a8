"""Predictions on new images, written to files."""

from pathlib import Path

import numpy as np

from examples.workbench.data.files import read_image
from examples.workbench.data.layouts import LAYOUTS
from examples.workbench.data.listing import list_files
from examples.workbench.errors import InputError
from examples.workbench.files import write_whole
from examples.workbench.inference.trained import Trained
from examples.workbench.progress import bar
from examples.workbench.reporting.masks import blend, save_mask, save_picture
from examples.workbench.reporting.scores import classes_of

__all__ = ["predict_files"]


def predict_files(
    network: Trained, images: Path, out: Path, *, overlay: bool = False, probabilities: bool = False
) -> int:
    """Write the predicted index mask of every image, `NAME.png`, and return the number of masks.

    Args:
        network: the network of a run.
        images: a folder of images of any sizes, or one image.
        out: folder for the masks; files with the same names are overwritten.
        overlay: also write `NAME_overlay.png`, the image covered by the colours of its classes.
        probabilities: also write `NAME.npz` with `probabilities`, float16 `[K, H, W]`, and the class names `classes`.

    Raises:
        InputError: there are no images, or two images would have the same output file; then nothing is written. Or an
            image is unreadable; then the masks of the images before it are already written.
    """
    files = _find_images(images)
    folder = images if images.is_dir() else images.parent
    if out.resolve() == folder.resolve():
        raise InputError(f"--out must differ from the folder of the images, got {out} for both")
    if out.exists() and not out.is_dir():
        raise InputError(f"expected --out to be a folder, got the file {out}")
    if overlay and (both := [name for name in files if f"{name}_overlay" in files]):
        file, other = files[both[0]], files[f"{both[0]}_overlay"]
        raise InputError(f"with --overlay, {file} and {other} would both be written to {other.stem}.png; rename one")
    for name, file in bar(files.items(), desc="predict", unit="image", leave=False):
        image = read_image(file)
        logits = network.logits(image)
        mask = classes_of(logits)
        save_mask(out / f"{name}.png", mask, network.data.classes)
        if overlay:
            save_picture(out / f"{name}_overlay.png", blend(image, mask, network.data.classes))
        if probabilities:
            _save_probabilities(out / f"{name}.npz", logits.softmax(0).half().cpu().numpy(), network.data.classes)
    return len(files)


def _find_images(images: Path) -> dict[str, Path]:
    """Images by name."""
    layout = LAYOUTS["index"]
    if images.is_dir():
        try:
            return list_files(images, ".", layout.pattern, layout.image_ends)
        except InputError as error:
            raise InputError(f"--images cannot be used: {error}") from error
    if not images.is_file():
        raise InputError(f"expected --images to be a folder of images, or an image; {images} does not exist")
    if not images.name.lower().endswith(layout.image_ends):
        endings = ", ".join(layout.image_ends)
        raise InputError(f"expected --images to be a folder, or an image ending in {endings}, got {images}")
    return {images.stem: images}


def _save_probabilities(file: Path, probabilities: np.ndarray, classes: list[str]) -> None:
    def write(to: Path) -> None:
        # If NumPy got a path, it would add an ending to the name.
        with to.open("wb") as opened:
            np.savez_compressed(opened, probabilities=probabilities, classes=np.array(classes))

    write_whole(file, write)
