"""AdaptSegNet's loop (Tsai et al. 2018, arXiv 1802.10349), with semantic-level alignment added.

Each of two output levels has a discriminator. The segmenter's step runs with the discriminators frozen. The
discriminators' step follows, on detached outputs. Each step takes one image of each kind, and the rates decay
polynomially. A few target images have labels. We wrote the program from the paper, with a small network on random
images. Lines that end in `# +` are added. The line that ends in `# check` logs the figures.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import semshift  # +

CLASSES, CHANNELS = 4, 32
COLOURS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])


def load(domain: str, count: int = 1) -> tuple[Tensor, Tensor]:
    """Blocks of colours `[B, 3, 32, 48]` with labels `[B, 32, 48]`; the target's colours are mixed."""
    labels = torch.randint(0, CLASSES, (count, 4, 6)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    images = COLOURS[labels].movedim(-1, 1) + 0.2 * torch.randn(count, 3, 32, 48)
    return (images if domain == "source" else 0.6 * images.roll(1, 1) + 0.4 * images), labels


class Segmenter(nn.Module):
    """A backbone with an output level on each of its last two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, CHANNELS, 3, 2, 1), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU())
        self.auxiliary, self.main = nn.Conv2d(CHANNELS, CLASSES, 1), nn.Conv2d(CHANNELS, CLASSES, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of both levels, at the images' size."""
        middle = self.stages(images)
        deep = self.last(middle)
        up = nn.Upsample(images.shape[-2:], mode="bilinear", align_corners=True)
        # - return up(self.auxiliary(middle)), up(self.main(deep))
        return up(self.auxiliary(middle)), up(self.main(deep)), deep  # +


def discriminator() -> nn.Module:
    """Five strided convolutions over an output map, narrower than the paper's."""
    widths = [CLASSES, 4, 8, 16, 32, 1]
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:]):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


def bce(logits: Tensor, label: float) -> Tensor:
    """Binary cross-entropy towards one label."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def supervised(maps: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Cross-entropy of both levels."""
    return 0.1 * F.cross_entropy(maps[0], labels) + F.cross_entropy(maps[1], labels)


def train(steps: int = 100) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Train. Returns the network and the alignment's figures at every step."""
    torch.manual_seed(0)
    log: list[dict[str, Tensor]] = []
    labelled = [load("target") for _ in range(8)]
    model = Segmenter()
    discriminators = nn.ModuleDict({"auxiliary": discriminator(), "main": discriminator()})
    sgd = torch.optim.SGD(model.parameters(), 0.005, momentum=0.9, weight_decay=5e-4)
    adam = torch.optim.Adam(discriminators.parameters(), 3e-3, betas=(0.9, 0.99))
    align = semshift.SemanticAlignment(CHANNELS, CLASSES, align_corners=True)  # +
    adam.add_param_group({"params": align.parameters(), "lr": 3e-3})  # +
    for step in range(steps):
        for each, rate in ((sgd, 0.005), (adam, 3e-3)):
            each.param_groups[0]["lr"] = rate * (1 - step / steps) ** 0.9
            each.zero_grad()

        # Segmenter step, with the discriminators frozen: source, labelled target, then unlabelled target images.
        discriminators.requires_grad_(False)
        images_s, labels_s = load("source")
        maps_s = model(images_s)
        supervised(maps_s, labels_s).backward()

        images_l, labels_l = labelled[step % len(labelled)]
        maps_l = model(images_l)
        loss = supervised(maps_l, labels_l)
        losses = align(maps_s[-1], labels_s, maps_l[-1], labels_l)  # +
        loss += 0.03 * losses.confusion + losses.discriminator  # +
        loss.backward()

        images_u, _ = load("target")
        maps_t = model(images_u)
        loss = 0.0002 * bce(discriminators["auxiliary"](maps_t[0].softmax(1)), 1.0)
        loss += 0.001 * bce(discriminators["main"](maps_t[1].softmax(1)), 1.0)
        loss.backward()
        sgd.step()

        # Discriminator step, on detached outputs.
        discriminators.requires_grad_(True)
        loss = torch.zeros(())
        for name, map_s, map_t in zip(("auxiliary", "main"), maps_s, maps_t):
            loss += bce(discriminators[name](map_s.detach().softmax(1)), 1.0) / 2
            loss += bce(discriminators[name](map_t.detach().softmax(1)), 0.0) / 2
        loss.backward()
        adam.step()

        log.append(losses.figures)  # check
    return model, log


def features(model: Any, images: Tensor) -> Tensor:
    """The features that were aligned."""
    result: Tensor = model.last(model.stages(images))
    return result


def report(log: list[dict[str, Tensor]]) -> None:
    """Print the mean of each figure over every twenty steps."""
    for step in range(0, len(log), 20):
        rows = log[step : step + 20]
        means = {name: torch.stack([row[name] for row in rows]).nanmean().item() for name in rows[0]}
        print(f"steps {step:2} on: " + ", ".join(f"{name} {mean:.2f}" for name, mean in means.items()))


if __name__ == "__main__":
    report(train()[1])
