"""Training: ASS and its simpler relatives, top to bottom as in the paper (Wang et al. 2020, arXiv 2004.00794)."""

import contextlib
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import semshift
from examples.ass import checkpoints, runs, signals
from examples.ass.build import (
    build_adversaries,
    build_critic,
    build_optimiser,
    build_segmenter,
    load_init,
    source_schedule,
    weight_schedule,
)
from examples.ass.checks import check
from examples.ass.data import InputError, batches, labelled_subset
from examples.ass.domains import choose_domains
from examples.ass.evaluate import Scores, evaluate, illustrate, subset_means
from examples.ass.faults import MachineError
from examples.ass.images import Images, open_images
from examples.ass.memory import estimate_memory
from examples.ass.ranks import first_alone, seed_step, share, start, whole_batch_norm
from examples.ass.self_training import soft_weights, taught, taught_cross_entropy
from examples.ass.settings import METHODS, Settings
from examples.ass.views import View, count_pixels, global_view, gradient_penalty, semantic_view, supervised_loss
from examples.ass.watch import compact, feature_figures, machine_figures, recent_rows, term_figures, warn
from semshift.discriminators import frozen
from semshift.distributed import average_gradients
from semshift.prototypes import PrototypeBank
from semshift.sampling import MixedBatchSampler
from semshift.schedules import Polynomial

__all__ = ["train"]

VALIDATION = "miou/validation"
"""What the history calls the mIoU of the looks at the validation images on the way."""


