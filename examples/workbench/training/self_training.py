"""Self-training: a teacher labels the unlabelled target images, then classes of labelled images are pasted on them."""

from typing import NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.nn import functional as F

import semshift
from examples.workbench.networks.segmentation import Segmentation, upsample
from examples.workbench.settings import Settings
from examples.workbench.training.learners import Learners
from examples.workbench.training.strong_view import strengthen

__all__ = ["Batch", "MixedImages", "mix_images", "self_training_losses"]

Batch = dict[str, dict[str, Tensor]]
"""Images and their labels or masks, by domain; see `step.learn`."""


class MixedImages(NamedTuple):
    """Images `[B, 3, H, W]`, labels `[B, H, W]` int64, and the weight of each pixel in the loss `[B, H, W]` in [0, 1].

    The weight is 1 at pasted pixels, and 0 outside the image. `sure [B, H, W]` is a bool mask of the pasted pixels and
    of the pixels that the teacher is sure of.
    """

    image: Tensor
    label: Tensor
    weight: Tensor
    sure: Tensor


def self_training_losses(
    step: int, outputs: dict[str, Segmentation], batch: Batch, learners: Learners, settings: Settings, fabric: Fabric
) -> dict[str, Tensor]:
    """The losses of self-training, by the names of their weights. Losses that are off or not started are left out.

    `self-training`: weighted cross-entropy on the mixed images; the mean over the pixels of all ranks includes pixels
    of weight 0. `contrast`: pixel-to-prototype contrast, the mean over source, labelled and mixed images.
    """
    plus, losses, ignore_index = settings.self_training, {}, settings.data.ignore_index
    started = step >= round(plus.start * settings.steps)
    labelled = {domain: (outputs[domain].features, batch[domain]["label"]) for domain in ("source", "labelled")}
    pixels = list(labelled.values())
    if plus.weight > 0 and started:
        assert learners.teacher is not None
        with torch.no_grad(), fabric.autocast():
            teacher_logits = learners.teacher(batch["unlabelled"]["image"]).logits
        mixed = mix_images(batch, teacher_logits, settings, step, rank=fabric.global_rank)
        with fabric.autocast():
            output = learners.segmenter(mixed.image)
        each = F.cross_entropy(upsample(output.logits, mixed.label.shape[-2:]), mixed.label, reduction="none")
        losses["self-training"] = semshift.all_gather((each * mixed.weight).mean()).mean()
        pixels.append((output.features, mixed.label.where(mixed.sure, ignore_index)))
    for domain, bank in learners.prototypes.items():
        features, labels = labelled[domain]
        bank.update(semshift.class_sums(features.detach(), labels, bank.num_classes, ignore_index=ignore_index))
    if learners.prototypes and started:
        prototypes = torch.stack([bank.means for bank in learners.prototypes.values()])
        each_domain = [
            semshift.prototype_contrast_loss(
                features, labels, prototypes, temperature=plus.contrast_temperature, ignore_index=ignore_index
            )
            for features, labels in pixels
        ]
        losses["contrast"] = torch.stack(each_domain).mean()
    return losses


def mix_images(batch: Batch, teacher_logits: Tensor, settings: Settings, step: int, *, rank: int = 0) -> MixedImages:
    """Label the unlabelled images with the teacher, and paste classes onto them as `self_training.mixed_from` says.

    The pasted classes are a function of the seed and the step (ClassMix, Olsson et al. 2021, arXiv 2007.07936; across
    domains as in DACS, Tranheden et al. 2021, arXiv 2007.08702). Image i gets classes of donor i, resized to the size
    of image i. If there are fewer donors, they are reused from the first on. With `both`, source and labelled images
    alternate. Images are counted over all ranks, so a donor may be on a different rank.
    """
    how, unlabelled = settings.self_training, batch["unlabelled"]
    height, width = unlabelled["image"].shape[-2:]
    size = (height, width)
    pseudo = semshift.pseudo_labels(upsample(teacher_logits, size), threshold=how.threshold)
    labels, inside = pseudo.labels, unlabelled["inside"]
    sure = pseudo.sure & inside
    # By pixel as in FixMatch (Sohn et al. 2020, arXiv 2001.07685). Pixels that are not sure are often of a rare class.
    share = sure.sum((1, 2), keepdim=True) / inside.sum((1, 2), keepdim=True).clamp(min=1)
    weight = sure.float() if how.weighted_by == "pixel" else share * inside
    first, k = rank * len(labels), len(settings.data.classes)
    seeds = np.random.SeedSequence((settings.seed, step)).generate_state(2, np.uint32).tolist()

    def draw(seed: int, columns: int) -> Tensor:
        return torch.rand(first + len(labels), columns, generator=torch.Generator().manual_seed(seed))[first:]

    image = unlabelled["image"]
    if how.mixed_from != "nothing":
        donor_image, donor_label = _donors(batch, settings, size, first, len(labels))
        mask = semshift.class_mix(donor_label, k, ignore_index=settings.data.ignore_index, keys=draw(seeds[0], k))
        image = torch.where(mask[:, None], donor_image, image)
        labels = torch.where(mask, donor_label, labels)
        weight, sure = torch.where(mask, 1.0, weight), mask | sure
    if how.strong > 0:
        image = strengthen(image, how.strong, draw(seeds[1], 6))
    return MixedImages(image, labels, weight, sure)


def _donors(batch: Batch, settings: Settings, size: tuple[int, int], first: int, count: int) -> tuple[Tensor, Tensor]:
    """Images and labels for pasting onto the `count` unlabelled images from `first` on, resized to `size`."""
    how, k, ignore_index = settings.self_training, len(settings.data.classes), settings.data.ignore_index
    domains = ["source", "labelled"] if how.mixed_from == "both" else [how.mixed_from]
    donors = {
        domain: [semshift.all_gather(batch[domain][part]).flatten(0, 1) for part in ("image", "label")]
        for domain in domains
    }
    chosen = []
    for i in range(first, first + count):
        images, masks = donors[domains[i % len(domains)]]
        j = i // len(domains) % len(images)
        image, label = images[j : j + 1], masks[j : j + 1]
        if tuple(image.shape[-2:]) != size:
            image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
            label = semshift.resize_labels(label, size, k, resample="nearest", ignore_index=ignore_index)
        chosen.append((image, label))
    images, labels = (torch.cat(parts) for parts in zip(*chosen))
    return images, labels
