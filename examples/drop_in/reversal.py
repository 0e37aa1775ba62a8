"""AdaptSegNet's structure in a single pass with gradient reversal, with semantic-level alignment added.

This is the loop of `adaptsegnet.py` with one loss and one backward. A layer between the segmenter and its
discriminators reverses the gradient (Ganin and Lempitsky 2015, arXiv 1409.7495). The alignment needs no reversal: its
two losses share no gradient, so the same backward serves both. Lines that end in `# +` are added. The line that ends in
`# check` logs the figures.
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
    """A backbone with an output level on each of its last two stages. It returns its features too."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, CHANNELS, 3, 2, 1), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU())
        self.auxiliary, self.main = nn.Conv2d(CHANNELS, CLASSES, 1), nn.Conv2d(CHANNELS, CLASSES, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of both levels at the images' size, and features at a quarter of that size."""
        middle = self.stages(images)
        deep = self.last(middle)
        size = images.shape[-2:]
        return F.interpolate(self.auxiliary(middle), size), F.interpolate(self.main(deep), size), deep


class Reverse(torch.autograd.Function):
    """The loop's own gradient reversal. `semshift.reverse_gradient` computes the same."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return -ctx.scale * gradient, None


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


def train(steps: int = 100) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Train. Returns the network and the alignment's figures at every step."""
    torch.manual_seed(0)
    log: list[dict[str, Tensor]] = []
    labelled = [load("target") for _ in range(8)]
    model = Segmenter()
    discriminators = nn.ModuleDict({"auxiliary": discriminator(), "main": discriminator()})
    sgd = torch.optim.SGD(model.parameters(), 0.005, momentum=0.9, weight_decay=5e-4)
    adam = torch.optim.Adam(discriminators.parameters(), 3e-3, betas=(0.9, 0.99))
    align = semshift.SemanticAlignment(CHANNELS, CLASSES)  # +
    adam.add_param_group({"params": align.parameters(), "lr": 3e-3})  # +
    for step in range(steps):
        (images_s, labels_s), (images_l, labels_l), (images_u, _) = (
            load("source"),
            labelled[step % len(labelled)],
            load("target"),
        )
        *maps_s, features_s = model(images_s)
        *maps_l, features_l = model(images_l)
        *maps_u, _ = model(images_u)
        loss = torch.zeros(())
        for name, share, reversal, map_s, map_l, map_u in zip(
            discriminators, (0.1, 1.0), (0.0002, 0.001), maps_s, maps_l, maps_u
        ):
            loss = loss + share * (F.cross_entropy(map_s, labels_s) + F.cross_entropy(map_l, labels_l))
            for output, label in ((map_s, 1.0), (map_u, 0.0)):
                reversed_output = Reverse.apply(output.softmax(1), reversal)
                loss = loss + bce(discriminators[name](reversed_output), label) / 2

        losses = align(features_s, labels_s, features_l, labels_l)  # +
        loss = loss + 0.03 * losses.confusion + losses.discriminator  # +
        sgd.zero_grad()
        adam.zero_grad()
        loss.backward()
        for each, rate in ((sgd, 0.005), (adam, 3e-3)):
            each.param_groups[0]["lr"] = rate * (1 - step / steps) ** 0.9
            each.step()

        log.append(losses.figures)  # check
    return model, log


def features(model: Any, images: Tensor) -> Tensor:
    """The features that were aligned."""
    result: Tensor = model(images)[-1]
    return result


def report(log: list[dict[str, Tensor]]) -> None:
    """Print the mean of each figure over every twenty steps."""
    for step in range(0, len(log), 20):
        rows = log[step : step + 20]
        means = {name: torch.stack([row[name] for row in rows]).nanmean().item() for name in rows[0]}
        print(f"steps {step:2} on: " + ", ".join(f"{name} {mean:.2f}" for name, mean in means.items()))


if __name__ == "__main__":
    report(train()[1])
