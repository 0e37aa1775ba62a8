"""A LightningModule under automatic optimisation, with semantic-level alignment added.

The module has one optimiser with parameter groups, and the discriminator gets its own group. Lines that end in `# +`
are added. The line that ends in `# check` logs the figures.
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
    images = COLOURS[labels].movedim(-1, 1) + 0.2 * torch.randn(count, 3, 32, 48)
    return (images if domain == "source" else 0.6 * images.roll(1, 1) + 0.4 * images), labels


class Module(lightning.LightningModule):
    """Cross-entropy on source and on labelled target images."""

    def __init__(self) -> None:
        super().__init__()
        self.figures: list[dict[str, Tensor]] = []
        self.backbone = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, CHANNELS, 3, 2, 1), nn.ReLU()),
            *(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU()),
        )
        self.head = nn.Conv2d(CHANNELS, CLASSES, 1)
        self.align = semshift.SemanticAlignment(CHANNELS, CLASSES)  # +

    def configure_optimizers(self) -> Any:
        """One optimiser, with a higher rate for the head."""
        groups = [{"params": self.backbone.parameters(), "lr": 5e-4}]
        groups.append({"params": self.head.parameters(), "lr": 1e-3})
        groups.append({"params": self.align.parameters(), "lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0})  # +
        return torch.optim.AdamW(groups)

    def training_step(self, batch: dict[str, tuple[Tensor, Tensor]], _: int) -> Tensor:
        """The loss of one batch of both domains."""
        (images_s, labels_s), (images_t, labels_t) = batch["source"], batch["target"]
        features_s, features_t = self.backbone(images_s), self.backbone(images_t)
        up = nn.Upsample((32, 48))
        maps_s, maps_t = up(self.head(features_s)), up(self.head(features_t))
        loss: Tensor = F.cross_entropy(maps_s, labels_s) + F.cross_entropy(maps_t, labels_t)
        losses = self.align(features_s, labels_s, features_t, labels_t)  # +
        loss = loss + 1.0 * losses.confusion + losses.discriminator  # +
        self.figures.append(losses.figures)  # check
        return loss


def train(steps: int = 100, **options: Any) -> tuple[Module, list[dict[str, Tensor]]]:
    """Train. Returns the network and the alignment's figures at every step."""
    torch.manual_seed(0)
    loaders = {
        "source": DataLoader(TensorDataset(*load("source", 4 * steps)), batch_size=4),
        "target": DataLoader(TensorDataset(*load("target", 8)), batch_size=4),
    }
    module = Module()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet, **options)
    with warnings.catch_warnings():
        # Lightning asks for more worker processes, which so few images do not need.
        warnings.simplefilter("ignore")
        trainer.fit(module, loaders)
    return module, module.figures


def features(model: Any, images: Tensor) -> Tensor:
    """The features that were aligned."""
    result: Tensor = model.backbone(images)
    return result


def report(log: list[dict[str, Tensor]]) -> None:
    """Print the mean of each figure over every twenty steps."""
    for step in range(0, len(log), 20):
        rows = log[step : step + 20]
        means = {name: torch.stack([row[name] for row in rows]).nanmean().item() for name in rows[0]}
        print(f"steps {step:2} on: " + ", ".join(f"{name} {mean:.2f}" for name, mean in means.items()))


if __name__ == "__main__":
    report(train()[1])
