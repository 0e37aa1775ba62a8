"""The networks of a run, their optimisers and the weights of its losses, from its settings."""

import torch
from torch import nn

from examples.ass.deeplab import DeepLabV2
from examples.ass.models import SmallSegmenter
from examples.ass.settings import GlobalAdversary, SelfTraining, SemanticAdversary, Settings
from semshift.discriminators import FCDiscriminator, PrototypeDiscriminator
from semshift.schedules import Constant, Schedule, Sigmoid, Then

__all__ = ["build_critic", "build_optimiser", "build_segmenter", "weight_schedule"]


def build_segmenter(settings: Settings) -> SmallSegmenter | DeepLabV2:
    """The segmenter with its first weights, which depend on the seed alone: every method starts from the same.

    Those of `network.init` are not among them: `train` loads them over these, once.
    """
    torch.manual_seed(settings.seed)
    network, classes = settings.network, len(settings.data.classes)
    if network.name == "small":
        return SmallSegmenter(classes, width=network.width, feature_layer=network.feature_layer)
    return DeepLabV2(
        classes,
        depth=network.depth,
        aspp_dilations=network.aspp_dilations,
        origin=network.origin,
        freeze_batch_norm=network.frozen_batch_norm,
    )


def build_optimiser(settings: Settings, segmenter: SmallSegmenter | DeepLabV2) -> torch.optim.Optimizer:
    """The segmenter's optimiser; its second group, where there is one, is the classifier."""
    how = settings.optimiser
    groups = [{"params": list(segmenter.parameters())}]
    if how.classifier_factor != 1:
        classifier = segmenter.classifier_parameters()
        chosen = set(map(id, classifier))
        groups = [{"params": [p for p in segmenter.parameters() if id(p) not in chosen]}, {"params": classifier}]
    if how.name == "adamw":
        return torch.optim.AdamW(groups, how.learning_rate, weight_decay=how.weight_decay)
    return torch.optim.SGD(groups, how.learning_rate, momentum=0.9, weight_decay=how.weight_decay)


def build_critic(name: str, settings: Settings, segmenter: SmallSegmenter | DeepLabV2) -> nn.Module:
    """The discriminator called `global` or `semantic`, from a seed of its own."""
    classes = len(settings.data.classes)
    if name == "global":
        torch.manual_seed(settings.seed + 1)
        g = settings.global_adversary
        return FCDiscriminator(classes, base_channels=g.base_channels, spectral_norm=g.spectral_norm)
    torch.manual_seed(settings.seed + 2)
    s = settings.semantic_adversary
    channels = segmenter.feature_channels
    return PrototypeDiscriminator(channels, classes, conditioning=s.conditioning, spectral_norm=s.spectral_norm)


def weight_schedule(adversary: GlobalAdversary | SemanticAdversary | SelfTraining, steps: int) -> Schedule:
    """The weight of an adversary: zero while its discriminator learns, then a rise to its plateau."""
    start, ramp = round(adversary.start * steps), round(adversary.ramp * steps)
    risen = Sigmoid(adversary.weight, ramp) if ramp else Constant(adversary.weight)
    return Then(Constant(0.0), start, risen) if start else risen
