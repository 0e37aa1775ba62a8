"""A small encoder-decoder that trains in minutes on a CPU."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.workbench.networks.segmentation import FeatureLayer, Segmentation, Segmenter, upsample_like

__all__ = ["SmallSegmenter"]


class SmallSegmenter(Segmenter):
    """A small segmenter: an encoder to stride 8, a decoder with skip connections to stride 2, and group norm.

    The domains of a step pass through the network one after another. Batch norm would normalise each domain by its own
    statistics, and so hide part of the domain shift from the discriminators. Group norm does not.

    Args:
        width: channels of the first stage, a multiple of 8.
        feature_layer: `"encoder"`, the paper's choice, returns the features of the last stage (`4 * width` channels,
            stride 8). `"decoder"` returns those of the layer before the classifier (`width` channels, stride 2).
    """

    def __init__(self, num_classes: int, *, width: int = 24, feature_layer: FeatureLayer = "encoder") -> None:
        super().__init__()
        self.feature_layer = feature_layer
        self.feature_channels = 4 * width if feature_layer == "encoder" else width
        self.stem = _convolution(3, width, stride=2)
        self.stage4 = nn.Sequential(_convolution(width, 2 * width, stride=2), _Residual(2 * width))
        self.stage8 = nn.Sequential(
            _convolution(2 * width, 4 * width, stride=2),
            _Residual(4 * width),
            _Residual(4 * width, dilation=2),
            _Residual(4 * width, dilation=4),
        )
        self.up4 = _convolution(6 * width, 2 * width)
        self.up2 = _convolution(3 * width, width)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Segmentation:
        """Segment images `[B, 3, H, W]`. The logits are `[B, K, H/2, W/2]`."""
        at2 = self.stem(images)
        at4 = self.stage4(at2)
        at8 = self.stage8(at4)
        decoded = self.up4(torch.cat([upsample_like(at8, at4), at4], dim=1))
        decoded = self.up2(torch.cat([upsample_like(decoded, at2), at2], dim=1))
        return Segmentation(at8 if self.feature_layer == "encoder" else decoded, self.classifier(decoded))


class _Residual(nn.Module):
    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.first = _convolution(channels, channels, dilation=dilation)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.GroupNorm(8, channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


def _convolution(inputs: int, outputs: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(8, outputs), nn.ReLU())
