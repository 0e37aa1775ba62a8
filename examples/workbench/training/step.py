"""One training step of ASS and of simpler methods, in the order of the paper (Wang et al. 2020, arXiv 2004.00794)."""

import math
from collections.abc import Sequence

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.nn import functional as F

import semshift
from examples.workbench.errors import InputError
from examples.workbench.networks.segmentation import Segmentation, upsample
from examples.workbench.settings import Settings
from examples.workbench.training.health import alignment_figures, feature_figures
from examples.workbench.training.learners import Learners
from examples.workbench.training.ranks import seed_step
from examples.workbench.training.self_training import Batch, self_training_losses

__all__ = ["learn"]

Outputs = dict[str, Segmentation]


def learn(
    step: int, batch: Batch, learners: Learners, settings: Settings, fabric: Fabric, *, log: bool
) -> dict[str, float]:
    """Learn from one batch, with one backward for the segmenter and the discriminators: their losses share no gradient.

    With several ranks every loss is that of the whole batch, and has the same value on each rank.

    Args:
        step: the step, counted from 0; together with the run's seed it seeds PyTorch's generator.
        batch: this rank's images by domain: `image [B, 3, H, W]`; for source and labelled images `label [B, H, W]`
            int64; for unlabelled images a mask `inside [B, H, W]` of the pixels that lie inside the image.
        learners: the networks and optimisers, which are changed in place.
        settings: the settings of the run.
        fabric: Lightning Fabric, for the precision and the ranks.
        log: return every figure, not only the segmentation loss.

    Returns:
        The step's row of the history.

    Raises:
        InputError: the loss is not finite. No network has learnt from it.
    """
    segmenter, weights = learners.segmenter, learners.weights
    learners.set_learning_rates(step)
    seed_step(settings.seed, step, fabric.global_rank)
    with fabric.autocast():
        outputs: Outputs = {
            domain: segmenter(part["image"])
            for domain, part in batch.items()
            if domain != "unlabelled" or settings.segments_unlabelled
        }

    # The segmenter's loss: cross-entropy on source and labelled images, and the confusion loss of each discriminator.
    segmentation = torch.zeros((), device=fabric.device)
    for domain, part in batch.items():
        if "label" in part:
            weight = weights["source"](step) if domain == "source" else 1.0
            segmentation = segmentation + weight * _supervised_loss(outputs[domain], part["label"], settings)
    alignments = _align(outputs, batch, learners, settings)
    loss, applied = segmentation, {name: weights[name](step) for name in alignments}
    if "semantic" in alignments and settings.semantic_alignment.balanced:
        confusion, features = alignments["semantic"].confusion, outputs["labelled"].features
        applied["semantic"] = float(semshift.balanced_weight(segmentation, confusion, features, applied["semantic"]))
    for name, losses in alignments.items():
        loss = loss + applied[name] * losses.confusion

    # Not in the paper: a teacher labels unlabelled images, and a contrast loss pulls pixels to their class's prototype.
    self_training: dict[str, Tensor] = {}
    if learners.teacher is not None:
        self_training = self_training_losses(step, outputs, batch, learners, settings, fabric)
    for name, value_of in self_training.items():
        loss = loss + weights[name](step) * value_of
    value = float(loss.detach())
    if not math.isfinite(value):
        raise InputError(
            f"expected a finite loss, got {value} at step {step}: lower the learning rate or the weights of the "
            "adversarial losses"
        )
    row = {"step": step, "loss/segmentation": float(segmentation.detach())}
    if log:
        row |= feature_figures(outputs, batch, segmentation, settings, ranks=fabric.world_size)
        for name, value_of in self_training.items():
            row |= {f"loss/{name}": float(value_of.detach()), f"weight/{name}": weights[name](step)}
        for name, losses in alignments.items():
            reached = outputs["labelled" if name == "semantic" else "unlabelled"]
            row |= alignment_figures(name, losses, applied[name], reached, ranks=fabric.world_size)
            # The weight as in the settings: for a balanced alignment this is the ratio.
            row[f"weight/{name}"] = weights[name](step)

    # The losses of the discriminators that learn at this step.
    learning = [name for name in alignments if step % settings.alignments[name].every == 0]
    for name in learning:
        loss = loss + alignments[name].discriminator
        if settings.alignments[name].r1 > 0:
            loss = loss + settings.alignments[name].r1 * _penalty(name, outputs, batch, learners, settings)
    _update(loss, ["segmenter", *learning], learners, fabric)
    return row


