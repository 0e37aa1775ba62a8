"""Training of one run, from an empty folder or its last checkpoint to its metrics. The paper's method is `step.py`."""

import contextlib
import json
import signal
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from torch import nn

import semshift
from examples.workbench.data.classes import describe_absent, find_absent, require_labels
from examples.workbench.data.images import Images, open_images
from examples.workbench.data.loading import TrainingSet, load_batches
from examples.workbench.errors import InputError, MachineError
from examples.workbench.files import write_whole
from examples.workbench.networks.build import build_segmenter, dtype_of, load_init
from examples.workbench.progress import bar, say, time_left
from examples.workbench.reporting.predictions import draw_predictions
from examples.workbench.reporting.report import draw_report
from examples.workbench.reporting.scores import Scores, evaluate, subset_means
from examples.workbench.settings import Settings
from examples.workbench.training import checkpoints, run_folder, signals
from examples.workbench.training.domains import batch_sizes, choose_domains, rare_class_draws
from examples.workbench.training.health import (
    format_row,
    machine_figures,
    shorten_row,
    warn,
    warn_once,
    window,
)
from examples.workbench.training.learners import Learners, build_learners
from examples.workbench.training.ranks import launch_fabric, run_on_first_rank, synchronise_batch_norm
from examples.workbench.training.step import learn

__all__ = ["train"]

VALIDATION = "miou/validation"
"""Key of the validation images' mIoU in the history."""
BAR = "{desc} {n_fmt}/{total_fmt} {remaining} left{postfix} |{bar}|"
"""Format of the training bar. The important parts come first, since tqdm cuts off the end in a narrow terminal."""


@dataclass(frozen=True, eq=False)
class _Run:
    """The parts of a run that stay the same over its steps; `final` is the network that is evaluated."""

    settings: Settings
    out: Path
    images: Images
    fabric: Fabric
    learners: Learners
    training: TrainingSet
    sampler: semshift.MixedBatchSampler
    final: nn.Module

    @property
    def first(self) -> bool:
        """Whether this rank writes the files."""
        return bool(self.fabric.is_global_zero)

    @property
    def adaptation_start(self) -> int:
        """The first step whose loss may include more than cross-entropy."""
        settings = self.settings
        starts = [how.start for how in settings.alignments.values()]
        if "self-training" in settings.parts:
            starts.append(settings.self_training.start)
        return min(settings.steps - 1, min((round(start * settings.steps) for start in starts), default=0))


def train(
    settings: Settings,
    out: Path,
    *,
    data_root: Path | None = None,
    resume: bool = False,
    save_predictions: bool = False,
) -> dict[str, Any]:
    """Train one method, evaluate it on the test images, and write a run folder.

    Under torchrun every process calls this function. Each process handles its share of a step's images. All compute the
    losses of the whole batch, gradients are averaged, and the first process writes the files.

    Args:
        settings: the settings of the run.
        out: the run folder. A folder that already holds a run is refused unless `resume` is true.
        data_root: folder that contains the settings' image folders; not needed for the built-in scenes.
        resume: continue from the folder's last undamaged checkpoint; without checkpoints, start at step 0.
        save_predictions: write the predicted masks of the test images to `out/predictions`.

    Returns:
        The contents of `out/metrics.json`.

    Raises:
        Stopped: a signal stopped the run, after a step and its checkpoint.
    """
    started = time.monotonic()
    try:
        run = _prepare(settings, out, data_root, resume, save_predictions)
        with run_folder.lock_folder(out) if run.first else contextlib.nullcontext():
            try:
                progress = _train_steps(run, resume)
                return _finish(run, progress, started, save_predictions)
            finally:
                # TensorBoard gets the last rows, whatever ends the run.
                run.fabric.logger.finalize("")
    except KeyboardInterrupt as stop:
        signum = getattr(stop, "signum", signal.SIGINT)
        raise signals.Stopped(signum, checkpoints.describe_kept(out)) from None