def train(
    settings: Settings,
    out: Path,
    *,
    data_root: Path | None = None,
    resume: bool = False,
    save_predictions: bool = False,
) -> dict[str, Any]:
    """Train one method, evaluate it on the test images, and leave a run folder.

    Under torchrun every process calls it. Each takes its share of a step's images, all compute the losses of the whole
    batch, gradients are averaged, and the first process writes what there is to write.

    Args:
        settings: the run.
        out: the run folder; one that holds a run is refused unless `resume`.
        data_root: where the settings' folders lie; not needed for the built-in scenes.
        resume: go on from the folder's last whole checkpoint; without any, start at step 0.
        save_predictions: write the test set's index masks to `out/predictions`.

    Returns:
        What stands in `out/metrics.json`.

    Raises:
        InputError: settings, images or the run folder are not fit for it, or the loss is no longer finite.
        MachineError: the run folder cannot be written, or another process writes to it.
        Stopped: by a signal, after a step and its checkpoint.
    """
    began = time.monotonic()
    check(settings)
    images = open_images(settings, data_root)
    uses, plus = METHODS[settings.method], settings.self_training
    labelled = labelled_subset(
        len(images.target), len(images.target) if settings.method == "oracle" else settings.labelled
    )
    fabric = start(settings, loggers=TensorBoardLogger(out, name="tensorboard", version=""))
    rank, ranks, first = fabric.global_rank, fabric.world_size, fabric.is_global_zero
    dtype = torch.float64 if settings.precision == "64-true" else torch.float32
    own = share(settings, ranks)
    # Before the run folder is made, so that a bad file leaves none; a run that goes on has them in its checkpoint.
    segmenter = build_segmenter(settings)
    whole_batch_norm(segmenter, fabric)
    if settings.network.init is not None and not checkpoints.begun(out):
        loaded = load_init(settings, segmenter)
        if first:
            tqdm.write(str(loaded), file=sys.stderr)
    names = [images.target.names[i] for i in labelled]
    first_alone(fabric, lambda: runs.prepare(out, settings, resume=resume))

    # The networks and how they learn. Which of them exist is all that tells the methods apart.
    segmenter = segmenter.to(fabric.device, dtype)
    optimiser = build_optimiser(settings, segmenter)
    decay_steps = settings.optimiser.decay_steps or settings.steps
    learning_rate = Polynomial(settings.optimiser.learning_rate, decay_steps, power=settings.optimiser.power)
    adversaries = build_adversaries(settings)
    critics = {name: build_critic(name, settings, segmenter).to(fabric.device, dtype) for name in adversaries}
    critic_optimisers = {
        name: torch.optim.Adam(critic.parameters(), adversaries[name].learning_rate, betas=(0.9, 0.99))
        for name, critic in critics.items()
    }
    critic_rates = {
        name: Polynomial(adversary.learning_rate, decay_steps, power=adversary.power)
        for name, adversary in adversaries.items()
    }
    if first:
        tqdm.write(str(estimate_memory(own, segmenter, critics)), file=sys.stderr)
    source_weight = source_schedule(settings)
    weights = {name: weight_schedule(adversary, settings.steps) for name, adversary in adversaries.items()}
    classes = len(settings.data.classes)
    teacher: AveragedModel | None = None
    banks: dict[str, PrototypeBank] | None = None
    if "self-training" in uses:
        teacher = AveragedModel(segmenter, multi_avg_fn=get_ema_multi_avg_fn(plus.momentum))  # type: ignore[no-untyped-call]
        teacher.eval()
        weights["self-training"] = weight_schedule(plus, settings.steps)
        if plus.bank and "semantic" in adversaries:
            banks = {
                domain: PrototypeBank(classes, segmenter.feature_channels).to(fabric.device, dtype)
                for domain in ("source", "labelled")
            }
    pixels = {
        domain: torch.zeros(classes, dtype=torch.int64, device=fabric.device) for domain in ("source", "labelled")
    }

    # A checkpoint is these and the step: everything else is a function of the settings and the step.
    networks: dict[str, checkpoints.Stateful] = {"segmenter": segmenter}
    if teacher is not None:
        networks |= {"teacher": teacher}
    stateful = {**networks, "optimiser": optimiser}
    for name in critics:
        stateful |= {f"{name} critic": critics[name], f"{name} critic optimiser": critic_optimisers[name]}
    for domain, bank in (banks or {}).items():
        stateful |= {f"{domain} bank": bank}
    fabric_optimiser = fabric.setup_optimizers(optimiser)
    assert not isinstance(fabric_optimiser, tuple)  # one in, one out

    domains = choose_domains(own, images, labelled, adversaries=critics, progress=first)
    starts = [adversary.start for adversary in adversaries.values()] + ([plus.start] if teacher is not None else [])
    adaptation_starts = min(
        [*(round(start * settings.steps) for start in starts), settings.steps - 1] if starts else [0]
    )

    final = teacher.module if teacher is not None and plus.final == "teacher" else segmenter

    def score(split: str, predictions: Path | None = None) -> Scores:
        """Evaluate the network that counts, and leave it as it was."""
        final.eval()
        scores = evaluate(
            final,
            getattr(images, split),
            classes=settings.data.classes,
            size=settings.data.size,
            ignore_index=settings.data.ignore_index,
            predictions=predictions,
            progress=split if first else None,
            rank=rank,
            world_size=ranks,
        )
        final.train(final is segmenter)
        return scores

    bar = tqdm(total=settings.steps, desc=settings.method, unit="step", disable=not first)
    with runs.locked(out) if first else contextlib.nullcontext(), signals.held() as heard, bar:
        run = runs.identity(settings, images)
        progress = checkpoints.load_checkpoint(out, stateful, pixels, run)
        if fabric.broadcast(progress.step) != progress.step:
            raise MachineError(f"expected every rank to see the same checkpoints in {out}, got others on rank {rank}")
        first_alone(fabric, lambda: runs.describe(out, settings, names))
        first_alone(fabric, lambda: runs.read_history(out, before=progress.step))
        recent = recent_rows(runs.read_history(out), settings)
        sampler = MixedBatchSampler(
            domains.sizes,
            domains.per_batch,
            seed=settings.seed,
            rank=rank,
            world_size=ranks,
            first_step=progress.step,
            steps=settings.steps - progress.step,
            weights=domains.weights,
        )
        bar.initial = bar.n = progress.step
        since, done = (progress.step, time.monotonic()), progress.step
        drawn = batches(domains.training, sampler, workers=settings.data.workers, timeout=settings.data.timeout)
        for step, batch in signals.while_loaded(drawn, heard):
            if step == adaptation_starts and first:
                checkpoints.save_weights(out / checkpoints.BEFORE, {"segmenter": segmenter})
            for group, factor in zip(optimiser.param_groups, (1.0, settings.optimiser.classifier_factor)):
                group["lr"] = factor * learning_rate(step)
            for name, critic_optimiser in critic_optimisers.items():
                critic_optimiser.param_groups[0]["lr"] = critic_rates[name](step)
            batch = fabric.to_device(batch)
            for part in batch.values():
                part["image"] = part["image"].to(dtype)
            seed_step(settings.seed, step, rank)

            # Segmenter: cross-entropy on every labelled image, and the discriminators, frozen, confused by the target.
            with fabric.autocast():
                outputs = {
                    domain: segmenter(part["image"])
                    for domain, part in batch.items()
                    if domain != "unlabelled" or domains.segments_unlabelled
                }
            segmentation_loss = torch.zeros((), device=fabric.device)
            for domain, part in batch.items():
                if "label" in part:
                    pixels[domain] += count_pixels(part["label"], classes)
                    weight = source_weight(step) if domain == "source" else 1.0
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
                if plus.soft_pooling and "semantic" in critics:
                    grid = outputs["unlabelled"].features.shape[-2:]
                    inside = batch["unlabelled"]["inside"]
                    soft = soft_weights(teacher_logits, inside, (grid[0], grid[1]), threshold=plus.threshold)

            views: dict[str, View] = {}
            for name in ("global", "auxiliary"):
                if name in critics:
                    views[name] = global_view(outputs, pixels, settings, auxiliary=name == "auxiliary")
            if "semantic" in critics:
                views["semantic"] = semantic_view(outputs, batch, pixels, settings, banks=banks, soft_weights=soft)
            terms = {
                name: view.confusion_loss(frozen(critics[name])(view.target), weight=view.confusion_weight)
                for name, view in views.items()
            }
            loss = segmentation_loss
            for name, term in terms.items():
                loss = loss + weights[name](step) * term
            if self_training_loss is not None:
                loss = loss + weights["self-training"](step) * self_training_loss
            value = float(loss.detach())
            log = step % settings.log_every == 0 or step == settings.steps - 1
            if not math.isfinite(value):
                raise InputError(
                    f"expected a finite loss, got {value} at step {step}: lower the learning rate or the "
                    f"adversaries' weights; {out} keeps its last checkpoint"
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
                    row |= term_figures(
                        name, term, weights[name](step), [outputs[domain] for domain in reached], ranks=ranks
                    )
            fabric_optimiser.zero_grad()
            fabric.backward(loss)
            average_gradients(segmenter.parameters())
            fabric_optimiser.step()
            if teacher is not None:
                teacher.update_parameters(segmenter)

            # Discriminators: source against target, on detached inputs.
            for name, view in views.items():
                adversary = adversaries[name]
                if step % adversary.every:
                    continue
                source = view.source.detach().requires_grad_(adversary.r1 > 0)
                source_logits, target_logits = critics[name](source), critics[name](view.target.detach())
                weighted = {"source_weight": view.source_weight, "target_weight": view.target_weight}
                critic_loss = view.discriminator_loss(source_logits, target_logits, **weighted)
                if adversary.r1 > 0:
                    critic_loss = critic_loss + adversary.r1 * gradient_penalty(source_logits, source, view)
                critic_optimisers[name].zero_grad()
                torch.autograd.backward(critic_loss)
                average_gradients(critics[name].parameters())
                critic_optimisers[name].step()
                if log:
                    accuracy = view.accuracy(source_logits, target_logits, **weighted)
                    row |= {
                        f"loss/{name}_critic": float(critic_loss.detach()),
                        f"accuracy/{name}_source": float(accuracy.source),
                        f"accuracy/{name}_target": float(accuracy.target),
                    }

            if log and first:
                now = time.monotonic()
                images_seen = (step + 1 - since[0]) * ranks * sum(domains.per_batch.values())
                row |= machine_figures(images_seen, now - since[1], fabric.device)
                since = (step + 1, now)
                runs.append_history(out, row)
                fabric.log_dict({name: value for name, value in row.items() if name != "step"}, step)
                recent.append(row)
                warn(out, recent, settings)
                bar.set_postfix_str(compact(row), refresh=False)
            bar.update()
            last = step + 1 == settings.steps
            if settings.validate_every and ((step + 1) % settings.validate_every == 0 or last):
                miou = score("validation").miou
                if first:
                    runs.append_history(out, {"step": step, VALIDATION: miou})
                if progress.best is None or miou > progress.best[0]:
                    progress = progress._replace(best=(miou, step + 1))
                    if first:
                        checkpoints.save_weights(out / checkpoints.BEST, networks, step=step + 1, miou=miou)
            write, stop = signals.agreed(heard, fabric.device)
            if write or last or (step + 1) % settings.save_every == 0:
                progress = progress._replace(step=step + 1)
                if first:
                    checkpoints.save_checkpoint(out, progress, stateful, pixels, run)
            if stop:
                raise signals.Stopped(stop, f"{out} has a checkpoint of step {step + 1}, --resume goes on from it")
            done = step + 1
        if done < settings.steps:
            _, stop = signals.agreed(heard, fabric.device)
            if first:
                checkpoints.save_checkpoint(out, progress._replace(step=done), stateful, pixels, run)
            raise signals.Stopped(stop, f"{out} has a checkpoint of step {done}, --resume goes on from it")

    scores = {"test": score("test", out / "predictions" if save_predictions else None)}
    # The published splits have one set for both.
    once = settings.data.validation is not None and settings.data.validation == settings.data.test
    scores["validation"] = scores["test"] if once else score("validation")
    final.eval()
    if first:
        _report(out, settings, images, scores["test"].miou, final, first_step=adaptation_starts, device=fabric.device)
    metrics = {
        "method": settings.method,
        "labelled": settings.labelled,
        "seed": settings.seed,
        "steps": settings.steps,
        "num_classes": len(settings.data.classes),
        "miou": scores["test"].miou,
        "iou": scores["test"].iou,
        "subsets": subset_means(scores["test"].iou, settings.data.subsets),
        "validation": scores["validation"]._asdict(),
        "best": progress.best and {"validation": progress.best[0], "step": progress.best[1]},
        "curve": [[row["step"] + 1, row[VALIDATION]] for row in runs.read_history(out) if VALIDATION in row],
        "resumed_from": list(progress.resumed_from),
        "seconds": round(time.monotonic() - began, 1),
        "device": str(fabric.device),
        "ranks": ranks,
        "versions": {"semshift": semshift.__version__, "torch": torch.__version__, "numpy": np.__version__},
    }
    if first:
        runs.write_metrics(out, metrics)
    return metrics


def _report(
    out: Path,
    settings: Settings,
    images: Images,
    miou: float,
    final: torch.nn.Module,
    *,
    first_step: int,
    device: torch.device,
) -> None:
    """Draw the report: the segmenter before `first_step`, when no adversary had reached it, beside the final one."""
    before = build_segmenter(settings).to(device, next(final.parameters()).dtype).eval()
    try:
        before.load_state_dict(checkpoints.load_weights(out / checkpoints.BEFORE))
        illustrate(
            out / "report.png",
            settings,
            images,
            title=f"{settings.method}: mIoU {100 * miou:.1f} on {len(images.test)} test images",
            before=(f"step {first_step}", before),
            after=(f"step {settings.steps}", final),
            history=runs.read_history(out),
        )
    except InputError as error:
        # The run is done, and a picture is not worth it.
        tqdm.write(f"no report: {error}", file=sys.stderr)
