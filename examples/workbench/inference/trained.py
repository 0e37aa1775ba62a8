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
    """A run's network: images of any size to logits of that size, resized to the network's size in between.

    Args:
        settings: of the run.
        segmenter: with the run's weights. It gets evaluation mode, and weights without gradients.
    """

    def __init__(self, settings: Settings, segmenter: Segmenter) -> None:
        super().__init__()
        self.settings = settings
        self.segmenter = segmenter.requires_grad_(False)
        self.eval()

    @property
    def data(self) -> Data:
        """The run's classes, and the size of the images that the network sees."""
        return self.settings.data

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images.

        Resizing rounds to 8 bits a channel, as the evaluation's does: the images get no gradients.

        Args:
            images: RGB `[B, 3, H, W]` in [0, 1], float32.

        Returns:
            `[B, K, H, W]`, float32.

        Raises:
            InputError: on another shape or dtype.
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
        """Predicted class of each pixel `uint8 [H, W]` of an image `uint8 [H, W, 3]`: that of `--save-predictions`."""
        return classes_of(self.logits(image))


def load_run(
    run: Path | str, *, best: bool = False, accelerator: Literal["auto", "cpu", "cuda", "mps"] | None = None
) -> Trained:
    """The network of a run folder, which needs nothing outside the folder.

    Args:
        run: the run folder.
        best: the step that was best on the validation images; else the newest undamaged checkpoint.
        accelerator: to compute on; by default the run's.

    Raises:
        InputError: the folder has no settings or no checkpoint that can be used.
    """
    run = Path(run)
    try:
        settings = _read_settings(run)
        if best and not (run / checkpoints.BEST).exists():
            raise InputError(f"it has no {checkpoints.BEST}, which training writes with validate_every (--best)")
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
        raise InputError(f"{file} is damaged, it does not parse") from error
    parts = [part.name for part in dataclasses.fields(Settings)]
    # Defaults would fill what a truncated file lacks; its last line is `final`.
    last = written.get(parts[-1]) if isinstance(written, dict) else None
    if not isinstance(last, dict) or last.get("final") is None or not written.keys() >= set(parts):
        raise InputError(f"{file} is damaged, it does not hold all settings")
    return read_settings(["--config", str(file)])[0]
