"""DeepLab-v2 (Chen et al. 2016, arXiv 1606.00915) on a ResNet (He et al. 2016)."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.workbench.errors import InputError, some
from examples.workbench.networks.segmentation import (
    Pretrained,
    Segmentation,
    Segmenter,
    read_state_dict,
)

__all__ = ["DeepLabV2", "load_pretrained"]

_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
_PREFIXES = ("module.Scale.", "module.", "Scale.", "")
_BACKBONE = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")


class DeepLabV2(Segmenter):
    """A ResNet with stride 8, followed by a classifier that adds the outputs of dilated convolutions.

    The origin of the weights decides both the preprocessing and the network. Weights from `"torchvision"` need RGB in
    [0, 1], normalised by ImageNet's mean and deviation, and the stride in the 3x3 convolution. Weights from `"caffe"`
    need BGR in [0, 255] minus a mean, and the stride in the 1x1 convolution before it. The keys and shapes of both are
    the same, so a file does not show its origin.

    The last two stages have no stride. Their 3x3 convolutions are dilated by 2 and 4 instead, which keeps their fields
    of view. With `"torchvision"`, the first 3x3 convolution of such a stage would have had the stride; it keeps the
    dilation of the stage before.

    Args:
        aspp_dilations: dilations of the classifier's 3x3 convolutions. The published code for domain adaptation uses
            only `(6, 12)`, since its loop returns too early.
        freeze_batch_norm: keep the loaded statistics, weights and biases of batch norm, even in `train()` mode.
        auxiliary: also classify the features of the third stage, for losses on two levels. As in published weights,
            the main classifier is then called `layer6` and the auxiliary classifier `layer5`.
    """

    feature_channels = 2048

    def __init__(
        self,
        num_classes: int,
        *,
        depth: Literal[101, 50] = 101,
        aspp_dilations: Sequence[int] = (6, 12, 18, 24),
        origin: Literal["torchvision", "caffe"] = "torchvision",
        freeze_batch_norm: bool = False,
        auxiliary: bool = False,
    ) -> None:
        super().__init__()
        self.depth = depth
        self.origin = origin
        norm = _FrozenBatchNorm2d if freeze_batch_norm else nn.BatchNorm2d
        stage = functools.partial(_stage, norm=norm, stride_in_3x3=origin == "torchvision")
        blocks = _BLOCKS[depth]
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(64)
        # Sizes are rounded up, as in Caffe: 512 x 1024 becomes 129 x 257 here and 65 x 129 after the next stage.
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.layer1 = stage(64, 64, blocks[0], stride=1, dilation=1)
        self.layer2 = stage(256, 128, blocks[1], stride=2, dilation=1)
        self.layer3 = stage(512, 256, blocks[2], stride=1, dilation=2)
        self.layer4 = stage(1024, 512, blocks[3], stride=1, dilation=4)
        self.layer5 = _Classifier(1024 if auxiliary else 2048, num_classes, aspp_dilations)
        self.layer6 = _Classifier(2048, num_classes, aspp_dilations) if auxiliary else None
        self.register_normalisation(origin)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Segmentation:
        """Segment images `[B, 3, H, W]`. The features and logits are `[B, ., H/8, W/8]`, rounded up."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(self.preprocess(images)))))
        third = self.layer3(self.layer2(self.layer1(x)))
        features = self.layer4(third)
        if self.layer6 is None:
            return Segmentation(features, self.layer5(features))
        return Segmentation(features, self.layer6(features), self.layer5(third))

    def preprocess(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in the units and the channel order that the weights' origin needs."""
        images = images * self.gain + self.offset
        return images.flip(1) if self.origin == "caffe" else images

    def classifier_parameters(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.named_parameters() if not name.startswith(_BACKBONE)]


class _FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm without gradients that stays in evaluation mode."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "_FrozenBatchNorm2d":
        super().train(False)
        return self


class _Bottleneck(nn.Module):
    def __init__(
        self, inputs: int, planes: int, *, norm: type[nn.BatchNorm2d], strides: tuple[int, int], dilation: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, stride=strides[0], bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=strides[1], padding=dilation, dilation=dilation, bias=False)
        self.bn2 = norm(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = norm(4 * planes)
        self.downsample: nn.Sequential | None = None
        if inputs != 4 * planes:
            shortcut = nn.Conv2d(inputs, 4 * planes, 1, stride=max(strides), bias=False)
            self.downsample = nn.Sequential(shortcut, norm(4 * planes))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + shortcut)


def _stage(
    inputs: int, planes: int, blocks: int, stride: int, dilation: int, norm: type[nn.BatchNorm2d], stride_in_3x3: bool
) -> nn.Sequential:
    strides = (1, stride) if stride_in_3x3 else (stride, 1)
    # Half of the dilation replaces this stage's stride, which would be in the first 3x3 convolution or before it.
    first = max(1, dilation // 2) if stride_in_3x3 else dilation
    return nn.Sequential(
        _Bottleneck(inputs, planes, norm=norm, strides=strides, dilation=first),
        *(_Bottleneck(4 * planes, planes, norm=norm, strides=(1, 1), dilation=dilation) for _ in range(blocks - 1)),
    )


class _Classifier(nn.Module):
    """DeepLab-v2's atrous spatial pyramid pooling without its fully connected layers: a sum of dilated convolutions."""

    def __init__(self, inputs: int, num_classes: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.conv2d_list = nn.ModuleList(
            nn.Conv2d(inputs, num_classes, 3, padding=dilation, dilation=dilation) for dilation in dilations
        )
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = functools.reduce(torch.add, (convolution(x) for convolution in self.conv2d_list))
        return result


def load_pretrained(model: DeepLabV2, file: Path, *, classifier: bool = True) -> Pretrained:
    """Load a state dict of torchvision's ResNet, or of a DeepLab-v2 with the same names, into the model.

    The file is assumed to have the model's origin. If all keys have the prefix `module.`, `Scale.` or both, it is
    removed. A refused file leaves the model unchanged, and no code in a file is run. A classifier that the file lacks
    stays unchanged and is reported as missing; so are all classifiers if `classifier` is false, and batch norm's unused
    `num_batches_tracked`.
    """
    weights = read_state_dict(file)
    prefix = next(prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in weights))
    weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    own = model.state_dict()
    loaded = [name for name in own if name in weights and (classifier or name.startswith(_BACKBONE))]
    missing = [name for name in own if name not in loaded]
    left_over = [name for name in weights if name not in loaded]
    absent = [name for name in missing if name.startswith(_BACKBONE) and not name.endswith("num_batches_tracked")]
    if absent:
        raise InputError(f"expected {file} to hold the whole backbone of depth {model.depth}, got no {some(absent)}")
    if unknown := [name for name in left_over if name.startswith(_BACKBONE)]:
        raise InputError(f"expected {file} to hold no layers beyond depth {model.depth}, got {some(unknown)}")
    for name in loaded:
        ours, theirs = list(own[name].shape), list(weights[name].shape)
        if ours != theirs:
            hint = "" if name.startswith(_BACKBONE) else "; network.init_classifier false loads only the backbone"
            raise InputError(f"expected {name} in {file} to have shape {ours}, got {theirs}{hint}")
    for head in ("layer5", "layer6"):
        absent = [name for name in missing if name.startswith(head)]
        if absent and any(name.startswith(head) for name in loaded):
            raise InputError(
                f"expected {file} to hold the whole classifier {head} or none of it, got no {some(absent)}"
            )
    model.load_state_dict({name: weights[name] for name in loaded}, strict=False)
    return Pretrained(str(file), model.origin, prefix, tuple(loaded), tuple(missing), tuple(left_over))
