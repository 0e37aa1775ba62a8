"""DeepLab-v2 (Chen et al. 2016, arXiv 1606.00915) on a ResNet (He et al. 2016)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.workbench.errors import InputError
from examples.workbench.networks.segmentation import Pretrained, Segmentation, Segmenter

__all__ = ["BACKBONE", "DeepLabV2", "Origin", "preprocessing"]

Origin = Literal["torchvision", "caffe"]

_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
BACKBONE = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")
"""What the names of the backbone's parameters begin with."""


class DeepLabV2(Segmenter):
    """A ResNet at stride 8 under a classifier that sums dilated convolutions.

    Takes the trainer's images, `(rgb / 255 - 0.5) / 0.25`, and turns them into what the weights were made for: where
    those come from is one argument, which decides both preprocessing and network. The weights of `"torchvision"` want
    RGB in [0, 1], normalised by ImageNet's mean and deviation, and stride in the 3x3 convolution; those of `"caffe"`
    want BGR in [0, 255] less a mean, and stride in the 1x1 before it. The two fit each other's keys and shapes.

    The last two stages do not stride; their 3x3 convolutions are dilated by 2 and 4, so that they see what they saw
    before. One that did the striding itself saw the finer grid, and keeps its dilation: under `"torchvision"` the
    first of the stage.

    Args:
        num_classes: K, at least 2.
        depth: of the ResNet, in layers.
        aspp_dilations: of the classifier's 3x3 convolutions, as many as there are dilations; `(6, 12)` is what the
            published code for domain adaptation computes, which returns out of its loop too early.
        origin: where the weights come from that will be loaded.
        freeze_batch_norm: normalise by the statistics that are loaded, never by a batch's, and keep weight and bias
            as they are, in `train()` too. For weights that were trained; before any are loaded it normalises nothing.
        auxiliary: classify the features of the third stage too, for the loss on two levels.
            The main classifier is then called `layer6` and the auxiliary one `layer5`, as in published weights.

    Raises:
        ValueError: an argument is not as above.
    """

    gain: Tensor
    offset: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        depth: Literal[101, 50] = 101,
        aspp_dilations: Sequence[int] = (6, 12, 18, 24),
        origin: Origin = "torchvision",
        freeze_batch_norm: bool = False,
        auxiliary: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"expected num_classes of at least 2, got {num_classes}")
        if depth not in _BLOCKS:
            raise ValueError(f"expected depth to be 101 or 50, got {depth}")
        if not aspp_dilations or min(aspp_dilations) < 1:
            raise ValueError(f"expected aspp_dilations to be one or more of at least 1, got {list(aspp_dilations)}")
        if origin not in ("torchvision", "caffe"):
            raise ValueError(f"expected origin to be 'torchvision' or 'caffe', got {origin!r}")
        self.depth = depth
        self.origin = origin
        self.feature_channels = 2048
        norm = _FrozenBatchNorm2d if freeze_batch_norm else nn.BatchNorm2d
        blocks = _BLOCKS[depth]
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(64)
        # Rounded up, as Caffe does: 512 x 1024 becomes 129 x 257 here and 65 x 129 after the next stage.
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.layer1 = _stage(64, 64, blocks[0], norm=norm, origin=origin)
        self.layer2 = _stage(256, 128, blocks[1], norm=norm, origin=origin, stride=2)
        self.layer3 = _stage(512, 256, blocks[2], norm=norm, origin=origin, dilation=2)
        self.layer4 = _stage(1024, 512, blocks[3], norm=norm, origin=origin, dilation=4)
        self.layer5 = _Classifier(1024 if auxiliary else 2048, num_classes, aspp_dilations)
        self.layer6 = _Classifier(2048, num_classes, aspp_dilations) if auxiliary else None
        gain, offset = preprocessing(origin)
        self.register_buffer("gain", gain, persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Segmentation:
        """Segment images `[B, 3, H, W]`: features `[B, 2048, H/8, W/8]` and logits of that size, rounded up."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(self.preprocess(images)))))
        third = self.layer3(self.layer2(self.layer1(x)))
        features = self.layer4(third)
        if self.layer6 is None:
            return Segmentation(features, self.layer5(features))
        return Segmentation(features, self.layer6(features), self.layer5(third))

    def preprocess(self, images: Tensor) -> Tensor:
        """The trainer's images `[B, 3, H, W]` as the weights' origin wants them."""
        images = images * self.gain + self.offset
        return images.flip(1) if self.origin == "caffe" else images

    def classifier_parameters(self) -> list[nn.Parameter]:
        """The parameters of the classifiers, which learn faster than those of a trained backbone."""
        return [parameter for name, parameter in self.named_parameters() if not name.startswith(BACKBONE)]


class _FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that stays as it is: no gradient, and `train()` does not reach it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.requires_grad_(False)
        self.train(False)

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


class _Classifier(nn.Module):
    """Atrous spatial pyramid pooling as in DeepLab-v2, without the fully connected layers: a sum of convolutions."""

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
        first, *others = self.conv2d_list
        result: Tensor = first(x)
        for convolution in others:
            result = result + convolution(x)
        return result


def _stage(
    inputs: int,
    planes: int,
    blocks: int,
    *,
    norm: type[nn.BatchNorm2d],
    origin: Origin,
    stride: int = 1,
    dilation: int = 1,
) -> nn.Sequential:
    strides = (1, stride) if origin == "torchvision" else (stride, 1)
    # Half the dilation stands for the stride of this stage, which came before the first 3x3 or in it.
    first = max(1, dilation // 2) if origin == "torchvision" else dilation
    return nn.Sequential(
        _Bottleneck(inputs, planes, norm=norm, strides=strides, dilation=first),
        *(_Bottleneck(4 * planes, planes, norm=norm, strides=(1, 1), dilation=dilation) for _ in range(blocks - 1)),
    )


def preprocessing(origin: Origin) -> tuple[Tensor, Tensor]:
    """Gain and offset `[3, 1, 1]` that take the trainer's RGB to the origin's units, in RGB order still."""
    if origin == "torchvision":
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        gain, offset = 0.25 / deviation, (0.5 - mean) / deviation
    else:
        mean = torch.tensor([122.67891434, 116.66876762, 104.00698793])
        gain, offset = torch.full((3,), 255 * 0.25), 255 * 0.5 - mean
    return gain[:, None, None], offset[:, None, None]


def load_pretrained(model: DeepLabV2, file: Path, *, classifier: bool = True) -> Pretrained:
    """Load a state dict of torchvision's ResNet, or of a DeepLab-v2 with its names, taken for the model's origin.

    All or nothing: a file that is refused leaves the model as it was. No code in the file is run. A prefix `module.`,
    `Scale.` or both that every key has is taken off. A file without a classifier leaves the model's as it is, as is
    batch norm's `num_batches_tracked`, which plays no part; both are reported as missing.

    Args:
        model: of the file's depth and origin.
        file: written by `torch.save`.
        classifier: load the classifiers too where the file has them; else they are left over.

    Raises:
        InputError: the file is no state dict, a weight of the backbone or a part of a classifier is missing, the
            backbone is a larger one, or a shape is another.
    """
    weights, prefix = _read(file)
    own = model.state_dict()
    wanted = [name for name in own if classifier or name.startswith(BACKBONE)]
    missing = [name for name in own if name not in weights or name not in wanted]
    backbone = [name for name in missing if name.startswith(BACKBONE) and not name.endswith(".num_batches_tracked")]
    if backbone:
        raise InputError(
            f"expected {file} to hold all of the backbone of depth {model.depth}, got no {_some(backbone)}"
        )
    left_over = [name for name in weights if name not in wanted]
    unknown = [name for name in left_over if name.startswith(BACKBONE)]
    if unknown:
        raise InputError(
            f"expected {file} to hold the backbone of depth {model.depth} and no more of it, got {_some(unknown)}"
        )
    for name in wanted:
        if name in weights and weights[name].shape != own[name].shape:
            hint = "" if name.startswith(BACKBONE) else "; network.init_classifier false takes the backbone alone"
            raise InputError(
                f"expected {name} in {file} of shape {list(own[name].shape)}, got {list(weights[name].shape)}{hint}"
            )
    for head in ("layer5.", "layer6."):
        parts = [name for name in wanted if name.startswith(head)]
        absent = [name for name in missing if name in parts]
        if 0 < len(absent) < len(parts):
            raise InputError(
                f"expected {file} to hold all of the classifier {head[:-1]} or none, got no {_some(absent)}"
            )
    loaded = [name for name in own if name not in missing]
    model.load_state_dict({name: weights[name] for name in loaded}, strict=False)
    return Pretrained(str(file), model.origin, prefix, tuple(loaded), tuple(missing), tuple(left_over))


def _read(file: Path) -> tuple[dict[str, Tensor], str]:
    """A state dict, and the prefix that was taken off its keys."""
    if not file.is_file():
        raise InputError(f"expected network.init to be a file of weights, got no file {file}")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types, for a damaged file and for one with code
        raise InputError(f"expected {file} to hold weights and no code, got a file that does not load so") from error
    if not isinstance(state, dict) or not all(_is_entry(*item) for item in state.items()):
        raise InputError(f"expected {file} to be a state dict, names to tensors, got {_contents(state)}")
    prefix = ""
    for part in ("module.", "Scale."):
        if state and all(name.startswith(prefix + part) for name in state):
            prefix += part
    return {name[len(prefix) :]: tensor for name, tensor in state.items()}, prefix


def _is_entry(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _contents(state: object) -> str:
    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    name, value = next(item for item in state.items() if not _is_entry(*item))
    return f"a {type(value).__name__} under {name!r}"


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