def _prepare(settings: Settings, out: Path, data_root: Path | None, resume: bool, save_predictions: bool) -> _Run:
    """Open the images, load the weights, create the run folder and build the learners; a bad file leaves no folder."""
    images, data, plus = open_images(settings, data_root), settings.data, settings.self_training
    if save_predictions and images.test is None:
        raise InputError("--save-predictions needs test images in data.test, got no folder")
    fabric = launch_fabric(settings, loggers=TensorBoardLogger(out, name="tensorboard", version=""))
    first = bool(fabric.is_global_zero)
    domains = choose_domains(settings, images)
    per_batch = batch_sizes(settings, domains, fabric.world_size)
    if settings.network.frozen_batch_norm and settings.network.init is None:
        raise InputError("network.frozen_batch_norm needs network.init, whose statistics it keeps, got none")
    segmenter = build_segmenter(settings, run_folder.network_file(out))
    synchronise_batch_norm(segmenter, fabric)
    # A resumed run loads its weights from its checkpoint.
    loaded = None if checkpoints.has_checkpoint(out) else load_init(settings, segmenter)
    if first and loaded is not None:
        say(str(loaded))

    def prepare_folder() -> None:
        absent = _check_classes(settings, images)
        run_folder.prepare_folder(out, settings, resume=resume)
        for split, words in absent.items():
            warn_once(out, 0, f"classes {split}", f"data.{split}: {words}")

    run_on_first_rank(fabric, prepare_folder)
    draws = {}
    if "self-training" in settings.parts and plus.rare_classes:
        for domain in ("source", "labelled"):
            draws[domain] = rare_class_draws(domains[domain], settings, progress=domain if first else None)
    sampler = semshift.MixedBatchSampler(
        {domain: len(samples) for domain, samples in domains.items()},
        per_batch,
        seed=settings.seed,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        steps=settings.steps,
        weights=draws,
    )
    crops = {domain: data.source_crop if domain == "source" else data.size for domain in domains}
    training = TrainingSet(domains, crops, data.augmentation, settings.seed, ignore_index=data.ignore_index)
    learners = build_learners(settings, segmenter.to(fabric.device, dtype_of(settings)))
    final = segmenter if learners.teacher is None or settings.final == "segmenter" else learners.teacher.module
    return _Run(settings, out, images, fabric, learners, training, sampler, final)


def _check_classes(settings: Settings, images: Images) -> dict[str, str]:
    """Warnings, by split, about classes without a pixel in the labels. Labelled images without labels are refused."""
    absent: dict[str, str | None] = {}
    if "labelled" in settings.parts:
        pixels = require_labels(images.labelled, settings.data, progress="labels of labelled")
        absent["labelled"] = describe_absent(pixels, settings.data, len(images.labelled))
    for split in ("source", "validation", "test"):
        samples = getattr(images, split)
        if samples is not None and (split != "source" or "source" in settings.parts):
            absent[split] = find_absent(samples, settings.data, seconds=10, progress=f"labels of {split}")
    return {split: words for split, words in absent.items() if words is not None}


