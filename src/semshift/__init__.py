"""Reusable parts for adapting a segmentation model to a new domain with few target labels.

The parts meet in your training loop, not in each other:

- `pooling`: the sum of the features under each class's pixels, and its mass; divided, the class prototypes.
- `labels`: label maps on the feature grid, and the checks that belong where labels are loaded.
- `prototypes`: running prototypes of a domain, for the classes that a batch lacks.
- `discriminators`: source against target, over output maps, class prototypes or pixels.
- `losses`: what discriminators learn by, and what confuses them.
- `schedules`: weights as functions of the step.
- `sampling`: batches mixed from several domains, each a pure function of seed and step.
- `mixing`: pseudo-labels, and half of an image's classes on top of another image.
- `health`: is the adversary alive?
- `distributed`: sums over ranks.
"""

from semshift import (
    discriminators,
    distributed,
    health,
    labels,
    losses,
    mixing,
    pooling,
    prototypes,
    sampling,
    schedules,
)

__version__ = "0.1.0"

__all__ = [
    "discriminators",
    "distributed",
    "health",
    "labels",
    "losses",
    "mixing",
    "pooling",
    "prototypes",
    "sampling",
    "schedules",
]
