"""What the losses of a step look at: the segmenter's output, its output maps and its class prototypes."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.ass.models import Segmentation
from examples.ass.settings import Settings
from semshift.health import DomainAccuracy, class_domain_accuracy, domain_accuracy
from semshift.losses import (
    class_confusion_loss,
    class_discriminator_loss,
    confusion_loss,
    discriminator_loss,
    entropy_map,
)
from semshift.pooling import ClassSums, class_sums, weighted_class_sums
from semshift.prototypes import PrototypeBank

__all__ = ["View", "count_pixels", "cross_entropy", "global_view", "semantic_view", "supervised_loss"]


class View(NamedTuple):
    """What one discriminator sees of a step, and how its answers are judged."""

    source: Tensor
    target: Tensor
    source_weight: Tensor | None
    target_weight: Tensor | None
    confusion_weight: Tensor | None
    """Of the target in the segmenter's loss; `target_weight` is the discriminator's."""
    confusion_loss: Callable[..., Tensor]
    discriminator_loss: Callable[..., Tensor]
    accuracy: Callable[..., DomainAccuracy]
    sample_dims: int
    """How many leading dimensions of `source` count samples."""


def cross_entropy(logits: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    """Mean cross-entropy over the pixels that have a class, at the labels' size; 0 where none has."""
    logits = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    ignore_index = settings.data.ignore_index
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


def supervised_loss(output: Segmentation, labels: Tensor, settings: Settings) -> Tensor:
    """The cross-entropy of a labelled image, and that of the auxiliary classifier where there is one."""
    loss = cross_entropy(output.logits, labels, settings)
    if output.auxiliary is not None:
        loss = loss + settings.optimiser.auxiliary_weight * cross_entropy(output.auxiliary, labels, settings)
    return loss


def count_pixels(labels: Tensor, num_classes: int) -> Tensor:
    """Number of pixels of each class, int64 `[K]`."""
    return torch.bincount(labels.flatten().clamp(max=num_classes), minlength=num_classes + 1)[:num_classes]


def global_view(
    outputs: dict[str, Segmentation], pixels: dict[str, Tensor], settings: Settings, *, auxiliary: bool = False
) -> View:
    """The global view: the segmenter's output maps on source and on unlabelled target images.

    With `global_adversary.inputs` balanced, each domain's map is divided by the domain's share of each class, as the
    labels have shown it so far, and normalised: where the domains hold the classes in other shares, a map of the right
    classes would tell the domain, and an adversary that hides it would have to get them wrong. With `against`
    labelled or both, the labelled target images, which hold the classes as the unlabelled do, are what to be taken for.

    Args:
        outputs: of the segmenter, by domain.
        pixels: number of pixels `[K]` of each class that the labels of a domain have shown so far.
        settings: of the run.
        auxiliary: look at the auxiliary classifier's output.
    """
    adversary = settings.global_adversary

    def output_map(domain: str) -> Tensor:
        size = settings.data.source_size if domain == "source" and settings.data.source_size else settings.data.size
        logits = outputs[domain].auxiliary if auxiliary else outputs[domain].logits
        assert logits is not None  # a discriminator for it stands only where the network has one
        logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
        if adversary.inputs == "balanced":
            # One pixel more, so that a class that was not seen yet has a share.
            counts = pixels["source" if domain == "source" else "labelled"] + 1
            logits = logits - (counts / counts.sum()).log()[:, None, None]
        probabilities = logits.softmax(1)
        return entropy_map(probabilities) if adversary.inputs == "entropy" else probabilities

    against = ("source", "labelled") if adversary.against == "both" else (adversary.against,)
    return View(
        source=torch.cat([output_map(domain) for domain in against]),
        target=output_map("unlabelled"),
        source_weight=None,
        target_weight=None,
        confusion_weight=None,
        confusion_loss=functools.partial(confusion_loss, objective=adversary.objective),
        discriminator_loss=functools.partial(discriminator_loss, objective=adversary.objective),
        accuracy=domain_accuracy,
        sample_dims=1,
    )


def semantic_view(
    outputs: dict[str, Segmentation],
    batch: dict[str, dict[str, Tensor]],
    pixels: dict[str, Tensor],
    settings: Settings,
    *,
    banks: Mapping[str, PrototypeBank] | None = None,
    soft_weights: Tensor | None = None,
) -> View:
    """The semantic view: class prototypes of source and labelled target images, pooled by their labels.

    A class takes part where it is present in this batch and the other domain has shown it by now: a class that one
    domain never shows would tell the domain by itself.

    Args:
        outputs: of the segmenter, by domain.
        batch: with the labels of `source` and `labelled`.
        pixels: number of pixels `[K]` of each class that a domain has shown so far, with this batch.
        settings: of the run.
        banks: a domain's running prototypes, brought up to date; they stand in, for the discriminator alone, where an
            image lacks a class.
        soft_weights: `[B, K, h, w]` on the feature grid of the unlabelled images, whose prototypes join the target's.
    """
    adversary = settings.semantic_adversary
    pooled: dict[str, ClassSums] = {
        domain: class_sums(
            outputs[domain].features,
            batch[domain]["label"],
            len(settings.data.classes),
            ignore_index=settings.data.ignore_index,
            resample=adversary.resample,
            per_image=adversary.per_image,
        )
        for domain in ("source", "labelled")
    }
    means, shown = {}, {}
    for domain, sums in pooled.items():
        means[domain], shown[domain] = sums.means, sums.present
        if banks is not None:
            banks[domain].update(ClassSums(sums.sums.detach(), sums.mass))
            means[domain], shown[domain] = banks[domain](sums)
    target, present, own = means["labelled"], shown["labelled"], pooled["labelled"].present
    if soft_weights is not None:
        soft = weighted_class_sums(
            outputs["unlabelled"].features, soft_weights.to(target.dtype), per_image=adversary.per_image
        )
        # A class of which less than a cell is left is noise.
        sure = soft.mass >= 1
        join = torch.cat if adversary.per_image else torch.stack
        target, present, own = join([target, soft.means]), join([present, sure]), join([own, sure])
    by_class, objective = adversary.conditioning == "class-and-domain", adversary.objective
    return View(
        source=means["source"],
        target=target,
        source_weight=shown["source"] & (pixels["labelled"] > 0),
        target_weight=present & (pixels["source"] > 0),
        confusion_weight=own & (pixels["source"] > 0),
        confusion_loss=class_confusion_loss if by_class else functools.partial(confusion_loss, objective=objective),
        discriminator_loss=class_discriminator_loss
        if by_class
        else functools.partial(discriminator_loss, objective=objective),
        accuracy=class_domain_accuracy if by_class else domain_accuracy,
        sample_dims=means["source"].dim() - 1,
    )
