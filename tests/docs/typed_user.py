"""A user's program for the type checker: it uses every public name once, passes `mypy --strict`, and runs."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

import semshift


def prepare(ids: Tensor, table: Mapping[int, int], num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels: remapped, checked, and on two other grids."""
    labels: Tensor = semshift.remap_labels(ids, table, default=255)
    semshift.check_labels(labels, num_classes, ignore_index=255)
    small: Tensor = semshift.resize_labels(labels, (4, 6), num_classes, resample="majority", min_share=0.5)
    shares: Tensor = semshift.class_shares(labels, (4, 6), num_classes, resample="bilinear", align_corners=False)
    return labels, small, shares


def pool(
    features: Tensor, labels: Tensor, probabilities: Tensor, bank: semshift.PrototypeBank
) -> semshift.FilledPrototypes:
    """Prototypes: hard, soft, merged, over ranks, and from the bank."""
    hard: semshift.ClassSums = semshift.class_sums(features, labels, bank.num_classes, resample="nearest")
    soft: semshift.ClassSums = semshift.weighted_class_sums(features, probabilities)
    merged: semshift.ClassSums = hard + semshift.ClassSums(soft.sums, soft.mass.long())
    everywhere = semshift.ClassSums(semshift.all_reduce_sum(merged.sums), semshift.all_reduce_sum(merged.mass))
    bank.update(everywhere)
    filled: semshift.FilledPrototypes = bank(hard)
    means: Tensor = filled.means
    present: Tensor = filled.present
    assert means.shape[:1] == present.shape
    return filled


def align(features: Tensor, labels: Tensor, head: nn.Module, weight: semshift.Schedule) -> Tensor:
    """The two views of ASS as modules, one of them at a weight that follows the task loss."""
    semantic = semshift.SemanticAlignment(features.shape[1], 2, hidden_channels=(8,), objective="hinge")
    outputs = semshift.GlobalAlignment(2, inputs="entropy", base_channels=4)
    logits: Tensor = head(features)
    losses: semshift.AlignmentLosses = semantic(features, labels, features, labels)
    others: semshift.AlignmentLosses = outputs(logits, logits, size=(32, 48), align_corners=False)
    balanced: Tensor = semshift.balanced_weight(logits.square().mean(), losses.confusion, features, 0.1)
    pooled: semshift.ClassSums = semshift.class_sums(features.detach(), labels, 2)
    warm: semshift.AlignmentLosses = semantic.compare(pooled, pooled, target_confusion=pooled)
    figures: dict[str, Tensor] = {**losses.figures, **others.figures}
    assert all(figure.dim() == 0 for figure in figures.values())
    total: Tensor = balanced * losses.confusion + losses.discriminator + warm.discriminator
    warnings: list[str] = semshift.health_warnings([losses.figures, {"gradient_ratio": 0.1}], objective="bce")
    assert not warnings
    return total + weight(10) * others.confusion + others.discriminator


def play(
    source: Tensor, target: Tensor, weight: semshift.Schedule, objective: semshift.Objective
) -> tuple[Tensor, semshift.DomainAccuracy]:
    """Both adversarial losses over prototypes, and how well the discriminator does."""
    num_classes, channels = source.shape
    discriminator = semshift.PrototypeDiscriminator(
        channels, num_classes, hidden_channels=(8,), conditioning="per-class"
    )
    both: Tensor = torch.ones(num_classes, dtype=torch.bool)
    confusion: Tensor = semshift.confusion_loss(
        semshift.frozen(discriminator)(target), objective=objective, weight=both
    )
    size: Tensor = semshift.gradient_norm(confusion, target)
    inputs = source.detach().requires_grad_()
    logits: Tensor = discriminator(inputs)
    others: Tensor = discriminator(target.detach())
    loss: Tensor = semshift.discriminator_loss(
        logits, others, objective=objective, source_weight=both, target_weight=both
    )
    loss = loss + semshift.r1_penalty(logits, inputs, sample_dims=1, weight=both)
    distance: Tensor = semshift.prototype_distance(source, target, weight=both)
    accuracy: semshift.DomainAccuracy = semshift.domain_accuracy(logits, others)
    assert distance.shape == (num_classes,)
    return loss + weight(10) * size.detach() + semshift.reverse_gradient(confusion, scale=weight(10)), accuracy


