"""What a user's program looks like to a type checker: every public name once, under `mypy --strict`, and it runs."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from semshift.discriminators import ClassPixelDiscriminator, FCDiscriminator, PrototypeDiscriminator, frozen
from semshift.distributed import all_gather, all_reduce_sum, average_gradients
from semshift.health import (
    DomainAccuracy,
    class_domain_accuracy,
    domain_accuracy,
    gradient_norm,
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


def prepare(ids: Tensor, table: Mapping[int, int], num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels: remapped, checked, and on two other grids."""
    labels: Tensor = remap_labels(ids, table)
    check_labels(labels, num_classes, ignore_index=255)
    small: Tensor = resize_labels(labels, (4, 6), mode="majority", num_classes=num_classes, min_share=0.5)
    shares: Tensor = class_shares(labels, (4, 6), num_classes, mode="bilinear", align_corners=False)
    return labels, small, shares


def pool(features: Tensor, labels: Tensor, probabilities: Tensor, bank: PrototypeBank) -> FilledPrototypes:
    """Prototypes: hard, soft, merged, over ranks, and from the bank."""
    hard: ClassSums = class_sums(features, labels, bank.num_classes, resample="nearest")
    soft: ClassSums = weighted_class_sums(features, probabilities)
    merged: ClassSums = hard + ClassSums(soft.sums, soft.mass.long())
    everywhere = ClassSums(all_reduce_sum(merged.sums), all_reduce_sum(merged.mass))
    bank.update(everywhere)
    filled: FilledPrototypes = bank(hard)
    means: Tensor = filled.means
    present: Tensor = filled.present
    assert means.shape[:1] == present.shape
    return filled


def play(source: Tensor, target: Tensor, weight: Schedule, objective: Objective) -> tuple[Tensor, DomainAccuracy]:
    """Both sides of the game over prototypes, and whether it is alive."""
    num_classes, channels = source.shape
    critic = PrototypeDiscriminator(channels, num_classes, hidden_channels=(8,), conditioning="per-class")
    both: Tensor = torch.ones(num_classes, dtype=torch.bool)
    confusion: Tensor = confusion_loss(frozen(critic)(target), objective=objective, weight=both)
    size: Tensor = gradient_norm(confusion, target)
    inputs = source.detach().requires_grad_()
    logits: Tensor = critic(inputs)
    others: Tensor = critic(target.detach())
    loss: Tensor = discriminator_loss(logits, others, objective=objective, source_weight=both, target_weight=both)
    loss = loss + r1_penalty(logits, inputs, sample_dims=1, weight=both)
    distance: Tensor = prototype_distance(source, target, weight=both)
    accuracy: DomainAccuracy = domain_accuracy(logits, others)
    assert distance.shape == (num_classes,)
    return loss + weight(10) * size.detach() + reverse_gradient(confusion, scale=weight(10)), accuracy


def play_by_class(maps: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, float]:
    """The class-and-domain form over pixels, and the discriminator over output maps."""
    critic: nn.Module = ClassPixelDiscriminator(maps.shape[1], classes.shape[-1], hidden_channels=(8,))
    logits = critic(maps).movedim(1, -1)
    loss: Tensor = class_discriminator_loss(logits, logits, source_classes=classes, target_classes=classes)
    confusion: Tensor = class_confusion_loss(logits, classes=classes)
    right: float = class_domain_accuracy(logits, logits).source.item()
    entropy: Tensor = entropy_map(classes.movedim(-1, 1))
    verdict: Tensor = FCDiscriminator(classes.shape[-1], base_channels=4)(entropy.repeat(1, 1, 8, 8))
    return loss + confusion, verdict, right


def draw(counts: "np.ndarray[tuple[int, int], np.dtype[np.int64]]") -> dict[str, Tensor]:
    """Mixed batches, rare classes first."""
    sampler = MixedBatchSampler(
        {"source": len(counts), "target": 3},
        {"source": 2, "target": 1},
        seed=0,
        steps=4,
        weights={"source": rare_class_weights(counts, temperature=0.1, min_pixels=1)},
    )
    batches: list[list[int]] = list(sampler.resume(1, rank=0, world_size=1, per_batch={"source": 2, "target": 1}))
    collated: dict[str, Tensor] = collate_by_domain(batches[0], sampler.per_batch)
    return collated


def mix(logits: Tensor, labels: Tensor) -> Tensor:
    """A teacher's labels under half of the source's classes."""
    pseudo: PseudoLabels = pseudo_labels(logits, threshold=0.9)
    mask: Tensor = class_mix(labels, logits.shape[1], generator=torch.Generator().manual_seed(0))
    return torch.where(mask, labels, pseudo.labels)


SCHEDULES: list[Schedule] = [
    Constant(0.1),
    Linear(0.0, 1.0, steps=10),
    Cosine(1.0, 0.0, steps=10),
    Polynomial(1.0, steps=10, power=0.9),
    Sigmoid(0.1, steps=10),
    Then(Constant(0.0), 5, Sigmoid(0.1, steps=10)),
    lambda step: 0.5**step,
]


def main() -> float:
    """Call all of it."""
    torch.manual_seed(0)
    labels, _, shares = prepare(torch.randint(0, 3, (2, 8, 12)), {0: 0, 1: 1, 2: 255}, 2)
    features, logits = torch.randn(2, 5, 4, 6, requires_grad=True), torch.randn(2, 2, 8, 12)
    filled = pool(features, labels, shares, PrototypeBank(2, 5, momentum=0.9))
    loss, accuracy = play(filled.means.detach(), filled.means, SCHEDULES[4], "bce")
    pixels, _, _ = play_by_class(features, torch.full((2, 4, 6, 2), 0.5))
    assert draw(np.array([[3, 0], [0, 2]]))["source"].shape == (2,)
    assert mix(logits, labels).shape == labels.shape
    everywhere: Tensor = all_gather(labels)
    assert everywhere.shape[1:] == labels.shape
    (loss + pixels).backward()  # type: ignore[no-untyped-call]  # because torch's backward is untyped
    average_gradients([features])
    return float(loss.detach()) + float(accuracy.target)