def _align(
    outputs: Outputs, batch: Batch, learners: Learners, settings: Settings
) -> dict[str, semshift.AlignmentLosses]:
    """The losses of every alignment.

    The global discriminator sees output maps of source and unlabelled images; the semantic discriminator sees
    prototypes of source and labelled images.
    """
    losses: dict[str, semshift.AlignmentLosses] = {}
    if settings.segments_unlabelled and settings.global_alignment.inputs == "balanced":
        for domain in ("source", "labelled"):
            learners.class_counts.add(domain, batch[domain]["label"])
    for name, align in learners.alignments.items():
        if name == "semantic":
            source, target = outputs["source"].features, outputs["labelled"].features
            losses[name] = align(source, batch["source"]["label"], target, batch["labelled"]["label"])
        else:
            losses[name] = align(*_output_maps(name, outputs, batch, learners, settings))
    return losses


def _update(loss: Tensor, learning: Sequence[str], learners: Learners, fabric: Fabric) -> None:
    """Run the backward, and step the optimisers of the networks that learn at this step."""
    networks = (learners.segmenter, *learners.alignments.values())
    for network in networks:
        network.zero_grad()
    fabric.backward(loss)
    for network in networks:
        semshift.average_gradients(network.parameters())
    for name in learning:
        learners.optimisers[name].step()
    if learners.teacher is not None:
        learners.teacher.update_parameters(learners.segmenter)


def _supervised_loss(output: Segmentation, labels: Tensor, settings: Settings) -> Tensor:
    """Mean cross-entropy over the labelled pixels of all ranks, plus the weighted one of the auxiliary classifier."""
    ignore_index = settings.data.ignore_index
    pixels = semshift.all_reduce_sum((labels != ignore_index).sum()).clamp(min=1)

    def cross_entropy(logits: Tensor) -> Tensor:
        wide = upsample(logits, labels.shape[-2:])
        total = F.cross_entropy(wide, labels, ignore_index=ignore_index, reduction="sum")
        return semshift.all_reduce_sum(total) / pixels

    loss = cross_entropy(output.logits)
    if output.auxiliary is not None:
        loss = loss + settings.optimiser.auxiliary_weight * cross_entropy(output.auxiliary)
    return loss


def _output_maps(
    name: str, outputs: Outputs, batch: Batch, learners: Learners, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Logits of the reference images (`against`) and of the unlabelled images, at the images' size.

    With `balanced` inputs, the probabilities are divided by the class frequencies in the domain's labels so far. If the
    class frequencies differ between the domains, correct maps reveal the domain. Without this division, a segmenter
    that hides the domain would predict wrong classes.
    """
    how = settings.global_alignment

    def output_map(domain: str) -> Tensor:
        output = outputs[domain]
        logits = output.logits if name == "global" else output.auxiliary
        assert logits is not None  # an alignment called auxiliary exists only if the network has auxiliary logits
        logits = upsample(logits, batch[domain]["image"].shape[-2:])
        return logits - learners.class_counts.log_shares(domain)[:, None, None] if how.inputs == "balanced" else logits

    reference = ("source", "labelled") if how.against == "both" else (how.against,)
    return torch.cat([output_map(domain).detach() for domain in reference]), output_map("unlabelled")


def _penalty(name: str, outputs: Outputs, batch: Batch, learners: Learners, settings: Settings) -> Tensor:
    """R1 penalty of a discriminator at its source inputs: the mean over the inputs of all ranks that count."""
    alignment = learners.alignments[name]
    if isinstance(alignment, semshift.SemanticAlignment):
        pooled = semshift.class_sums(
            outputs["source"].features.detach(),
            batch["source"]["label"],
            len(settings.data.classes),
            ignore_index=settings.data.ignore_index,
            resample=alignment.resample,
            per_image=alignment.per_image,
        )
        if not alignment.per_image:
            pooled = semshift.ClassSums(semshift.all_reduce_sum(pooled.sums), semshift.all_reduce_sum(pooled.mass))
        source, mask = pooled.means, pooled.present & alignment.seen[1]
    else:
        source = _output_maps(name, outputs, batch, learners, settings)[0].softmax(1)
        source = semshift.entropy_map(source) if alignment.inputs == "entropy" else source
        mask = torch.ones(len(source), dtype=torch.bool, device=source.device)
    source = source.detach().requires_grad_()
    penalty = semshift.r1_penalty(alignment.discriminator(source), source, sample_dims=mask.dim(), weight=mask)
    count = mask.sum().to(penalty.dtype)
    total = semshift.all_reduce_sum(count)
    return semshift.all_reduce_sum(penalty * (count / torch.where(total > 0, total, 1.0)))
