"""Self-training: a teacher labels the unlabelled target images, onto which classes of labelled images are pasted."""

from typing import NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

import semshift
from examples.workbench.networks.segmentation import upsample
from examples.workbench.settings import Settings

__all__ = ["Batch", "MixedImages", "mix_images", "self_training_loss"]

Batch = dict[str, dict[str, Tensor]]
"""Images and what belongs to them, by domain: see `step.learn`."""


class MixedImages(NamedTuple):
    """Images `[B, 3, H, W]`, labels `[B, H, W]` int64, and the weight of each pixel in the loss `[B, H, W]` in [0, 1].

    The weight is 1 where a class of another image is pasted, and 0 outside the image.
    """

    image: Tensor
    label: Tensor
    weight: Tensor


def self_training_loss(
    step: int, batch: Batch, segmenter: nn.Module, teacher: nn.Module, settings: Settings, fabric: Fabric
) -> Tensor | None:
    """Weighted cross-entropy on the mixed images: its mean over the pixels of all ranks, also those of weight 0.

    None while its weight is 0.
    """
    plus = settings.self_training
    if plus.weight == 0 or step < round(plus.start * settings.steps):
        return None
    with torch.no_grad(), fabric.autocast():
        teacher_logits = teacher(batch["unlabelled"]["image"]).logits
    mixed = mix_images(batch, teacher_logits, settings, step, rank=fabric.global_rank)
    with fabric.autocast():
        logits = segmenter(mixed.image).logits
    losses = F.cross_entropy(upsample(logits, mixed.label.shape[-2:]), mixed.label, reduction="none")
    return semshift.all_gather((losses * mixed.weight).mean()).mean()


def mix_images(batch: Batch, teacher_logits: Tensor, settings: Settings, step: int, *, rank: int = 0) -> MixedImages:
    """Label the unlabelled images of a batch by the teacher, and paste classes as `self_training.mixed_from` says.

    The classes are a function of the seed and the step (ClassMix, Olsson et al. 2021, arXiv 2007.07936; across domains
    as in DACS, Tranheden et al. 2021, arXiv 2007.08702). Image i gets classes of image i of the donors, resized to its
    size; fewer donors are used again from the first, and of `both`, source and labelled images alternate. Images are
    counted over all ranks, so a donor may lie on another rank.
    """
    how, unlabelled = settings.self_training, batch["unlabelled"]
    height, width = unlabelled["image"].shape[-2:]
    size = (height, width)
    logits = upsample(teacher_logits, size)
    labels = semshift.pseudo_labels(logits, threshold=how.threshold).labels
    inside = unlabelled["inside"]
    sure = (logits.softmax(1).amax(1) > how.threshold) & inside
    # By pixel as in FixMatch (Sohn et al. 2020, arXiv 2001.07685): what a teacher is not sure of is often a rare class.
    share = sure.sum((1, 2), keepdim=True) / inside.sum((1, 2), keepdim=True).clamp(min=1)
    weight = sure.float() if how.weighted_by == "pixel" else share * inside
    if how.mixed_from == "nothing":
        return MixedImages(unlabelled["image"], labels, weight)
    domains = ["source", "labelled"] if how.mixed_from == "both" else [how.mixed_from]
    donors = {
        domain: [semshift.all_gather(batch[domain][part]).flatten(0, 1) for part in ("image", "label")]
        for domain in domains
    }
    first, chosen = rank * len(labels), []
    k, ignore_index = len(settings.data.classes), settings.data.ignore_index
    for i in range(first, first + len(labels)):
        images, masks = donors[domains[i % len(domains)]]
        j = i // len(domains) % len(images)
        image, label = images[j : j + 1], masks[j : j + 1]
        if tuple(image.shape[-2:]) != size:
            image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
            label = semshift.resize_labels(label, size, k, resample="nearest", ignore_index=ignore_index)
        chosen.append((image, label))
    image, label = (torch.cat(parts) for parts in zip(*chosen))
    seed = np.random.SeedSequence((settings.seed, step)).generate_state(1, np.uint32)
    generator = torch.Generator().manual_seed(int(seed[0]))
    keys = torch.rand(first + len(label), k, generator=generator)[first:]
    mask = semshift.class_mix(label, k, ignore_index=ignore_index, keys=keys)
    return MixedImages(
        torch.where(mask[:, None], image, unlabelled["image"]),
        torch.where(mask, label, labels),
        torch.where(mask, 1.0, weight),
    )
