"""One step of ASS and its simpler relatives, top to bottom as in the paper (Wang et al. 2020, arXiv 2004.00794)."""

import math
from collections.abc import Mapping

import torch
from lightning_fabric import Fabric
from torch import Tensor

import semshift
from examples.workbench.errors import InputError
from examples.workbench.settings import Settings
from examples.workbench.training.domains import segments_unlabelled
from examples.workbench.training.health import feature_figures, term_figures
from examples.workbench.training.learners import Learners, Schedules
from examples.workbench.training.ranks import seed_step
from examples.workbench.training.self_training import soft_weights, taught, taught_cross_entropy
from examples.workbench.training.views import (
    View,
    count_pixels,
    global_view,
    gradient_penalty,
    semantic_view,
    supervised_loss,
)

__all__ = ["learn"]


def learn(
    step: int,
    batch: dict[str, dict[str, Tensor]],
    learners: Learners,
    schedules: Schedules,
    settings: Settings,
    fabric: Fabric,
    *,
    log: bool,
) -> dict[str, float]:
    """Learn from a batch: the segmenter first, then the discriminators.

    PyTorch's generator is seeded by the run's seed and the step.

    Args:
        step: counted from 0.
        batch: this rank's share, by domain: `image [B, 3, H, W]`; of source and labelled images `label [B, H, W]`
            int64; of unlabelled ones `inside [B, H, W]` bool, which pixels are the image's own.
        learners: what learns, in place, at the rates of the step.
        schedules: their rates, and the weights of the losses.
        settings: of the run.
        fabric: the run's, for its precision and its ranks.
        log: return every figure, not only the segmentation loss.

    Returns:
        The step's row of the history.

    Raises:
        InputError: the segmenter's loss is not finite; no network has learnt from it.
    """
    segmenter, teacher, discriminators = learners.segmenter, learners.teacher, learners.discriminators
    plus, weights, rank, ranks = settings.self_training, schedules.weights, fabric.global_rank, fabric.world_size
    for group, factor in zip(learners.optimiser.param_groups, (1.0, settings.optimiser.classifier_factor)):
        group["lr"] = factor * schedules.learning_rate(step)
    for name, optimiser in learners.discriminator_optimisers.items():
        optimiser.param_groups[0]["lr"] = schedules.discriminator_rates[name](step)
    seed_step(settings.seed, step, rank)

    # Segmenter: cross-entropy on every labelled image, and the discriminators, frozen, confused by the target.
    with fabric.autocast():
        outputs = {
            domain: segmenter(part["image"])
            for domain, part in batch.items()
            if domain != "unlabelled" or segments_unlabelled(settings, discriminators)
        }
    segmentation_loss = torch.zeros((), device=fabric.device)
    for domain, part in batch.items():
        if "label" in part:
            learners.pixels[domain].add_(count_pixels(part["label"], len(settings.data.classes)))
            weight = schedules.source_weight(step) if domain == "source" else 1.0
            supervised = supervised_loss(outputs[domain], part["label"], settings)
            segmentation_loss = segmentation_loss + weight * supervised
    # Past ASS: the teacher labels the unlabelled images, to be learnt from and to be pooled by.
    self_training_loss, soft = None, None
    if teacher is not None and "unlabelled" in batch and step >= round(plus.start * settings.steps):
        with torch.no_grad(), fabric.autocast():
            teacher_logits = teacher(batch["unlabelled"]["image"]).logits
        if plus.weight > 0:
            mixed = taught(batch, teacher_logits, settings, step, rank=rank)
            with fabric.autocast():
                logits = segmenter(mixed.image).logits
            self_training_loss = taught_cross_entropy(logits, mixed)
        if plus.soft_pooling and "semantic" in discriminators:
            grid = outputs["unlabelled"].features.shape[-2:]
            inside = batch["unlabelled"]["inside"]
            soft = soft_weights(teacher_logits, inside, (grid[0], grid[1]), threshold=plus.threshold)

    views: dict[str, View] = {}
    for name in ("global", "auxiliary"):
        if name in discriminators:
            views[name] = global_view(outputs, learners.pixels, settings, auxiliary=name == "auxiliary")
    if "semantic" in discriminators:
        views["semantic"] = semantic_view(
            outputs, batch, learners.pixels, settings, banks=learners.banks, soft_weights=soft
        )
    terms = {
        name: view.confusion_loss(semshift.frozen(discriminators[name])(view.target), weight=view.confusion_weight)
        for name, view in views.items()
    }
    loss = segmentation_loss
    for name, term in terms.items():
        loss = loss + weights[name](step) * term
    if self_training_loss is not None:
        loss = loss + weights["self-training"](step) * self_training_loss
    value = float(loss.detach())
    if not math.isfinite(value):
        raise InputError(
            f"expected a finite loss, got {value} at step {step}: lower the learning rate or the weights of the "
            "adversarial losses"
        )
    row = {"step": step, "loss/segmentation": float(segmentation_loss.detach())}
    if log:
        row |= feature_figures(outputs, batch, segmentation_loss, settings, ranks=ranks)
        if self_training_loss is not None:
            row |= {
                "loss/self-training": float(self_training_loss.detach()),
                "weight/self-training": weights["self-training"](step),
            }
        for name, term in terms.items():
            reached = ["labelled"] if name == "semantic" else ["unlabelled"]
            reached += ["unlabelled"] if name == "semantic" and soft is not None else []
            row |= term_figures(name, term, weights[name](step), [outputs[domain] for domain in reached], ranks=ranks)
    learners.optimiser.zero_grad()
    fabric.backward(loss)
    semshift.average_gradients(segmenter.parameters())
    learners.optimiser.step()
    if teacher is not None:
        teacher.update_parameters(segmenter)

    # Discriminators: source against target, on detached inputs.
    for name, view in views.items():
        if step % learners.discriminator_settings[name].every == 0:
            row |= _tell_apart(name, view, learners, log=log)
    return row


def _tell_apart(name: str, view: View, learners: Learners, *, log: bool) -> Mapping[str, float]:
    discriminator, optimiser = learners.discriminators[name], learners.discriminator_optimisers[name]
    r1 = learners.discriminator_settings[name].r1
    source = view.source.detach().requires_grad_(r1 > 0)
    source_logits, target_logits = discriminator(source), discriminator(view.target.detach())
    weighted = {"source_weight": view.source_weight, "target_weight": view.target_weight}
    loss = view.discriminator_loss(source_logits, target_logits, **weighted)
    if r1 > 0:
        loss = loss + r1 * gradient_penalty(source_logits, source, view)
    optimiser.zero_grad()
    torch.autograd.backward(loss)
    semshift.average_gradients(discriminator.parameters())
    optimiser.step()
    if not log:
        return {}
    accuracy = view.accuracy(source_logits, target_logits, **weighted)
    return {
        f"loss/{name}_discriminator": float(loss.detach()),
        f"accuracy/{name}_source": float(accuracy.source),
        f"accuracy/{name}_target": float(accuracy.target),
    }
