"""The network of a run folder, with its preprocessing."""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import yaml
from lightning_fabric import Fabric
from torch import Tensor, nn

from examples.workbench.data_settings import Data
from examples.workbench.errors import InputError
from examples.workbench.inference.resizing import resize_as_pillow
from examples.workbench.networks.build import build_segmenter, dtype_of
from examples.workbench.networks.segmentation import Segmenter, upsample
from examples.workbench.options import read_settings
from examples.workbench.reporting.scores import classes_of, segment
from examples.workbench.settings import Settings
from examples.workbench.training import checkpoints, run_folder
from examples.workbench.training.ranks import check_accelerator

__all__ = ["Trained", "load_run"]


class Trained(nn.Module):
    """A run's network. It maps images of any size to logits of that size, and computes at the network's own size.

    Args:
        settings: the settings of the run.
        segmenter: the segmenter with the run's weights. It is set to evaluation mode, and its weights get no gradients.
    """

    def __init__(self, settings: Settings, segmenter: Segmenter) -> None:
        super().__init__()
        self.settings = settings
        self.segmenter = segmenter.requires_grad_(False)
        self.eval()

    @property
    def data(self) -> Data:
        """The run's data settings, with its classes and the size of the images that the network sees."""
        return self.settings.data

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images.

        Resizing rounds to 8 bits per channel, as in the evaluation, so the images receive no gradients.

        Args:
            images: RGB `[B, 3, H, W]` in [0, 1], float32.

        Returns:
            `[B, K, H, W]`, float32.

        Raises:
            InputError: the images have a wrong shape or dtype.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.float32:
            raise InputError(f"expected images [B, 3, H, W] in float32, got {list(images.shape)} in {images.dtype}")
        resized = resize_as_pillow(images * 255, self.data.size).float()
        logits = self.segmenter(((resized / 255 - 0.5) / 0.25).to(next(self.segmenter.parameters()))).logits
        return upsample(logits.float(), images.shape[-2:])

    def logits(self, image: np.ndarray) -> Tensor:
        """Logits `float32 [K, H, W]` of an image `uint8 [H, W, 3]`, as the evaluation computes them."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise InputError(f"expected an image [H, W, 3] in uint8, got {list(image.shape)} in {image.dtype}")
        return segment(self.segmenter, image, self.data.size)

    def predict(self, image: np.ndarray) -> np.ndarray:
        """Predicted class of each pixel, `uint8 [H, W]`, of an image `uint8 [H, W, 3]`; equals `--save-predictions`."""
        return classes_of(self.logits(image))


def load_run(
    run: Path | str, *, best: bool = False, accelerator: Literal["auto", "cpu", "cuda", "mps"] | None = None
) -> Trained:
    """Load the network of a run folder. Nothing outside the folder is needed.

    Args:
        run: the run folder.
        best: load the network with the best validation score; otherwise the newest undamaged checkpoint.
        accelerator: device to compute on; by default that of the run's settings.

    Raises:
        InputError: the folder has no usable settings or no usable checkpoint.
    """
    run = Path(run)
    try:
        settings = _read_settings(run)
        if best and not (run / checkpoints.BEST).exists():
            raise InputError(f"--best needs {checkpoints.BEST}, which training writes only with validate_every")
        checkpoint = run / checkpoints.BEST if best else checkpoints.newest_checkpoint(run)
        weights = checkpoints.load_weights(checkpoint, teacher=settings.final == "teacher")
        segmenter = build_segmenter(settings, run_folder.network_file(run))
        checkpoints.check_weights_fit(segmenter.state_dict(), weights, checkpoint)
    except InputError as error:
        raise InputError(f"expected --run to be a run folder with a trained network, got {run}: {error}") from error
    segmenter.load_state_dict(weights)
    if accelerator is not None:
        settings = dataclasses.replace(settings, accelerator=accelerator)
    check_accelerator(settings)
    device = Fabric(accelerator=settings.accelerator, devices=1).device
    return Trained(settings, segmenter.to(device, dtype_of(settings)))


def _read_settings(run: Path) -> Settings:
    file = run / "settings.yaml"
    if not file.is_file():
        raise InputError("it has no settings.yaml" if run.is_dir() else "there is no such folder")
    try:
        written = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{file} is damaged: it cannot be parsed") from error
    parts = [part.name for part in dataclasses.fields(Settings)]
    # Defaults would replace the missing settings of a truncated file. The last line of a complete file is `final`.
    last = written.get(parts[-1]) if isinstance(written, dict) else None
    if not isinstance(last, dict) or last.get("final") is None or not written.keys() >= set(parts):
        raise InputError(f"{file} is damaged: some settings are missing")
    return read_settings(["--config", str(file)])[0]
