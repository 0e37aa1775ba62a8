"""Features by a forward hook, for models that one may not edit, with semantic-level alignment added.

Stand-ins with the module structure of torchvision, segmentation-models-pytorch and mmsegmentation; `LAYER` names the
layer in each. The gradient is turned round at the target's prototypes, so one backward and one optimiser serve both
players. Lines that end in `# +` are added, `# check` watches them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import semshift  # +

CLASSES, CHANNELS = 4, 32
COLOURS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
LAYER = {
    "torchvision": "backbone.layer4",
    "segmentation-models-pytorch": "encoder.layer4",
    "mmsegmentation": "backbone.layer4",
}


def load(domain: str, count: int = 4) -> tuple[Tensor, Tensor]:
    """Blocks of colours `[B, 3, 32, 48]` with labels `[B, 32, 48]`; the target's colours are mixed."""
    labels = torch.randint(0, CLASSES, (count, 4, 6)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    semshift.labels.check_labels(labels, CLASSES)  # +
    images = COLOURS[labels].movedim(-1, 1) + 0.2 * torch.randn(count, 3, 32, 48)
    return (images if domain == "source" else 0.6 * images.roll(1, 1) + 0.4 * images), labels


class Backbone(nn.Module):
    """A small ResNet's shape: a stem and four named layers."""

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
    """As `torchvision.models.segmentation`: a dictionary goes in between and comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.classifier = Backbone(), nn.Conv2d(CHANNELS, CLASSES, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": F.interpolate(self.classifier(self.backbone(images)[-1]), images.shape[-2:])}


class SegmentationModelsPytorch(nn.Module):
    """As `segmentation_models_pytorch`: encoder, decoder and head, logits at the images' size."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Backbone(), nn.Upsample(scale_factor=4)
        self.segmentation_head = nn.Conv2d(CHANNELS, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.segmentation_head(self.decoder(self.encoder(images)[-1]))
        return logits


class Mmsegmentation(nn.Module):
    """As `mmseg.models.EncoderDecoder`: with `mode="tensor"` it gives logits at the features' size."""

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


def cross_entropy(output: Any, labels: Tensor) -> Tensor:
    """Of what any of these models returns."""
    logits = output["out"] if isinstance(output, dict) else output
    return F.cross_entropy(F.interpolate(logits, labels.shape[-2:]), labels)


def train(steps: int = 100, library: str = "torchvision") -> tuple[nn.Module, list[tuple[float, float, float]]]:
    """Train; returns the network, and step by step the critic's accuracy on both domains and their distance."""
    torch.manual_seed(0)
    log: list[tuple[float, float, float]] = []
    labelled = [load("target") for _ in range(2)]
    model: Any = MODELS[library]()
    optimiser = torch.optim.AdamW(model.parameters(), 5e-4)
    layer = model.get_submodule(LAYER[library])
    layer.register_forward_hook(lambda module, inputs, output: setattr(model, "seen", output))  # +
    critic = semshift.discriminators.PrototypeDiscriminator(CHANNELS, CLASSES)  # +
    optimiser.add_param_group({"params": critic.parameters(), "lr": 3e-3})  # +
    for step in range(steps):
        images, labels = load("source")
        loss = cross_entropy(model(images), labels)
        source = semshift.pooling.class_sums(model.seen, labels, CLASSES, resample="bilinear")  # +
        images, labels = labelled[step % len(labelled)]
        loss = loss + cross_entropy(model(images), labels)
        target = semshift.pooling.class_sums(model.seen, labels, CLASSES, resample="bilinear")  # +
        both = source.present & target.present  # +
        logits = critic(source.means.detach()), critic(semshift.losses.reverse_gradient(target.means, scale=1.0))  # +
        loss = loss + semshift.losses.discriminator_loss(*logits, source_weight=both, target_weight=both)  # +
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

        accuracy = semshift.health.domain_accuracy(*logits, source_weight=both, target_weight=both)  # check
        distance = semshift.health.prototype_distance(source.means, target.means, weight=both).nanmean()  # check
        log.append((accuracy.source.item(), accuracy.target.item(), distance.item()))  # check
    return model, log


def features(model: Any, images: Tensor) -> Tensor:
    """What was aligned."""
    backbone = model.encoder if hasattr(model, "encoder") else model.backbone
    result: Tensor = backbone(images)[-1]
    return result


def report(log: list[tuple[float, float, float]]) -> None:
    """Means over twenty steps."""
    for step in range(0, len(log), 20):
        right_s, right_t, apart = torch.tensor(log[step : step + 20]).nanmean(0).tolist()
        print(f"steps {step:2} on: critic right on {right_s:.2f} of source, {right_t:.2f} of target; {apart:.2f} apart")


if __name__ == "__main__":
    for library in MODELS:
        print(library)
        report(train(library=library)[1])