def play_by_class(maps: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, float]:
    """The class-and-domain losses over pixels, and the discriminator over output maps."""
    discriminator: nn.Module = semshift.ClassPixelDiscriminator(maps.shape[1], classes.shape[-1], hidden_channels=(8,))
    logits = discriminator(maps).movedim(1, -1)
    loss: Tensor = semshift.class_discriminator_loss(logits, logits, source_classes=classes, target_classes=classes)
    confusion: Tensor = semshift.class_confusion_loss(logits, classes=classes)
    right: float = semshift.class_domain_accuracy(logits, logits).source.item()
    entropy: Tensor = semshift.entropy_map(classes.movedim(-1, 1))
    verdict: Tensor = semshift.FCDiscriminator(classes.shape[-1], base_channels=4)(entropy.repeat(1, 1, 8, 8))
    return loss + confusion, verdict, right


def draw(counts: "np.ndarray[tuple[int, int], np.dtype[np.int64]]") -> dict[str, Tensor]:
    """Mixed batches, rare classes first."""
    sampler = semshift.MixedBatchSampler(
        {"source": len(counts), "target": 3},
        {"source": 2, "target": 1},
        seed=0,
        steps=4,
        weights={"source": semshift.rare_class_weights(counts, temperature=0.1, min_pixels=1)},
    )
    batches: list[list[int]] = list(sampler.resume(1, rank=0, world_size=1, per_batch={"source": 2, "target": 1}))
    collated: dict[str, Tensor] = semshift.collate_by_domain(batches[0], sampler.per_batch)
    return collated


def mix(logits: Tensor, labels: Tensor) -> Tensor:
    """Half of the source's classes on top of a teacher's labels."""
    pseudo: semshift.PseudoLabels = semshift.pseudo_labels(logits, threshold=0.9)
    mask: Tensor = semshift.class_mix(labels, logits.shape[1], generator=torch.Generator().manual_seed(0))
    assert pseudo.weight.shape == labels.shape[:1]
    return torch.where(mask, labels, pseudo.labels.where(pseudo.sure, 255))


def contrast(features: Tensor, labels: Tensor, bank: semshift.PrototypeBank) -> Tensor:
    """Pixels against the prototypes of two domains."""
    prototypes: Tensor = torch.stack([bank.means, bank.means])
    return semshift.prototype_contrast_loss(features, labels, prototypes, temperature=0.1, resample="nearest")


SCHEDULES: list[semshift.Schedule] = [
    semshift.Constant(0.1),
    semshift.Linear(0.0, 1.0, steps=10),
    semshift.Cosine(1.0, 0.0, steps=10),
    semshift.Polynomial(1.0, 0.0, steps=10, power=0.9),
    semshift.Sigmoid(0.0, 0.1, steps=10),
    semshift.Then(semshift.Constant(0.0), 5, semshift.Sigmoid(0.0, 0.1, steps=10)),
    lambda step: 0.5**step,
]


def main() -> float:
    """Call all of it."""
    torch.manual_seed(0)
    labels, _, shares = prepare(torch.randint(0, 3, (2, 8, 12)), {0: 0, 1: 1, 2: 255}, 2)
    features, logits = torch.randn(2, 5, 4, 6, requires_grad=True), torch.randn(2, 2, 8, 12)
    bank = semshift.PrototypeBank(5, 2, momentum=0.9)
    filled = pool(features, labels, shares, bank)
    loss, accuracy = play(filled.means.detach(), filled.means, SCHEDULES[4], "bce")
    pixels, _, _ = play_by_class(features, torch.full((2, 4, 6, 2), 0.5))
    assert draw(np.array([[3, 0], [0, 2]]))["source"].shape == (2,)
    assert mix(logits, labels).shape == labels.shape
    everywhere: Tensor = semshift.all_gather(labels)
    assert everywhere.shape[1:] == labels.shape
    aligned = align(features, labels, nn.Conv2d(5, 2, 1), SCHEDULES[0])
    (loss + pixels + aligned + contrast(features, labels, bank)).backward()  # type: ignore[no-untyped-call]  # because torch's backward is untyped
    semshift.average_gradients([features])
    return float(loss.detach()) + float(accuracy.target)
