"""Shared parts of the segmenters: base class, output, and the report of loading pretrained weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.workbench.errors import InputError

__all__ = ["FeatureLayer", "Origin", "Pretrained", "Segmentation", "Segmenter", "read_state_dict"]
__all__ += ["upsample", "upsample_like"]

FeatureLayer = Literal["encoder", "decoder"]
Origin = Literal["torchvision", "caffe", "segformer", "efficientnet-lite0"]


class Segmentation(NamedTuple):
    """Output of a segmenter."""

    features: Tensor
    """`[B, C, h, w]`, from the layer whose class prototypes are aligned."""
    logits: Tensor
    """`[B, K, h', w']`, not yet upsampled to the labels' size."""
    auxiliary: Tensor | None = None
    """Logits of the second classifier, which uses an earlier layer."""


class Segmenter(nn.Module):
    """Base class of segmenters: maps images `[B, 3, H, W]`, `(rgb / 255 - 0.5) / 0.25`, to a `Segmentation`."""

    feature_channels: int
    """Number of channels C of the features."""
    configuration: str | None = None
    """Contents of a file named in the settings, without which the network cannot be built again."""
    gain: Tensor
    offset: Tensor

    def classifier_parameters(self) -> list[nn.Parameter]:
        """The parameters of the last layer, which may learn faster than a pretrained backbone."""
        return list(self.get_submodule("classifier").parameters())

    def register_normalisation(self, origin: Origin) -> None:
        """Register `gain` and `offset`, which convert the input to the units that weights of this origin need."""
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        gain, offset = 0.25 / deviation, (0.5 - mean) / deviation
        if origin == "efficientnet-lite0":
            # (rgb - 127) / 128
            gain, offset = torch.full_like(mean, 255 * 0.25 / 128), torch.full_like(mean, (255 * 0.5 - 127) / 128)
        elif origin == "caffe":
            mean = torch.tensor([122.67891434, 116.66876762, 104.00698793])
            gain, offset = torch.full_like(mean, 255 * 0.25), 255 * 0.5 - mean
        self.register_buffer("gain", gain[:, None, None], persistent=False)
        self.register_buffer("offset", offset[:, None, None], persistent=False)


class Pretrained(NamedTuple):
    """Report of loading pretrained weights, as lists of the model's keys."""

    file: str
    origin: Origin
    """The assumed origin of the weights; the file does not show it."""
    prefix: str
    """Prefix that was removed from all keys of the file."""
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    """Keys of the model that were not loaded; their tensors are unchanged."""
    left_over: tuple[str, ...]
    """Keys of the file that were not used."""

    def __str__(self) -> str:
        known = {"torchvision": "RGB, stride in the 3x3", "caffe": "BGR, stride in the 1x1"}
        how = known.get(self.origin, "RGB")
        prefix = f", without the prefix {self.prefix}" if self.prefix else ""
        return (
            f"{self.file}: {len(self.loaded)} tensors loaded as {self.origin} weights ({how}){prefix}\n"
            f"not loaded: {_listed(self.missing)}\nin the file, not used: {_listed(self.left_over)}"
        )


def _listed(names: Sequence[str]) -> str:
    """The names as text. Batch norm's counters, which have no effect, are only counted."""
    weights = [name for name in names if not name.endswith("num_batches_tracked")]
    counters = [f"{len(names) - len(weights)} x num_batches_tracked"] if len(weights) < len(names) else []
    return ", ".join(weights + counters) or "nothing"


def upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits resized to `[B, K, *size]`, in float32 or float64."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.interpolate(wide, size=list(size), mode="bilinear", align_corners=False)


def upsample_like(x: Tensor, like: Tensor) -> Tensor:
    """Feature maps resized to the size of `like`, in their own dtype."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Read a file of weights without running any code in it."""
    if not file.is_file():
        raise InputError(f"expected network.init to be a file of weights, got {file}, which is not a file")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises several types, for a damaged file and for a file with code
        raise InputError(f"expected {file} to hold weights and no code; PyTorch cannot load this file") from error
    if not isinstance(state, dict):
        raise InputError(f"expected {file} to be a state dict, got a {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise InputError(f"expected {file} to be a state dict, tensors by name, got a {kind} under {name!r}")
    return state
