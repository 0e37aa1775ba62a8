"""What the losses of a step look at: the segmenter's output, its output maps and its class prototypes.

On several ranks every loss is that of the whole batch, with the same value on each of them: sums and counts are added
up, and a discriminator's answers gathered, before anything is divided. In one process those calls do nothing.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

import semshift
from examples.workbench.networks.segmentation import Segmentation
from examples.workbench.settings import Settings

__all__ = [
    "View",
    "count_pixels",
    "cross_entropy",
    "global_view",
    "gradient_penalty",
    "semantic_view",
    "supervised_loss",
    "upsample",
]

T = TypeVar("T")


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
    accuracy: Callable[..., semshift.DomainAccuracy]
    sample_dims: int
    """How many leading dimensions of `source` count samples."""


def cross_entropy(logits: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    """Mean cross-entropy over the pixels of all ranks that have a class, at the labels' size; 0 where none has."""
    ignore_index = settings.data.ignore_index
    total = F.cross_entropy(upsample(logits, labels.shape[-2:]), labels, ignore_index=ignore_index, reduction="sum")
    return semshift.all_reduce_sum(total) / semshift.all_reduce_sum((labels != ignore_index).sum()).clamp(min=1)


def upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits `[B, K, *size]`, float32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.interpolate(wide, size=list(size), mode="bilinear", align_corners=False)


def supervised_loss(output: Segmentation, labels: Tensor, settings: Settings) -> Tensor:
    """The cross-entropy of a labelled image, and that of the auxiliary classifier where there is one."""
    loss = cross_entropy(output.logits, labels, settings)
    if output.auxiliary is not None:
        loss = loss + settings.optimiser.auxiliary_weight * cross_entropy(output.auxiliary, labels, settings)
    return loss


def count_pixels(labels: Tensor, num_classes: int) -> Tensor:
    """Number of pixels of each class on all ranks, int64 `[K]`."""
    counts = torch.bincount(labels.flatten().clamp(max=num_classes), minlength=num_classes + 1)[:num_classes]
    return semshift.all_reduce_sum(counts)


def gradient_penalty(source_logits: Tensor, source: Tensor, view: View) -> Tensor:
    """The R1 penalty on a view's source inputs, its mean over those of all ranks that take part."""
    penalty = semshift.r1_penalty(source_logits, source, sample_dims=view.sample_dims, weight=view.source_weight)
    weight = penalty.new_ones(()) if view.source_weight is None else view.source_weight.sum().to(penalty.dtype)
    total = semshift.all_reduce_sum(weight)
    return semshift.all_reduce_sum(penalty * (weight / torch.where(total > 0, total, 1.0)))


def global_view(
    outputs: dict[str, Segmentation], pixels: dict[str, Tensor], settings: Settings, *, auxiliary: bool = False
) -> View:
    """The global view: the segmenter's output maps on source and on unlabelled target images.

    With `global_alignment.inputs` balanced, each domain's map is divided by the domain's share of each class, as the
    labels have shown it so far, and normalised: where the domains hold the classes in other shares, a map of the right
    classes would tell the domain, and a segmenter that hides it would have to get them wrong. With `against`
    labelled or both, the labelled target images, which hold the classes as the unlabelled do, are what to be taken for.

    Args:
        outputs: of the segmenter, by domain.
        pixels: number of pixels `[K]` of each class that the labels of a domain have shown so far.
        settings: of the run.
        auxiliary: look at the auxiliary classifier's output.
    """
    how = settings.global_alignment

    def output_map(domain: str) -> Tensor:
        size = settings.data.source_size if domain == "source" and settings.data.source_size else settings.data.size
        logits = outputs[domain].auxiliary if auxiliary else outputs[domain].logits
        assert logits is not None  # a discriminator for it stands only where the network has one
        logits = upsample(logits, size)
        if how.inputs == "balanced":
            # One pixel more, so that a class that was not seen yet has a share.
            counts = pixels["source" if domain == "source" else "labelled"] + 1
            logits = logits - (counts / counts.sum()).log()[:, None, None]
        probabilities = logits.softmax(1)
        return semshift.entropy_map(probabilities) if how.inputs == "entropy" else probabilities

    maps = [output_map(domain) for domain in ("source", "labelled") if how.against in (domain, "both")]
    return View(
        source=torch.cat(maps) if len(maps) > 1 else maps[0],
        target=output_map("unlabelled"),
        source_weight=None,
        target_weight=None,
        confusion_weight=None,
        confusion_loss=functools.partial(_over_ranks, semshift.confusion_loss, objective=how.objective),
        discriminator_loss=functools.partial(_over_ranks, semshift.discriminator_loss, objective=how.objective),
        accuracy=functools.partial(_over_ranks, semshift.domain_accuracy),
        sample_dims=1,
    )


