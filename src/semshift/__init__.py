"""Reusable parts for adapting a segmentation model to a new domain with few target labels.

Every public name is `semshift.NAME`; the modules are where the code lives.
"""

import torch as _torch

from semshift.alignment import AlignmentLosses, GlobalAlignment, SemanticAlignment
from semshift.balancing import balanced_weight
from semshift.contrast import prototype_contrast_loss
from semshift.discriminators import ClassPixelDiscriminator, FCDiscriminator, PrototypeDiscriminator, frozen
from semshift.distributed import all_gather, all_reduce_sum, average_gradients
from semshift.health import (
    DomainAccuracy,
    class_domain_accuracy,
    domain_accuracy,
    gradient_norm,
    health_warnings,
    prototype_distance,
)
from semshift.labels import check_labels, class_shares, remap_labels, resize_labels
from semshift.losses import (
    Objective,
    class_confusion_loss,
    class_discriminator_loss,
    confusion_loss,
    discriminator_loss,
    entropy_map,
    r1_penalty,
    reverse_gradient,
)
from semshift.mixing import PseudoLabels, class_mix, pseudo_labels
from semshift.pooling import ClassSums, class_sums, weighted_class_sums
from semshift.prototypes import FilledPrototypes, PrototypeBank
from semshift.sampling import MixedBatchSampler, collate_by_domain, rare_class_weights
from semshift.schedules import Constant, Cosine, Linear, Polynomial, Schedule, Sigmoid, Then

__version__ = "0.1.0"

__all__ = [
    "AlignmentLosses",
    "ClassPixelDiscriminator",
    "ClassSums",
    "Constant",
    "Cosine",
    "DomainAccuracy",
    "FCDiscriminator",
    "FilledPrototypes",
    "GlobalAlignment",
    "Linear",
    "MixedBatchSampler",
    "Objective",
    "Polynomial",
    "PrototypeBank",
    "PrototypeDiscriminator",
    "PseudoLabels",
    "Schedule",
    "SemanticAlignment",
    "Sigmoid",
    "Then",
    "all_gather",
    "all_reduce_sum",
    "average_gradients",
    "balanced_weight",
    "check_labels",
    "class_confusion_loss",
    "class_discriminator_loss",
    "class_domain_accuracy",
    "class_mix",
    "class_shares",
    "class_sums",
    "collate_by_domain",
    "confusion_loss",
    "discriminator_loss",
    "domain_accuracy",
    "entropy_map",
    "frozen",
    "gradient_norm",
    "health_warnings",
    "prototype_contrast_loss",
    "prototype_distance",
    "pseudo_labels",
    "r1_penalty",
    "rare_class_weights",
    "remap_labels",
    "resize_labels",
    "reverse_gradient",
    "weighted_class_sums",
]

# So that `torch.load(weights_only=True)` loads checkpoints that hold these values.
_torch.serialization.add_safe_globals([AlignmentLosses, ClassSums, DomainAccuracy, FilledPrototypes, PseudoLabels])
