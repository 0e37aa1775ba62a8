"""What every segmenter returns, and what became of a file of weights."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Pretrained", "Segmentation", "Segmenter", "upsample"]

_COUNTER = ".num_batches_tracked"


class Segmentation(NamedTuple):
    """What a segmenter returns: the features that pooling reads, and the class logits."""

    features: Tensor
    """`[B, C, h, w]`, the layer whose class prototypes are aligned."""
    logits: Tensor
    """`[B, K, h', w']`, to be up-sampled to the labels' size by the caller."""
    auxiliary: Tensor | None = None
    """Logits of a second classifier on an earlier layer, where there is one."""


class Pretrained(NamedTuple):
    """What became of a file of weights; every key is that of the model."""

    file: str
    origin: str
    """What the weights were taken for; it cannot be seen in them."""
    prefix: str
    """What all the file's keys began with, and was taken off."""
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    """In the model and not loaded: these are as they were before."""
    left_over: tuple[str, ...]
    """In the file and not used."""

    def __str__(self) -> str:
        """A line about what was loaded and how it is used, then the keys that are missing and left over."""
        how = {"torchvision": "RGB, stride in the 3x3", "caffe": "BGR, stride in the 1x1", "segformer": "RGB"}[
            self.origin
        ]
        prefix = f", without the prefix {self.prefix}" if self.prefix else ""
        first = f"{self.file}: {len(self.loaded)} tensors loaded as {self.origin} weights ({how}){prefix}"
        return "\n".join([first, f"missing: {_listed(self.missing)}", f"left over: {_listed(self.left_over)}"])


def _listed(names: Sequence[str]) -> str:
    weights = [name for name in names if not name.endswith(_COUNTER)]
    counters = [f"{len(names) - len(weights)} x {_COUNTER[1:]}"] if len(weights) < len(names) else []
    return ", ".join(weights + counters) or "nothing"


class Segmenter(nn.Module):
    """Base of the segmenters: `forward` maps images `[B, 3, H, W]` to a `Segmentation`."""

    feature_channels: int
    """Channels of the features."""

    def classifier_parameters(self) -> list[nn.Parameter]:
        """The parameters of the last layer."""
        raise NotImplementedError


def upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits `[B, K, *size]`, at least float32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.interpolate(wide, size=list(size), mode="bilinear", align_corners=False)
