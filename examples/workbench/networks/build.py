"""The segmenter of a run, built from its settings."""

from pathlib import Path

import torch

from examples.workbench.networks.deeplab import DeepLabV2, load_pretrained
from examples.workbench.networks.efficientnet import EfficientNetLite0, load_efficientnet, packaged_weights
from examples.workbench.networks.segformer import SegFormer, load_segformer
from examples.workbench.networks.segmentation import Pretrained, Segmenter
from examples.workbench.networks.small import SmallSegmenter
from examples.workbench.settings import Settings

__all__ = ["build_segmenter", "dtype_of", "load_init"]


def dtype_of(settings: Settings) -> torch.dtype:
    """The dtype of weights and images outside autocast."""
    return torch.float64 if settings.precision == "64-true" else torch.float32


def build_segmenter(settings: Settings, configuration: Path | None = None) -> Segmenter:
    """The segmenter with random weights, which depend only on the seed; `load_init` loads pretrained weights.

    Args:
        settings: the settings of the run.
        configuration: only for segformer: a `config.json` that replaces the one in `network.init` or `network.config`.
    """
    torch.manual_seed(settings.seed)
    network, classes = settings.network, len(settings.data.classes)
    if network.name == "small":
        return SmallSegmenter(classes, width=network.width, feature_layer=network.feature_layer)
    if network.name == "efficientnet-lite0":
        return EfficientNetLite0(classes, output_stride=network.output_stride, feature_layer=network.feature_layer)
    if network.name == "segformer":
        config = configuration or network.init or network.config
        return SegFormer(classes, config=Path(config) if config else None, feature_layer=network.feature_layer)
    return DeepLabV2(
        classes,
        depth=network.depth,
        aspp_dilations=network.aspp_dilations,
        origin=network.origin,
        freeze_batch_norm=network.frozen_batch_norm,
        auxiliary=network.auxiliary,
    )


def load_init(settings: Settings, segmenter: Segmenter) -> Pretrained | None:
    """Load `network.init`, or the package's weights, into the segmenter; None if the settings name no weights."""
    network = settings.network
    if isinstance(segmenter, EfficientNetLite0) and network.pretrained:
        return load_efficientnet(segmenter, packaged_weights())
    if network.init is None:
        return None
    if isinstance(segmenter, SegFormer):
        return load_segformer(segmenter, Path(network.init), classifier=network.init_classifier)
    assert isinstance(segmenter, DeepLabV2)
    return load_pretrained(segmenter, Path(network.init), classifier=network.init_classifier)
