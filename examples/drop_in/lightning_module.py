"""A LightningModule with manual optimisation, with semantic-level alignment added.

The module has an output-level discriminator and an optimiser for each player; the new critic joins the discriminators.
Lines that end in `# +` are added, `# check` watches them.
"""

import warnings
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import semshift  # +

CLASSES, CHANNELS = 4, 32
COLOURS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])


def load(domain: str, count: int = 1) -> tuple[Tensor, Tensor]:
    """Blocks of colours `[B, 3, 32, 48]` with labels `[B, 32, 48]`; the target's colours are mixed."""
    labels = torch.randint(0, CLASSES, (count, 4, 6)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    semshift.labels.check_labels(labels, CLASSES)  # +
    images = COLOURS[labels].movedim(-1, 1) + 0.2 * torch.randn(count, 3, 32, 48)
    return (images if domain == "source" else 0.6 * images.roll(1, 1) + 0.4 * images), labels


def discriminator() -> nn.Module:
    """Five strided convolutions over an output map."""
    widths = [CLASSES, 4, 8, 16, 32, 1]
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:]):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


def bce(logits: Tensor, label: float) -> Tensor:
    """Binary cross-entropy towards one label."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


class Module(lightning.LightningModule):
    """Cross-entropy on source and on labelled target images, and a discriminator over output maps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.figures: list[tuple[float, float, float]] = []
        self.backbone = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, CHANNELS, 3, 2, 1), nn.ReLU()),
            *(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU()),
        )
        self.head = nn.Conv2d(CHANNELS, CLASSES, 1)
        self.critics = nn.ModuleDict({"output": discriminator()})
        self.critics["semantic"] = semshift.discriminators.PrototypeDiscriminator(CHANNELS, CLASSES)  # +

    def configure_optimizers(self) -> Any:
        """One optimiser for each player."""
        segmenter = [*self.backbone.parameters(), *self.head.parameters()]
        return torch.optim.AdamW(segmenter, 5e-4), torch.optim.Adam(self.critics.parameters(), 3e-3)

    def training_step(self, batch: dict[str, tuple[Tensor, Tensor]], _: int) -> None:
        """Both players' steps."""
        optimiser, critic_optimiser = self.optimizers()  # type: ignore[attr-defined]  # because one would be no list
        (images_s, labels_s), (images_t, labels_t) = batch["source"], batch["target"]
        features_s, features_t = self.backbone(images_s), self.backbone(images_t)
        maps_s, maps_t = (F.interpolate(self.head(f), size=(32, 48)) for f in (features_s, features_t))

        self.toggle_optimizer(optimiser)
        loss = F.cross_entropy(maps_s, labels_s) + F.cross_entropy(maps_t, labels_t)
        loss = loss + 0.001 * bce(self.critics["output"](maps_t.softmax(1)), 1.0)
        source = semshift.pooling.class_sums(features_s, labels_s, CLASSES, resample="bilinear")  # +
        target = semshift.pooling.class_sums(features_t, labels_t, CLASSES, resample="bilinear")  # +
        both = source.present & target.present  # +
        loss = loss + 1.0 * semshift.losses.confusion_loss(self.critics["semantic"](target.means), weight=both)  # +
        optimiser.zero_grad()
        self.manual_backward(loss)
        optimiser.step()
        self.untoggle_optimizer(optimiser)

        maps_s, maps_t = (maps.detach().softmax(1) for maps in (maps_s, maps_t))
        loss = (bce(self.critics["output"](maps_s), 1.0) + bce(self.critics["output"](maps_t), 0.0)) / 2
        logits = [self.critics["semantic"](pooled.means.detach()) for pooled in (source, target)]  # +
        loss = loss + semshift.losses.discriminator_loss(*logits, source_weight=both, target_weight=both)  # +
        critic_optimiser.zero_grad()
        self.manual_backward(loss)
        critic_optimiser.step()

        accuracy = semshift.health.domain_accuracy(*logits, source_weight=both, target_weight=both)  # check
        distance = semshift.health.prototype_distance(source.means, target.means, weight=both).nanmean()  # check
        self.figures.append((accuracy.source.item(), accuracy.target.item(), distance.item()))  # check


def train(steps: int = 100, **options: Any) -> tuple[Module, list[tuple[float, float, float]]]:
    """Train; returns the network, and step by step the critic's accuracy on both domains and their distance."""
    torch.manual_seed(0)
    loaders = {
        "source": DataLoader(TensorDataset(*load("source", 4 * steps)), batch_size=4),
        "target": DataLoader(TensorDataset(*load("target", 8)), batch_size=4),
    }
    module = Module()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet, **options)
    with warnings.catch_warnings():
        # Lightning would have more worker processes than so few images are worth.
        warnings.simplefilter("ignore")
        trainer.fit(module, loaders)
    return module, module.figures


def features(model: Any, images: Tensor) -> Tensor:
    """What was aligned."""
    result: Tensor = model.backbone(images)
    return result


if __name__ == "__main__":
    _, log = train()
    for step in range(0, len(log), 20):
        right_s, right_t, apart = torch.tensor(log[step : step + 20]).nanmean(0).tolist()
        print(f"steps {step:2} on: critic right on {right_s:.2f} of source, {right_t:.2f} of target; {apart:.2f} apart")
