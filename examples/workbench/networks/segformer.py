"""SegFormer (Xie et al. 2021, arXiv 2105.15203) from Hugging Face Transformers, never from the network."""

import logging
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from examples.workbench.errors import InputError
from examples.workbench.networks.deeplab import preprocessing
from examples.workbench.networks.segmentation import Pretrained, Segmentation, Segmenter

if TYPE_CHECKING:
    from transformers import SegformerConfig

__all__ = ["SegFormer", "load_segformer"]


class SegFormer(Segmenter):
    """A hierarchical transformer at strides 4 to 32 under a decoder at stride 4.

    Takes the trainer's images, `(rgb / 255 - 0.5) / 0.25`, and normalises them by ImageNet's mean and deviation, as
    the published weights want them.

    Args:
        num_classes: K, at least 2.
        config: a `config.json` of Transformers, or a folder that holds one; None for its defaults, which are the
            smallest of the paper, B0.
        feature_layer: which features are returned for pooling: `"encoder"` is the last stage (stride 32),
            `"decoder"` the layer under the classifier (stride 4).

    Raises:
        InputError: Transformers is not installed, or there is no such configuration.
    """

    gain: Tensor
    offset: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        config: Path | None = None,
        feature_layer: Literal["encoder", "decoder"] = "encoder",
    ) -> None:
        super().__init__()
        network = _transformers().SegformerForSemanticSegmentation(_config(config, num_classes))
        encoder, decoder = network.config.hidden_sizes[-1], network.config.decoder_hidden_size
        self.feature_layer = feature_layer
        self.feature_channels: int = encoder if feature_layer == "encoder" else decoder
        self.encoder: nn.Module = network.segformer
        self.decoder: nn.Module = network.decode_head
        self.classifier: nn.Module = network.decode_head.classifier
        network.decode_head.classifier = nn.Identity()
        gain, offset = preprocessing("torchvision")
        self.register_buffer("gain", gain, persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    def forward(self, images: Tensor) -> Segmentation:
        """Segment images `[B, 3, H, W]`: features and logits `[B, K, H/4, W/4]`."""
        stages = self.encoder(images * self.gain + self.offset, output_hidden_states=True).hidden_states
        decoded = self.decoder(stages)
        features = stages[-1] if self.feature_layer == "encoder" else decoded
        return Segmentation(features, self.classifier(decoded))

    def classifier_parameters(self) -> list[nn.Parameter]:
        """The parameters of the last layer."""
        return list(self.classifier.parameters())


def load_segformer(model: SegFormer, folder: Path, *, classifier: bool = True) -> Pretrained:
    """Load a folder that `save_pretrained` wrote, of a SegFormer with or without a decoder.

    All or nothing: a folder that is refused leaves the model as it was. No code in it is run.

    Args:
        model: of the folder's configuration.
        folder: with `config.json` and `model.safetensors`, or `pytorch_model.bin`.
        classifier: load the last layer too where it has the model's classes; else it is left over.

    Raises:
        InputError: there is nothing to load, or a weight of the encoder is missing or of another shape.
    """
    if not folder.is_dir():
        raise InputError(f"expected network.init to be a folder of weights, got no folder {folder}")
    transformers = _transformers()
    classes = sum(p.shape[0] for name, p in model.classifier.named_parameters() if name == "bias")
    quiet = logging.getLogger("transformers").level
    transformers.logging.set_verbosity_error()
    try:
        network, info = transformers.SegformerForSemanticSegmentation.from_pretrained(
            folder,
            config=_config(folder, classes),
            ignore_mismatched_sizes=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # of many types, for a damaged file and for one that is not there
        raise InputError(f"expected {folder} to hold a SegFormer's weights: {error}") from error
    finally:
        logging.getLogger("transformers").setLevel(quiet)
    unfit = {str(name) for name, *_ in info["mismatched_keys"]} | {str(name) for name in info["missing_keys"]}
    encoder = sorted(name for name in unfit if name.startswith("segformer."))
    if encoder:
        raise InputError(f"expected {folder} to hold all of the encoder as configured, got no fit {encoder[0]}")
    names = {"segformer.": "encoder.", "decode_head.classifier.": "classifier.", "decode_head.": "decoder."}
    weights = {
        _renamed(name, names): tensor
        for name, tensor in network.state_dict().items()
        if name not in unfit and (classifier or not name.startswith("decode_head.classifier."))
    }
    own = model.state_dict()
    other = [name for name, tensor in weights.items() if name not in own or own[name].shape != tensor.shape]
    if other:
        raise InputError(f"expected {folder} to be of the network's configuration, got another {other[0]}")
    model.load_state_dict(weights, strict=False)
    missing = tuple(name for name in own if name not in weights)
    return Pretrained(str(folder), "segformer", "", tuple(weights), missing, tuple(sorted(info["unexpected_keys"])))


def _renamed(name: str, names: dict[str, str]) -> str:
    old = next(old for old in names if name.startswith(old))
    return names[old] + name[len(old) :]


def _config(path: Path | None, num_classes: int) -> "SegformerConfig":
    config_class = _transformers().SegformerConfig
    default: SegformerConfig = config_class(num_labels=num_classes)
    if path is None:
        return default
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"expected network.config or network.init to hold a config.json, got no file {file}")
    try:
        config: SegformerConfig = config_class.from_json_file(str(file))
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
        raise InputError(
            "expected transformers for network.name segformer, got none: pip install transformers"
        ) from error
    return transformers