def _train_steps(run: _Run, resume: bool) -> checkpoints.Progress:
    """Take all remaining steps, unless a signal stops the run after one of them."""
    settings, out, fabric, learners, data = run.settings, run.out, run.fabric, run.learners, run.settings.data
    identity = run_folder.run_identity(settings, run.images._asdict())
    shown = bar(total=settings.steps, desc=settings.method, bar_format=BAR, disable=not run.first)
    with signals.defer_signals() as pending, shown:
        progress = _resume(run, identity)
        if resume and run.first:
            done, here = progress.step, f"no checkpoint in {out}: starting"
            say(f"{f'resuming {out}' if progress.resumed_from else here} at step {done} of {settings.steps}")
        rows = (row for row in run_folder.read_history(out) if VALIDATION not in row)
        recent = deque(rows, maxlen=window(settings))
        shown.initial = shown.n = done = progress.step
        since, stop = (done, time.monotonic()), 0
        start = since
        ranks, images = fabric.world_size, run.sampler.per_batch
        sampler = run.sampler.resume(done, rank=fabric.global_rank, world_size=ranks, per_batch=images)
        loaded = load_batches(run.training, sampler, workers=data.workers, timeout=data.timeout)
        for step, batch in signals.load_until_stopped(loaded, pending):
            if step == run.adaptation_start and run.first:
                checkpoints.save_weights(out / checkpoints.BEFORE, {"segmenter": learners.segmenter})
            batch = fabric.to_device(batch)
            for part in batch.values():
                part["image"] = part["image"].to(dtype_of(settings))
            done, last = step + 1, step + 1 == settings.steps
            log = step % settings.log_every == 0 or last
            row = learn(step, batch, learners, settings, fabric, log=log)
            if log and run.first:
                now = time.monotonic()
                seen = (done - since[0]) * ranks * sum(images.values())
                row |= machine_figures(seen, now - since[1], fabric.device)
                since = (done, now)
                run_folder.append_history(out, row)
                rates = {f"learning_rate/{name}": rate(step) for name, rate in learners.learning_rates.items()}
                fabric.log_dict({name: value for name, value in (row | rates).items() if name != "step"}, step)
                recent.append(row)
                warn(out, recent, settings)
                shown.set_postfix_str(shorten_row(row), refresh=False)
                if shown.disable:
                    left = time_left((settings.steps - done) * (now - start[1]) / (done - start[0]))
                    say(f"{settings.method} step {done}/{settings.steps}: {format_row(row)}, {left}")
            shown.update()
            if settings.validate_every and (done % settings.validate_every == 0 or last):
                progress = _validate(run, progress, done)
            progress = progress._replace(step=done)
            write, stop = signals.agree_on_signals(pending, fabric.device)
            if stop:
                break
            if run.first and (write or last or done % settings.save_every == 0):
                checkpoints.save_checkpoint(out, progress, learners.stateful(), identity)
        if stop or done < settings.steps:
            # If the signal ended the processes that load images, the ranks have not yet agreed to stop.
            stop = stop or signals.agree_on_signals(pending, fabric.device)[1]
            if run.first:
                checkpoints.save_checkpoint(out, progress, learners.stateful(), identity)
            raise signals.Stopped(stop)
    return progress


def _resume(run: _Run, identity: Mapping[str, Any]) -> checkpoints.Progress:
    """Load the last checkpoint on every rank, and remove later rows from the history."""
    progress = checkpoints.load_checkpoint(run.out, run.learners.stateful(), identity)
    if run.fabric.broadcast(progress.step) != progress.step:
        where = f"{run.out} on rank {run.fabric.global_rank}"
        raise MachineError(f"every rank must find the same checkpoints, got different ones in {where}")

    def describe() -> None:
        run_folder.describe_run(run.out, run.settings, run.images.labelled.names)
        run_folder.save_network_file(run.out, run.learners.segmenter)
        run_folder.read_history(run.out, before=progress.step)

    run_on_first_rank(run.fabric, describe)
    return progress


def _validate(run: _Run, progress: checkpoints.Progress, done: int) -> checkpoints.Progress:
    """Evaluate on the validation images, and save the network if it is the best so far."""
    miou = _score(run, "validation").miou
    assert miou is not None
    if run.first:
        run_folder.append_history(run.out, {"step": done - 1, VALIDATION: miou})
        _log_validation(run, done - 1, miou)
    if progress.best is not None and miou <= progress.best[0]:
        return progress
    if run.first:
        checkpoints.save_weights(run.out / checkpoints.BEST, run.learners.networks(), step=done, miou=miou)
    return progress._replace(best=(miou, done))