def semantic_view(
    outputs: dict[str, Segmentation],
    batch: dict[str, dict[str, Tensor]],
    pixels: dict[str, Tensor],
    settings: Settings,
    *,
    banks: Mapping[str, semshift.PrototypeBank] = MappingProxyType({}),
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
    how = settings.semantic_alignment
    pooled, means, shown = {}, {}, {}
    for domain in ("source", "labelled"):
        own_images = semshift.class_sums(
            outputs[domain].features,
            batch[domain]["label"],
            len(settings.data.classes),
            ignore_index=settings.data.ignore_index,
            resample=how.resample,
            per_image=how.per_image,
        )
        pooled[domain] = sums = _pooled_over_ranks(own_images)
        means[domain], shown[domain] = sums.means, sums.present
        if banks:
            # It adds up the ranks itself.
            banks[domain].update(semshift.ClassSums(own_images.sums.detach(), own_images.mass))
            means[domain], shown[domain] = banks[domain](sums)
    target, present, own = means["labelled"], shown["labelled"], pooled["labelled"].present
    if soft_weights is not None:
        soft = _pooled_over_ranks(
            semshift.weighted_class_sums(
                outputs["unlabelled"].features, soft_weights.to(target.dtype), per_image=how.per_image
            )
        )
        # A class of which less than a cell is left is noise.
        sure = soft.mass >= 1
        join = torch.cat if how.per_image else torch.stack
        target, present, own = join([target, soft.means]), join([present, sure]), join([own, sure])
    if how.conditioning == "class-and-domain":
        confusion, discriminator, accuracy = (
            semshift.class_confusion_loss,
            semshift.class_discriminator_loss,
            semshift.class_domain_accuracy,
        )
    else:
        confusion = functools.partial(semshift.confusion_loss, objective=how.objective)
        discriminator = functools.partial(semshift.discriminator_loss, objective=how.objective)
        accuracy = semshift.domain_accuracy
    return View(
        source=means["source"],
        target=target,
        source_weight=shown["source"] & (pixels["labelled"] > 0),
        target_weight=present & (pixels["source"] > 0),
        confusion_weight=own & (pixels["source"] > 0),
        confusion_loss=functools.partial(_over_ranks, confusion),
        discriminator_loss=functools.partial(_over_ranks, discriminator),
        accuracy=functools.partial(_over_ranks, accuracy),
        sample_dims=means["source"].dim() - 1,
    )


def _pooled_over_ranks(pooled: semshift.ClassSums) -> semshift.ClassSums:
    """The sums of the whole batch; one image's are whole as they are."""
    if pooled.sums.dim() == 3:
        return pooled
    return semshift.ClassSums(semshift.all_reduce_sum(pooled.sums), semshift.all_reduce_sum(pooled.mass))


def _over_ranks(judge: Callable[..., T], *logits: Tensor, **how: Any) -> T:
    """Judge what the discriminators of all ranks have said, with its weights, as one batch."""
    gathered = {name: semshift.all_gather(value) if isinstance(value, Tensor) else value for name, value in how.items()}
    return judge(*(semshift.all_gather(each) for each in logits), **gathered)
