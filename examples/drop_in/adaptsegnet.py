"""AdaptSegNet's loop (Tsai et al. 2018, arXiv 1802.10349), with semantic-level alignment added.

Two output levels with a discriminator each; the segmenter's step with the discriminators frozen, then theirs on
detached outputs; one image of each kind a step; polynomial decay. A few target images have labels. Written from the
paper, with a small network on random images. Lines that end in `# +` are added, `# check` watches them.
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
    semshift.labels.check_labels(labels, CLASSES)  # +
    images = COLOURS[labels].movedim(-1, 1) + 0.2 * torch.randn(count, 3, 32, 48)
    return (images if domain == "source" else 0.6 * images.roll(1, 1) + 0.4 * images), labels


class Segmenter(nn.Module):
    """A backbone with an output level on each of its last two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, CHANNELS, 3, 2, 1), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU())
        self.auxiliary, self.main = nn.Conv2d(CHANNELS, CLASSES, 1), nn.Conv2d(CHANNELS, CLASSES, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both levels, at the images' size."""
        middle = self.stages(images)
        deep = self.last(middle)
        self.features = deep  # +
        size = images.shape[-2:]
        return F.interpolate(self.auxiliary(middle), size), F.interpolate(self.main(deep), size)


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


def supervised(maps: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy of both levels."""
    return 0.1 * F.cross_entropy(maps[0], labels) + F.cross_entropy(maps[1], labels)


def train(steps: int = 100) -> tuple[nn.Module, list[tuple[float, float, float]]]:
    """Train; returns the network, and step by step the critic's accuracy on both domains and their distance."""
    torch.manual_seed(0)
    log: list[tuple[float, float, float]] = []
    labelled = [load("target") for _ in range(8)]
    model = Segmenter()
    critics = nn.ModuleDict({"auxiliary": discriminator(), "main": discriminator()})
    critics["semantic"] = semshift.discriminators.PrototypeDiscriminator(CHANNELS, CLASSES)  # +
    optimiser = torch.optim.SGD(model.parameters(), 0.005, momentum=0.9, weight_decay=5e-4)
    critic_optimiser = torch.optim.Adam(critics.parameters(), 3e-3, betas=(0.9, 0.99))
    for step in range(steps):
        for player, rate in ((optimiser, 0.005), (critic_optimiser, 3e-3)):
            player.param_groups[0]["lr"] = rate * (1 - step / steps) ** 0.9
            player.zero_grad()

        # The segmenter, with the discriminators frozen: source, then target images with labels, then without.
        critics.requires_grad_(False)
        images, labels = load("source")
        maps_s = model(images)
        supervised(maps_s, labels).backward()
        source = semshift.pooling.class_sums(model.features, labels, CLASSES, resample="bilinear")  # +

        images, labels = labelled[step % len(labelled)]
        loss = supervised(model(images), labels)
        target = semshift.pooling.class_sums(model.features, labels, CLASSES, resample="bilinear")  # +
        both = source.present & target.present  # +
        loss += 0.3 * semshift.losses.confusion_loss(critics["semantic"](target.means), weight=both)  # +
        loss.backward()

        images, _ = load("target")
        maps_t = model(images)
        loss = 0.0002 * bce(critics["auxiliary"](maps_t[0].softmax(1)), 1.0)
        loss += 0.001 * bce(critics["main"](maps_t[1].softmax(1)), 1.0)
        loss.backward()
        optimiser.step()

        # The discriminators, on detached outputs.
        critics.requires_grad_(True)
        loss = torch.zeros(())
        for name, map_s, map_t in zip(("auxiliary", "main"), maps_s, maps_t):
            loss += bce(critics[name](map_s.detach().softmax(1)), 1.0) / 2
            loss += bce(critics[name](map_t.detach().softmax(1)), 0.0) / 2
        logits = critics["semantic"](source.means.detach()), critics["semantic"](target.means.detach())  # +
        loss += semshift.losses.discriminator_loss(*logits, source_weight=both, target_weight=both)  # +
        loss.backward()
        critic_optimiser.step()

        accuracy = semshift.health.domain_accuracy(*logits, source_weight=both, target_weight=both)  # check
        distance = semshift.health.prototype_distance(source.means, target.means, weight=both).nanmean()  # check
        log.append((accuracy.source.item(), accuracy.target.item(), distance.item()))  # check
    return model, log


def features(model: Any, images: Tensor) -> Tensor:
    """What was aligned."""
    result: Tensor = model.last(model.stages(images))
    return result


if __name__ == "__main__":
    _, log = train()
    for step in range(0, len(log), 20):
        right_s, right_t, apart = torch.tensor(log[step : step + 20]).nanmean(0).tolist()
        print(f"steps {step:2} on: critic right on {right_s:.2f} of source, {right_t:.2f} of target; {apart:.2f} apart")