def _log_validation(run: _Run, step: int, miou: float) -> None:
    """Log the mIoU on the validation images, and predictions on a few of them, to TensorBoard."""
    run.fabric.log(VALIDATION, miou, step)
    network, training, logger = run.final, run.final.training, cast(TensorBoardLogger, run.fabric.logger)
    assert run.images.validation is not None
    pictures = draw_predictions(network.eval(), run.images.validation, run.settings.data)
    network.train(training)
    for index, picture in enumerate(pictures):
        logger.experiment.add_image(f"predictions/{index}", picture, step, dataformats="HWC")


def _score(run: _Run, split: str, predictions: Path | None = None) -> Scores:
    """Evaluate the final network, then restore its mode."""
    network, training = run.final, run.final.training
    network.eval()
    scores = evaluate(
        network,
        getattr(run.images, split),
        run.settings.data,
        predictions=predictions,
        progress=split if run.first else None,
        rank=run.fabric.global_rank,
        world_size=run.fabric.world_size,
    )
    network.train(training)
    return scores


def _finish(run: _Run, progress: checkpoints.Progress, started: float, save_predictions: bool) -> dict[str, Any]:
    """Evaluate on the test images, draw the report and write the metrics."""
    settings, out = run.settings, run.out
    no_scores = Scores({}, None, [])
    test = (
        no_scores if run.images.test is None else _score(run, "test", out / "predictions" if save_predictions else None)
    )
    # The published splits use the same images for validation and test.
    once = settings.data.validation is not None and settings.data.validation == settings.data.test
    validation = test if once else no_scores if run.images.validation is None else _score(run, "validation")
    if run.first:
        if not settings.validate_every and validation.miou is not None:
            _log_validation(run, settings.steps - 1, validation.miou)
        _report(run, test)
    metrics = {
        "method": settings.method,
        "labelled": len(run.images.labelled),
        "seed": settings.seed,
        "steps": settings.steps,
        "num_classes": len(settings.data.classes),
        "miou": test.miou,
        "iou": test.iou,
        "unlabelled": test.unlabelled,
        "subsets": subset_means(test.iou, settings.data.subsets) if test.iou else {},
        "validation": validation._asdict(),
        "best": progress.best and {"validation": progress.best[0], "step": progress.best[1]},
        "curve": [[row["step"] + 1, row[VALIDATION]] for row in run_folder.read_history(out) if VALIDATION in row],
        "resumed_from": list(progress.resumed_from),
        "seconds": round(time.monotonic() - started, 1),
        "device": str(run.fabric.device),
        "ranks": run.fabric.world_size,
        "versions": {"semshift": semshift.__version__, "torch": torch.__version__, "numpy": np.__version__},
    }
    if run.first:
        write_whole(out / "metrics.json", lambda path: path.write_text(json.dumps(metrics, indent=2) + "\n"))
    return metrics


def _report(run: _Run, test: Scores) -> None:
    settings, out, final = run.settings, run.out, run.final.eval()
    before = build_segmenter(settings, run_folder.network_file(out)).to(next(final.parameters())).eval()
    try:
        before.load_state_dict(checkpoints.load_weights(out / checkpoints.BEFORE))
        draw_report(
            out / "report.png",
            settings,
            run.images.source,
            # Without validation images, show labelled images that were trained on.
            run.images.labelled if run.images.validation is None else run.images.validation,
            title=f"{settings.method}: {_describe_scores(test, run.images)}",
            before=(f"step {run.adaptation_start}", before),
            after=(f"step {settings.steps}", final),
            history=run_folder.read_history(out),
        )
    except ValueError as error:
        # The training is finished, and its metrics matter more than the figure.
        say(f"no report: {error}")


def _describe_scores(test: Scores, images: Images) -> str:
    if test.miou is None or images.test is None:
        shown = "labelled images that were trained on" if images.validation is None else "validation images"
        return f"not scored, {shown} below"
    counted = sum(value is not None for value in test.iou.values())
    return f"mIoU {100 * test.miou:.1f} over {counted} of {len(test.iou)} classes on {len(images.test)} test images"
