"""The domains that a method trains on, and the number of images that a step draws from each."""

from collections.abc import Iterable

import numpy as np

import semshift
from examples.workbench.data.classes import count_pixels
from examples.workbench.data.images import Images
from examples.workbench.data.samples import Samples
from examples.workbench.errors import InputError
from examples.workbench.settings import Settings

__all__ = ["batch_sizes", "choose_domains", "rare_class_draws"]


def choose_domains(settings: Settings, images: Images) -> dict[str, Samples]:
    """Images of the domains that the method trains on: source, labelled, and unlabelled if a loss needs them."""
    domains: dict[str, Samples] = {}
    if "source" in settings.parts:
        assert images.source is not None
        domains["source"] = images.source
    if "labelled" in settings.parts:
        domains["labelled"] = images.labelled
    if settings.segments_unlabelled or ("self-training" in settings.parts and settings.self_training.weight > 0):
        domains["unlabelled"] = images.target
    return domains


def batch_sizes(settings: Settings, domains: Iterable[str], ranks: int) -> dict[str, int]:
    """Number of images of each domain in a step on one rank; all ranks have the same number."""
    sizes = {}
    for domain in domains:
        name = "unlabelled_batch_size" if domain == "unlabelled" else "batch_size"
        size = getattr(settings.optimiser, name)
        if size % ranks:
            raise InputError(f"optimiser.{name} must be a multiple of the {ranks} ranks, got {size}")
        sizes[domain] = size // ranks
    return sizes


def rare_class_draws(samples: Samples, settings: Settings, *, progress: str | None) -> np.ndarray:
    """Weights for drawing images with rare classes more often. The labels of all images are read."""
    k = len(settings.data.classes)
    counts = np.zeros((len(samples), k), np.int64)
    title = None if progress is None else f"classes of {progress}"
    for index, pixels in count_pixels(samples, settings.data, range(len(samples)), title):
        counts[index] = pixels[:k]
    return semshift.rare_class_weights(counts, temperature=settings.self_training.rare_class_temperature)
