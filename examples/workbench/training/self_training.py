"""Self-training: a teacher labels the unlabelled target images, onto which labelled classes are pasted."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import semshift
from examples.workbench.data.samples import Samples
from examples.workbench.settings import Settings
from examples.workbench.training.views import upsample

__all__ = ["Taught", "rare_classes", "soft_weights", "taught", "taught_cross_entropy"]


class Taught(NamedTuple):
    """Unlabelled images with the teacher's labels, other images' classes on top."""

    image: Tensor
    """`[B, 3, H, W]`."""
    label: Tensor
    """`[B, H, W]` int64."""
    weight: Tensor
    """`[B, H, W]` in [0, 1], of each pixel in the loss: 1 where pasted, 0 outside of the image."""


def taught(
    batch: dict[str, dict[str, Tensor]],
    teacher_logits: Tensor,
    settings: Settings,
    step: int,
    *,
    rank: int = 0,
) -> Taught:
    """Label the unlabelled images of a batch by the teacher, and paste classes as `self_training.mixed_from` says.

    The classes are a function of the seed and the step (ClassMix, Olsson et al. 2021, arXiv 2007.07936; across domains
    as in DACS, Tranheden et al. 2021, arXiv 2007.08702). Onto image i goes image i of the donors, which begin anew
    when they are fewer, and are brought to its size; of `both`, source and labelled take turns. Images are counted
    over all ranks, so that a rank may paste what lies on another.

    Args:
        batch: `source`, `labelled` and `unlabelled` images with what `TrainingSet` gives for them.
        teacher_logits: `[B, K, h, w]` of the unlabelled images.
        settings: of the run.
        step: of the run.
        rank: this process.
    """
    how, unlabelled = settings.self_training, batch["unlabelled"]
    size = unlabelled["image"].shape[-2:]
    logits = upsample(teacher_logits, size)
    labels = semshift.pseudo_labels(logits, threshold=how.threshold).labels
    inside = unlabelled["inside"]
    # Of the image's own pixels: what the teacher makes of the margin around a crop says nothing of the image.
    sure = (logits.softmax(1).amax(1) > how.threshold) & inside
    # By pixel as in FixMatch (Sohn et al. 2020, arXiv 2001.07685): what a teacher is not sure of is often a rare class.
    share = sure.sum((1, 2), keepdim=True) / inside.sum((1, 2), keepdim=True).clamp(min=1)
    weight = sure.float() if how.weighted_by == "pixel" else share * inside
    if how.mixed_from == "nothing":
        return Taught(unlabelled["image"], labels, weight)
    domains = ["source", "labelled"] if how.mixed_from == "both" else [how.mixed_from]
    donors = {
        domain: [semshift.all_gather(batch[domain][part]).flatten(0, 1) for part in ("image", "label")]
        for domain in domains
    }
    first, chosen = rank * len(labels), []
    for i in range(first, first + len(labels)):
        images_of, labels_of = donors[domains[i % len(domains)]]
        j = i // len(domains) % len(images_of)
        chosen.append(_fit(images_of[j : j + 1], labels_of[j : j + 1], size, settings))
    image, label = (torch.cat([pair[part] for pair in chosen]) for part in (0, 1))
    seed = np.random.SeedSequence((settings.seed, step)).generate_state(1, np.uint32)
    generator = torch.Generator().manual_seed(int(seed[0]))
    k = len(settings.data.classes)
    keys = torch.rand(first + len(label), k, generator=generator)[first:]
    mask = semshift.class_mix(label, k, ignore_index=settings.data.ignore_index, keys=keys)
    return Taught(
        torch.where(mask[:, None], image, unlabelled["image"]),
        torch.where(mask, label, labels),
        torch.where(mask, 1.0, weight),
    )


def taught_cross_entropy(logits: Tensor, images: Taught) -> Tensor:
    """Cross-entropy weighted by pixel, its mean over the pixels of all ranks; one with a weight of 0 is counted."""
    losses = F.cross_entropy(upsample(logits, images.label.shape[-2:]), images.label, reduction="none")
    return semshift.all_gather((losses * images.weight).mean()).mean()


def soft_weights(teacher_logits: Tensor, inside: Tensor, size: tuple[int, int], *, threshold: float) -> Tensor:
    """The teacher's probabilities on the feature grid, 0 where it is not sure or the cell is not in the image.

    Args:
        teacher_logits: `[B, K, h', w']`.
        inside: `[B, H, W]` bool.
        size: height and width of the feature grid.
        threshold: largest probability of a cell above which the teacher is sure.

    Returns:
        `[B, K, *size]`, float32 at least.
    """
    wide = teacher_logits.to(torch.promote_types(teacher_logits.dtype, torch.float32))
    probabilities = F.interpolate(wide.softmax(1), size=size, mode="area")
    covered = F.interpolate(inside[:, None].float(), size=size, mode="area")
    return probabilities * (probabilities.amax(1, keepdim=True) > threshold) * (covered == 1)


def rare_classes(samples: Samples, settings: Settings, *, progress: str | None) -> np.ndarray:
    """Weights by which images are drawn for the rare classes that they hold: reads the labels of all of them."""
    k = len(settings.data.classes)
    counts = np.zeros((len(samples), k), np.int64)
    for i in tqdm(range(len(samples)), desc=f"classes of {progress}", leave=False, disable=progress is None):
        counts[i] = np.bincount(samples[i].label.ravel(), minlength=256)[:k]
    return semshift.rare_class_weights(counts, temperature=settings.self_training.rare_class_temperature)


def _fit(images: Tensor, labels: Tensor, size: torch.Size, settings: Settings) -> tuple[Tensor, Tensor]:
    """Images `[B, 3, H, W]` and labels `[B, H, W]` at another size; as they are where it is theirs."""
    if images.shape[-2:] == size:
        return images, labels
    images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    k, ignore_index = len(settings.data.classes), settings.data.ignore_index
    small = semshift.resize_labels(labels, (size[0], size[1]), k, resample="nearest", ignore_index=ignore_index)
    return images, small
