"""Report of a run as one picture: predictions and IoU of two segmenters, the curves, and the prototypes."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import nn
from torchmetrics.classification import MulticlassJaccardIndex

from examples.scenes import Sample
from examples.workbench.data.samples import Samples
from examples.workbench.data_settings import Data
from examples.workbench.files import save_figure
from examples.workbench.reporting.predictions import choose_shown, paint_classes, spread
from examples.workbench.reporting.prototypes import draw_prototypes, pool_prototypes
from examples.workbench.reporting.scores import predict
from examples.workbench.reporting.style import BLUE, IGNORED, ORANGE, STRIPE, STYLE, class_colours
from examples.workbench.settings import Settings

__all__ = ["draw_report"]

_COLOURS = {"global": BLUE, "auxiliary": "#56B4E9", "semantic": ORANGE}
_STYLES = {"target": "--", "discriminator": ":"}
_COUNTED = 40
"""Number of images of each domain in the prototypes and the IoU of the report."""

Named = tuple[str, nn.Module]


def draw_report(
    path: Path,
    settings: Settings,
    source: Samples | None,
    validation: Samples,
    *,
    title: str,
    before: Named,
    after: Named,
    history: Sequence[Mapping[str, float]],
) -> None:
    """Draw predictions and IoU of two segmenters on validation images, curves of the log, and prototypes.

    Args:
        path: of the PNG.
        settings: of the run.
        source: source images; None leaves the prototypes out.
        validation: target images with labels.
        title: of the picture.
        before: name and segmenter to compare with, in evaluation mode.
        after: name and segmenter of the run, in evaluation mode.
        history: rows of the log. A value that is missing or not finite is not drawn.
    """
    data, segmenters = settings.data, [before, after]
    if not len(validation):
        raise ValueError("there is no labelled target image to draw")
    shown, counted = choose_shown(validation), spread(validation, _COUNTED)
    iou = {name: _class_iou(segmenter, counted, data) for name, segmenter in segmenters}
    row = 2.25 * min(max(sample.image.shape[0] / sample.image.shape[1] for sample in shown), 1.2) + 0.35
    columns = _legend_columns(data)
    legend = 0.28 * math.ceil((len(data.classes) + 1) / columns) + 0.2
    heights = [
        len(shown) * row + legend + 0.7,
        1.3 + 0.3 * len(data.classes),
        0.6 + 2.3 * (1 + len(settings.alignments)),
    ]
    heights += [4.6] if source is not None else []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, sum(heights) + 0.5), layout="constrained")
        figure.suptitle(textwrap.fill(title, 70), fontsize=15, weight="bold", x=0.01, ha="left")
        parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
        _draw_images(parts[0], shown, segmenters, iou, len(counted), data)
        _draw_iou(parts[1], iou, data.classes, len(counted), len(validation))
        _draw_curves(parts[2], pd.DataFrame(history), list(settings.alignments))
        if source is not None:
            _draw_all_prototypes(parts[3], source, validation, segmenters, data)
        save_figure(figure, path)


_WIDTH = 10.0
"""Inches at which the text is readable where a page is 900 pixels wide."""


def _class_iou(segmenter: nn.Module, samples: Samples, data: Data) -> np.ndarray:
    """IoU of each class over the images, `[K]`, NaN for a class that is neither in the labels nor in the predictions.

    Only the first rank draws the report, so ranks are not synchronised.
    """
    metric = MulticlassJaccardIndex(
        len(data.classes),
        average="none",
        ignore_index=data.ignore_index,
        zero_division=math.nan,
        sync_on_compute=False,
    )
    for index in range(len(samples)):
        sample = samples[index]
        predicted = predict(segmenter, sample.image, data.size, sample.label.shape)
        metric.update(torch.from_numpy(predicted)[None], torch.from_numpy(sample.label)[None])
    iou: np.ndarray = metric.compute().numpy()
    return iou


def _describe_mean(iou: np.ndarray, counted: int) -> str:
    if np.isnan(iou).all():
        return "no labelled pixel"
    return f"mIoU {100 * np.nanmean(iou):.1f} on {counted} image{'' if counted == 1 else 's'}"


def _draw_images(
    figure: SubFigure,
    shown: Sequence[Sample],
    segmenters: Sequence[Named],
    iou: Mapping[str, np.ndarray],
    counted: int,
    data: Data,
) -> None:
    """A row of each image, its ground truth and the predictions, above a legend of the classes."""
    empty = {"xticks": [], "yticks": [], "frame_on": False}
    panels = figure.subplots(len(shown), 4, squeeze=False, subplot_kw=empty)
    for row, sample in zip(panels, shown, strict=True):
        masks, notes = [sample.label], [_shorten(sample.name, 26), ""]
        labelled = sample.label != data.ignore_index
        for _, segmenter in segmenters:
            masks.append(predict(segmenter, sample.image, data.size, sample.label.shape))
            correct = (masks[-1] == sample.label)[labelled]
            notes.append(f"{100 * correct.mean():.0f} % of pixels correct" if correct.size else "no labelled pixel")
        for axes, picture, note in zip(
            row, [sample.image, *(paint_classes(ids, data) for ids in masks)], notes, strict=True
        ):
            axes.imshow(picture)
            axes.set_xlabel(note, fontsize=11, color="0.35", labelpad=3)
    titles = [
        "Target image",
        "Ground truth",
        *(f"{name}\n{_describe_mean(iou[name], counted)}" for name, _ in segmenters),
    ]
    for axes, name in zip(panels[0], titles, strict=True):
        axes.set_title(name)
    names = _numbered(data)
    handles = [Patch(facecolor=c / 255, label=n) for n, c in zip(names, class_colours(data.classes), strict=True)]
    hatched: Any = {"facecolor": IGNORED / 255, "edgecolor": STRIPE / 255, "hatch": "////", "linewidth": 0}
    figure.legend(
        handles=[*handles, Patch(label="no class", **hatched)],
        loc="outside lower left",
        ncols=_legend_columns(data),
        fontsize=11,
        handlelength=1.3,
    )


def _numbered(data: Data) -> list[str]:
    """Names of the classes with their numbers, which the prototypes show too."""
    return [_shorten(f"{k} {name}", 24) for k, name in enumerate(data.classes)]


def _legend_columns(data: Data) -> int:
    return min(6, 96 // (max(map(len, _numbered(data))) + 7))


def _draw_iou(figure: SubFigure, iou: Mapping[str, np.ndarray], classes: Sequence[str], counted: int, of: int) -> None:
    """A bar of each class for the second segmenter, a line for the first, and both numbers."""
    (before, first), (after, second) = iou.items()
    axes = figure.subplots()
    lines = np.arange(len(classes))
    axes.barh(lines, 100 * np.nan_to_num(second), 0.7, color=class_colours(classes) / 255, label=after)
    axes.vlines(100 * first, lines - 0.42, lines + 0.42, color="0.13", linewidth=2.5, label=before)
    for line, pair in enumerate(zip(first, second, strict=True)):
        numbers = ["–" if math.isnan(value) else f"{100 * value:.1f}" for value in pair]
        axes.text(101, line, " → ".join(numbers), va="center", fontsize=11)
    # Without validation images they are labelled images of the training, as the title of the report says.
    images = f"{counted} target images" if counted == of else f"{counted} of {of} target images"
    axes.set(title=f"IoU of each class in percent, {images}", xlim=(0, 100), ylim=(len(classes) - 0.5, -0.5))
    axes.set_yticks(lines, [_shorten(name, 24) for name in classes])
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    handles = [Line2D([], [], color="0.13", linewidth=2.5, label=before), Patch(color="0.6", label=after)]
    figure.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=11)


def _draw_curves(figure: SubFigure, history: pd.DataFrame, discriminators: Sequence[str]) -> None:
    """The losses, and below them the accuracy and the weight of each discriminator."""
    rows = 1 + len(discriminators)
    panels: Any = figure.subplots(rows, 2 if discriminators else 1, sharex=True, squeeze=False)
    _draw_panel(panels[0, 0], history, "Segmentation loss", ["loss/segmentation"])
    for axes in panels[-1]:
        axes.set_xlabel("step")
    if _window(len(history)) > 1:
        handles = [
            Line2D([], [], color="0.4", linewidth=0.8, alpha=0.4, label="single batches"),
            Line2D([], [], color="0.4", linewidth=1.8, label=f"running mean of {_window(len(history))} logged batches"),
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=11)
    if not discriminators:
        return
    # The adversarial losses have their own panel, since they change by hundredths.
    panels[0, 1].plot([], [], ":", color="0.4", label="discriminators")
    adversarial = [f"loss/{name}{part}" for name in discriminators for part in ("", "_discriminator")]
    _draw_panel(panels[0, 1], history, "Adversarial losses", adversarial)
    for (left, right), name in zip(panels[1:], discriminators, strict=True):
        left.axhline(0.5, color="0.5", linewidth=1, label="chance")
        accuracies = [f"accuracy/{name}_source", f"accuracy/{name}_target"]
        _draw_panel(left, history, f"{name.capitalize()} discriminator", accuracies)
        # Room above 1 for the legend: a discriminator that is always right is a line at 1.
        left.set(ylabel="accuracy", ylim=(-0.03, 1.45), yticks=[0, 0.25, 0.5, 0.75, 1])
        _draw_panel(right, history, f"{name.capitalize()} alignment", [f"weight/{name}"])
        right.set(ylabel="weight", ylim=(0, None))


def _window(rows: int) -> int:
    """Number of neighbouring values in a running mean: a tenth of all."""
    return max(1, rows // 10)


def _draw_panel(axes: Axes, history: pd.DataFrame, title: str, keys: Sequence[str]) -> None:
    """Curves of the log, with a legend if there are several."""
    table = history.reindex(columns=["step", *keys]).astype(float).set_index("step")
    for key in keys:
        name, _, part = key.split("/")[1].partition("_")
        look: Any = {"color": _COLOURS.get(name, "0.13"), "linestyle": _STYLES.get(part, "-")}
        values = table[key].where(np.isfinite).dropna()
        window = _window(len(values))
        if window > 1 and not key.startswith("weight/"):
            # Single batches are noisy: they become a pale line behind their running mean.
            axes.plot(values, color=look["color"], linewidth=0.8, alpha=0.2)
            values = values.rolling(window, center=True, min_periods=1).mean()
        label = None if part == "discriminator" else part or name
        axes.plot(values, linewidth=1.8, label=label, marker="o" if len(values) == 1 else None, **look)
    axes.set(title=title, xlim=(0, max([1.0, *table.index])))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    if keys[0].startswith("loss/"):
        # At least a tenth, so that no noise fills the panel.
        low, high = axes.get_ylim()
        middle, half = (low + high) / 2, max(0.1, high - low) / 2
        axes.set_ylim(middle - half, middle + half)
    if len(keys) > 1:
        # Room above the curves, so that the legend hides none.
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.45 * (high - low))
        axes.legend(fontsize=11, loc="upper right", ncols=3, columnspacing=1.0, handlelength=1.5)


def _draw_all_prototypes(
    figure: SubFigure, source: Samples, target: Samples, segmenters: Sequence[Named], data: Data
) -> None:
    """The prototypes of both domains in each segmenter."""
    domains = [(spread(source, _COUNTED), data.source_crop), (spread(target, _COUNTED), data.size)]
    panels = figure.subplots(1, 2)
    pairs = [
        (pool_prototypes(segmenter, *domains[0], data), pool_prototypes(segmenter, *domains[1], data))
        for _, segmenter in segmenters
    ]
    for axes, (name, _) in zip(panels, segmenters, strict=True):
        axes.set_title(f"Prototypes, {name}")
    draw_prototypes(panels, pairs, data.classes)
    marks = {"o": "source, with the number of the class", "X": "target, joined to its source"}
    handles = [Line2D([], [], marker=m, linestyle="", color="0.4", markersize=10, label=marks[m]) for m in marks]
    figure.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=11)


def _shorten(name: str, limit: int) -> str:
    """Shorten a long name in the middle, since file names differ at their ends."""
    head = limit // 3
    return name if len(name) <= limit else f"{name[:head]}…{name[head + 1 - limit :]}"
