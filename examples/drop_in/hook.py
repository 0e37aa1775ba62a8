"""Features from a forward hook, for models that you may not edit, with semantic-level alignment added.

The models have the module structure of torchvision, segmentation-models-pytorch and mmsegmentation. `LAYER` names the
layer in each model, and `take` picks the map from the layer's output. One backward and one optimiser serve the
segmenter and the discriminator. Lines that end in `# +` are added. The line that ends in `# check` logs the figures.
"""

from collections import deque  # +
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import semshift  # +

CLASSES, CHANNELS = 4, 32
COLOURS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
LAYER = {
    "torchvision": "backbone.layer4",
    "segmentation-models-pytorch": "encoder",
    "mmsegmentation": "backbone.layer4",
}


def load(domain: str, count: int = 4) -> tuple[Tensor, Tensor]:
    """Blocks of colours `[B, 3, 32, 48]` with labels `[B, 32, 48]`; the target's colours are mixed."""
    labels = torch.randint(0, CLASSES, (count, 4, 6)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    images = COLOURS[labels].movedim(-1, 1) + 0.2 * torch.randn(count, 3, 32, 48)
    return (images if domain == "source" else 0.6 * images.roll(1, 1) + 0.4 * images), labels


class Backbone(nn.Module):
    """A small backbone with a ResNet's modules: a stem and four named layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.layer1 = nn.Sequential(nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.layer2 = nn.Sequential(nn.ReLU(), nn.Conv2d(16, CHANNELS, 3, 2, 1))
        self.layer3 = nn.Identity()
        self.layer4 = nn.Sequential(nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU())

    def forward(self, images: Tensor) -> list[Tensor]:
        """The maps of all layers."""
        maps = [self.stem(images)]
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps.append(layer(maps[-1]))
        return maps


class Torchvision(nn.Module):
    """As in `torchvision.models.segmentation`: the model returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.classifier = Backbone(), nn.Conv2d(CHANNELS, CLASSES, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": F.interpolate(self.classifier(self.backbone(images)[-1]), images.shape[-2:])}


class SegmentationModelsPytorch(nn.Module):
    """As in `segmentation_models_pytorch`: encoder, decoder and head. It returns logits at the images' size."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Backbone(), nn.Upsample(scale_factor=4)
        self.segmentation_head = nn.Conv2d(CHANNELS, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.segmentation_head(self.decoder(self.encoder(images)[-1]))
        return logits


class Mmsegmentation(nn.Module):
    """As in `mmseg.models.EncoderDecoder`: with `mode="tensor"` it returns logits at the features' size."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.decode_head = Backbone(), nn.Conv2d(CHANNELS, CLASSES, 1)

    def forward(self, inputs: Tensor, data_samples: None = None, mode: str = "tensor") -> Tensor:
        logits: Tensor = self.decode_head(self.backbone(inputs)[-1])
        return logits


MODELS = {
    "torchvision": Torchvision,
    "segmentation-models-pytorch": SegmentationModelsPytorch,
    "mmsegmentation": Mmsegmentation,
}


def take(output: Any) -> Tensor:
    """The layer's output, or the last map where the layer returns a list of maps."""
    result: Tensor = output[-1] if isinstance(output, list) else output
    return result


def cross_entropy(output: Any, labels: Tensor) -> Tensor:
    """Cross-entropy of the output of any of these models."""
    logits = output["out"] if isinstance(output, dict) else output
    return F.cross_entropy(F.interpolate(logits, labels.shape[-2:]), labels)


def train(steps: int = 100, library: str = "torchvision") -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Train. Returns the network and the alignment's figures at every step."""
    torch.manual_seed(0)
    log: list[dict[str, Tensor]] = []
    labelled = [load("target") for _ in range(2)]
    model: Any = MODELS[library]()
    adam = torch.optim.AdamW(model.parameters(), 5e-4)
    layer = model.get_submodule(LAYER[library])
    kept: deque[Tensor] = deque(maxlen=2)  # +
    layer.register_forward_hook(lambda m, _, x: kept.append(take(x)) if m is layer else None)  # +
    align = semshift.SemanticAlignment(CHANNELS, CLASSES)  # +
    adam.add_param_group({"params": align.parameters(), "lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0})  # +
    for step in range(steps):
        images_s, labels_s = load("source")
        loss = cross_entropy(model(images_s), labels_s)
        images_t, labels_t = labelled[step % len(labelled)]
        loss = loss + cross_entropy(model(images_t), labels_t)
        losses = align(kept[0], labels_s, kept[1], labels_t)  # +
        loss = loss + 1.0 * losses.confusion + losses.discriminator  # +
        adam.zero_grad()
        loss.backward()
        adam.step()

        log.append(losses.figures)  # check
    return model, log


def features(model: Any, images: Tensor) -> Tensor:
    """The features that were aligned."""
    backbone = model.encoder if hasattr(model, "encoder") else model.backbone
    result: Tensor = backbone(images)[-1]
    return result


def report(log: list[dict[str, Tensor]]) -> None:
    """Print the mean of each figure over every twenty steps."""
    for step in range(0, len(log), 20):
        rows = log[step : step + 20]
        means = {name: torch.stack([row[name] for row in rows]).nanmean().item() for name in rows[0]}
        print(f"steps {step:2} on: " + ", ".join(f"{name} {mean:.2f}" for name, mean in means.items()))


if __name__ == "__main__":
    for library in MODELS:
        print(library)
        report(train(library=library)[1])
