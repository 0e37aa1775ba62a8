"""Training from a run folder's beginning, or its last checkpoint, to its metrics; `step` has what the paper has."""

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from tqdm import tqdm

import semshift
from examples.workbench.data.images import Images, open_images
from examples.workbench.data.loading import load_batches
from examples.workbench.data.samples import labelled_subset
from examples.workbench.errors import InputError, MachineError
from examples.workbench.networks.build import build_segmenter, dtype_of, load_init
from examples.workbench.reporting.scores import Scores, evaluate, illustrate, subset_means
from examples.workbench.settings import Settings
from examples.workbench.training import checkpoints, signals
from examples.workbench.training import run_folder as runs
from examples.workbench.training.domains import choose_domains
from examples.workbench.training.health import compact, machine_figures, recent_rows, warn
from examples.workbench.training.learners import build_learners, build_schedules
from examples.workbench.training.ranks import run_on_first_rank, share, start, synchronise_batch_norm
from examples.workbench.training.step import learn

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
    plus = settings.self_training
    labelled = labelled_subset(
        len(images.target), len(images.target) if settings.method == "oracle" else settings.labelled
    )
    fabric = start(settings, loggers=TensorBoardLogger(out, name="tensorboard", version=""))
    rank, ranks, first = fabric.global_rank, fabric.world_size, fabric.is_global_zero
    dtype = dtype_of(settings)
    own = share(settings, ranks)
    # Before the run folder is made, so that a bad file leaves none; a run that goes on has them in its checkpoint.
    segmenter = build_segmenter(settings)
    synchronise_batch_norm(segmenter, fabric)
    if settings.network.init is not None and not checkpoints.has_checkpoint(out):
        loaded = load_init(settings, segmenter)
        if first:
            tqdm.write(str(loaded), file=sys.stderr)
    names = [images.target.names[i] for i in labelled]
    run_on_first_rank(fabric, lambda: run_folder.prepare_folder(out, settings, resume=resume))

    learners = build_learners(settings, segmenter.to(fabric.device, dtype))
    networks, stateful, teacher = learners.networks(), learners.stateful(), learners.teacher
    schedules = build_schedules(settings)
    if first:
        tqdm.write(str(estimate_memory(own, segmenter, learners.discriminators)), file=sys.stderr)
    domains = choose_domains(own, images, labelled, discriminators=learners.discriminators, progress=first)
    starts = [how.start for how in learners.discriminator_settings.values()]
    starts += [plus.start] if teacher is not None else []
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
    with runs.lock_folder(out) if first else contextlib.nullcontext(), signals.defer_signals() as pending, bar:
        run = run_folder.run_identity(settings, images)
        progress = checkpoints.load_checkpoint(out, stateful, learners.pixels, run)
        if fabric.broadcast(progress.step) != progress.step:
            raise MachineError(f"expected every rank to see the same checkpoints in {out}, got others on rank {rank}")
        run_on_first_rank(fabric, lambda: run_folder.describe_run(out, settings, names))
        run_on_first_rank(fabric, lambda: run_folder.read_history(out, before=progress.step))
        recent = recent_rows(run_folder.read_history(out), settings)
        sampler = semshift.MixedBatchSampler(
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
        drawn = load_batches(domains.training, sampler, workers=settings.data.workers, timeout=settings.data.timeout)
        for step, batch in signals.load_until_stopped(drawn, pending):
            if step == adaptation_starts and first:
                checkpoints.save_weights(out / checkpoints.BEFORE, {"segmenter": segmenter})
            batch = fabric.to_device(batch)
            for part in batch.values():
                part["image"] = part["image"].to(dtype)
            log = step % settings.log_every == 0 or step == settings.steps - 1
            row = learn(step, batch, learners, schedules, settings, fabric, log=log)
            if log and first:
                now = time.monotonic()
                images_seen = (step + 1 - since[0]) * ranks * sum(domains.per_batch.values())
                row |= machine_figures(images_seen, now - since[1], fabric.device)
                since = (step + 1, now)
                run_folder.append_history(out, row)
                fabric.log_dict({name: value for name, value in row.items() if name != "step"}, step)
                recent.append(row)
                warn(out, recent, settings)
                bar.set_postfix_str(compact(row), refresh=False)
            bar.update()
            last = step + 1 == settings.steps
            if settings.validate_every and ((step + 1) % settings.validate_every == 0 or last):
                miou = score("validation").miou
                if first:
                    run_folder.append_history(out, {"step": step, VALIDATION: miou})
                if progress.best is None or miou > progress.best[0]:
                    progress = progress._replace(best=(miou, step + 1))
                    if first:
                        checkpoints.save_weights(out / checkpoints.BEST, networks, step=step + 1, miou=miou)
            write, stop = signals.agree_on_signals(pending, fabric.device)
            if write or last or (step + 1) % settings.save_every == 0:
                progress = progress._replace(step=step + 1)
                if first:
                    checkpoints.save_checkpoint(out, progress, stateful, learners.pixels, run)
            if stop:
                raise signals.Stopped(stop, f"{out} has a checkpoint of step {step + 1}, --resume goes on from it")
            done = step + 1
        if done < settings.steps:
            _, stop = signals.agree_on_signals(pending, fabric.device)
            if first:
                checkpoints.save_checkpoint(out, progress._replace(step=done), stateful, learners.pixels, run)
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
        "curve": [[row["step"] + 1, row[VALIDATION]] for row in run_folder.read_history(out) if VALIDATION in row],
        "resumed_from": list(progress.resumed_from),
        "seconds": round(time.monotonic() - began, 1),
        "device": str(fabric.device),
        "ranks": ranks,
        "versions": {"semshift": semshift.__version__, "torch": torch.__version__, "numpy": np.__version__},
    }
    if first:
        run_folder.write_metrics(out, metrics)
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
    """Draw the report: the segmenter before `first_step`, before any confusion loss, beside the final one."""
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
            history=run_folder.read_history(out),
        )
    except InputError as error:
        # The run is done, and a picture is not worth it.
        tqdm.write(f"no report: {error}", file=sys.stderr)
