"""SegFormer (Xie et al. 2021, arXiv 2105.15203) from Hugging Face Transformers; nothing is downloaded."""

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor, nn

from examples.workbench.errors import InputError
from examples.workbench.networks.segmentation import FeatureLayer, Pretrained, Segmentation, Segmenter

if TYPE_CHECKING:
    from transformers import SegformerConfig

__all__ = ["SegFormer", "load_segformer"]


class SegFormer(Segmenter):
    """A hierarchical transformer with strides 4 to 32, followed by a decoder with stride 4.

    Args:
        config: a `config.json` of Transformers, or the folder that contains it; by default B0, the paper's smallest.
        feature_layer: `"encoder"` returns the features of the last stage (stride 32). `"decoder"` returns those of the
            layer before the classifier (stride 4).
    """

    def __init__(
        self, num_classes: int, *, config: Path | None = None, feature_layer: FeatureLayer = "encoder"
    ) -> None:
        super().__init__()
        network = _transformers().SegformerForSemanticSegmentation(_config(config, num_classes))
        encoder, decoder = network.config.hidden_sizes[-1], network.config.decoder_hidden_size
        self.configuration = network.config.to_json_string(use_diff=False)
        self.feature_layer = feature_layer
        self.feature_channels = encoder if feature_layer == "encoder" else decoder
        self.encoder: nn.Module = network.segformer
        self.decoder: nn.Module = network.decode_head
        self.classifier: nn.Module = network.decode_head.classifier
        network.decode_head.classifier = nn.Identity()
        self.register_normalisation("segformer")

    def forward(self, images: Tensor) -> Segmentation:
        """Segment images `[B, 3, H, W]`. The logits are `[B, K, H/4, W/4]`."""
        stages = self.encoder(images * self.gain + self.offset, output_hidden_states=True).hidden_states
        decoded = self.decoder(stages)
        features = stages[-1] if self.feature_layer == "encoder" else decoded
        return Segmentation(features, self.classifier(decoded))


def load_segformer(model: SegFormer, folder: Path, *, classifier: bool = True) -> Pretrained:
    """Load a folder that `save_pretrained` wrote for a SegFormer with or without a decoder.

    A refused folder leaves the model unchanged, and no code in a folder is run. The last layer stays unchanged if
    `classifier` is false, or if the folder's last layer has a different number of classes.
    """
    if not folder.is_dir():
        raise InputError(f"expected network.init to be a folder of weights, got {folder}, which is not a folder")
    own = model.state_dict()
    transformers = _transformers()
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        network, info = transformers.SegformerForSemanticSegmentation.from_pretrained(
            folder,
            config=_config(folder, len(own["classifier.bias"])),
            ignore_mismatched_sizes=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # Transformers raises many types, for damaged and for missing files
        raise InputError(f"expected {folder} to hold a SegFormer's weights: {error}") from error
    finally:
        transformers.logging.set_verbosity(level)
    unfit = {str(name) for name, *_ in info["mismatched_keys"]} | set(info["missing_keys"])
    if encoder := sorted(name for name in unfit if name.startswith("segformer.")):
        raise InputError(f"expected {folder} to hold the whole encoder as configured, got no fitting {encoder[0]}")
    weights = {}
    for name, tensor in network.state_dict().items():
        if name not in unfit and (classifier or not name.startswith("decode_head.classifier.")):
            own_name = name.replace("decode_head.classifier.", "classifier.").replace("decode_head.", "decoder.")
            weights[own_name.replace("segformer.", "encoder.")] = tensor
    if other := [name for name, tensor in weights.items() if name not in own or own[name].shape != tensor.shape]:
        raise InputError(f"expected {folder} to fit the network's configuration, got a different {other[0]}")
    model.load_state_dict(weights, strict=False)
    missing = tuple(name for name in own if name not in weights)
    return Pretrained(str(folder), "segformer", "", tuple(weights), missing, tuple(sorted(info["unexpected_keys"])))


def _config(path: Path | None, num_classes: int) -> "SegformerConfig":
    config_class = _transformers().SegformerConfig
    config: SegformerConfig = config_class()
    if path is not None:
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"expected network.config or network.init to name a config.json, got no file {file}")
        try:
            config = config_class.from_json_file(str(file))
        except Exception as error:
            raise InputError(f"expected {file} to be a configuration of Transformers: {error}") from error
        if config.model_type != "segformer":
            raise InputError(f"expected {file} to configure a segformer, got a {config.model_type}")
    config.num_labels = num_classes
    return config


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise InputError("network.name segformer needs transformers: pip install transformers") from error
    return transformers
