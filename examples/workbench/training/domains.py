"""The images of a run by domain: which of them its method trains on, and how many a step draws."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from examples.workbench.data.images import Images
from examples.workbench.data.loading import TrainingSet
from examples.workbench.data.samples import Samples, Subset
from examples.workbench.settings import METHODS, Settings
from examples.workbench.training.self_training import rare_classes

__all__ = ["Domains", "choose_domains", "segments_unlabelled"]


class Domains(NamedTuple):
    """What the sampler draws from."""

    training: TrainingSet
    sizes: dict[str, int]
    """Number of images of each domain."""
    per_batch: dict[str, int]
    """Number of images of each domain in a step, on this rank."""
    weights: dict[str, np.ndarray]
    """`[N]`, each image's share of the draws, of domains whose images are not drawn alike."""


def segments_unlabelled(settings: Settings, discriminators: Collection[str]) -> bool:
    """Whether the segmenter itself sees the unlabelled images as they are: for their output maps, or to pool them."""
    pools = "self-training" in METHODS[settings.method] and settings.self_training.soft_pooling
    return any(name != "semantic" for name in discriminators) or (pools and "semantic" in discriminators)


def choose_domains(
    settings: Settings, images: Images, labelled: Sequence[int], *, discriminators: Collection[str], progress: bool
) -> Domains:
    """The domains that the method trains on: source, labelled and, where anything looks at them, unlabelled.

    Args:
        settings: of the run, with this rank's share of a step's images.
        images: of the run.
        labelled: which of the target's training images keep their labels.
        discriminators: names of those that the run has.
        progress: show a bar while labels are read for their rare classes.
    """
    uses, plus, how = METHODS[settings.method], settings.self_training, settings.optimiser
    taught = "self-training" in uses
    unlabelled = segments_unlabelled(settings, discriminators) or (taught and plus.weight > 0)
    per_batch = {
        "source": how.images if "source" in uses else 0,
        "labelled": how.images if "labelled" in uses else 0,
        "unlabelled": how.unlabelled if unlabelled else 0,
    }
    per_batch = {domain: count for domain, count in per_batch.items() if count}
    every: dict[str, Samples] = {
        "source": images.source,
        "labelled": Subset(images.target, labelled),
        "unlabelled": images.target,
    }
    samples = {domain: every[domain] for domain in per_batch}
    crops = {"source": settings.data.source_size or settings.data.size}
    training = TrainingSet(
        samples,
        {domain: crops.get(domain, settings.data.size) for domain in samples},
        settings.data.augmentation,
        settings.seed,
        ignore_index=settings.data.ignore_index,
    )
    weights = {
        domain: rare_classes(samples[domain], settings, progress=domain if progress else None)
        for domain in ("source", "labelled")
        if taught and plus.rare_classes
    }
    sizes = {domain: len(of) for domain, of in samples.items()}
    return Domains(training, sizes, per_batch, weights)
