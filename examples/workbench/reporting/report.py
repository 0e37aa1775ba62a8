"""Report of a run, one picture: predictions of two segmenters, the curves, and the prototypes of both domains."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import nn

from examples.workbench.data.samples import Samples, Subset
from examples.workbench.files import save_figure
from examples.workbench.reporting.prototypes import draw_prototypes, pool_prototypes
from examples.workbench.reporting.scores import predict
from examples.workbench.reporting.style import IGNORED, STRIPE, STYLE, class_colours
from examples.workbench.settings import Data, Settings

__all__ = ["draw_report"]

_COLOURS = {"global": "#0072B2", "auxiliary": "#56B4E9", "semantic": "#D55E00"}
_SHOWN, _POOLED = 4, 40
"""Number of validation images that are shown, and of images of each domain whose prototypes are drawn."""

Named = tuple[str, nn.Module]
History = Sequence[Mapping[str, float]]
Curve = tuple[str, str, str | None]
"""Colour, style and label."""


def draw_report(
    path: Path,
    settings: Settings,
    source: Samples,
    validation: Samples,
    *,
    title: str,
    before: Named,
    after: Named,
    history: History,
) -> None:
    """Draw two segmenters on the validation images, the curves of the log, and the prototypes of both domains.

    Args:
        path: of the PNG.
        settings: of the run.
        source: source images.
        validation: target images with labels.
        title: of the picture.
        before: name and segmenter to compare with, in evaluation mode.
        after: name and segmenter of the run, in evaluation mode.
        history: rows of the log. A value that is missing or not finite is not drawn.
    """
    data = settings.data
    count = min(_SHOWN, len(validation))
    shown = Subset(validation, np.linspace(0, len(validation) - 1, count).round().astype(int).tolist())
    row = 3.3 * min(max(shown[i].image.shape[0] / shown[i].image.shape[1] for i in range(count)), 1.2) + 0.35
    legend = 0.3 * math.ceil((len(data.classes) + 1) / 6) + 0.2
    heights = [count * row + legend + 0.5, 4.6, 5.4]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(14, sum(heights) + 0.5), layout="constrained")
        figure.suptitle(title, fontsize=16, weight="bold", x=0.01, ha="left")
        parts: Any = figure.subfigures(3, 1, height_ratios=heights)
        images, curves, prototypes = parts
        _draw_images(images, shown, [before, after], data)
        _draw_curves(curves, history, list(settings.alignments))
        for axes, (name, segmenter) in zip(prototypes.subplots(1, 2), [before, after], strict=True):
            pooled = [
                pool_prototypes(
                    segmenter,
                    Subset(samples, range(min(_POOLED, len(samples)))),
                    size,
                    num_classes=len(data.classes),
                    ignore_index=data.ignore_index,
                )
                for samples, size in ((source, data.source_crop), (validation, data.size))
            ]
            axes.set_title(f"Prototypes, {name}")
            draw_prototypes(axes, *pooled)
        marks = {"o": "source, with the class's number", "X": "target, joined to its source"}
        handles = [Line2D([], [], marker=m, linestyle="", color="0.4", markersize=10, label=marks[m]) for m in marks]
        prototypes.legend(handles=handles, loc="outside lower left", ncols=2)
        save_figure(figure, path)


def _draw_images(figure: SubFigure, shown: Samples, segmenters: Sequence[Named], data: Data) -> None:
    """A row of each image, its ground truth and the predictions, above a legend of the classes."""
    panels = figure.subplots(len(shown), 4, squeeze=False)
    for i, row in enumerate(panels):
        sample = shown[i]
        predictions = [predict(segmenter, sample, data.size) for _, segmenter in segmenters]
        pictures = [sample.image, *(_paint(ids, data) for ids in (sample.label, *predictions))]
        notes = [_shorten(sample.name, 38), "", *(_accuracy(ids, sample.label, data) for ids in predictions)]
        for axes, picture, note in zip(row, pictures, notes, strict=True):
            axes.imshow(picture)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.set_xlabel(note, fontsize=10, color="0.35", labelpad=3)
    for axes, name in zip(panels[0], ["Target image", "Ground truth", *(name for name, _ in segmenters)], strict=True):
        axes.set_title(name)
    handles = [
        Patch(facecolor=colour / 255, label=_shorten(f"{k} {name}", 24))
        for k, (name, colour) in enumerate(zip(data.classes, class_colours(len(data.classes))))
    ]
    hatched: Any = {"facecolor": IGNORED / 255, "edgecolor": STRIPE / 255, "hatch": "////", "linewidth": 0}
    handles.append(Patch(label="no class", **hatched))
    figure.legend(handles=handles, loc="outside lower left", ncols=6)


def _paint(ids: np.ndarray, data: Data) -> np.ndarray:
    """Class ids `[H, W]` in their colours, with hatching where there is no class."""
    ignored = ids == data.ignore_index
    picture: np.ndarray = class_colours(len(data.classes))[np.where(ignored, 0, ids)]
    y, x = np.indices(ids.shape)
    period = max(4, ids.shape[1] // 24)
    stripe = (x + y) % period < period // 3
    picture[ignored] = IGNORED
    picture[ignored & stripe] = STRIPE
    return picture


def _accuracy(predicted: np.ndarray, label: np.ndarray, data: Data) -> str:
    labelled = label != data.ignore_index
    if not labelled.any():
        return "no labelled pixel"
    return f"{100 * np.mean(predicted[labelled] == label[labelled]):.0f} % of pixels right"


def _draw_curves(figure: SubFigure, history: History, discriminators: Sequence[str]) -> None:
    """The losses, and beside them the accuracy and the weight of each discriminator."""
    panels: Any = figure.subplots(2 if discriminators else 1, 1 + len(discriminators), sharex=True, squeeze=False)
    _draw_panel(panels[0, 0], history, "Segmentation loss", {"loss/segmentation": ("0.13", "-", None)})
    figure.supxlabel("step", fontsize=11)
    if not discriminators:
        return
    # In a panel of their own, since they change by hundredths.
    adversarial: dict[str, Curve] = {}
    for name in discriminators:
        adversarial[f"loss/{name}"] = (_COLOURS[name], "-", name)
        adversarial[f"loss/{name}_discriminator"] = (_COLOURS[name], ":", None)
    panels[1, 0].plot([], [], ":", color="0.4", label="discriminators")
    _draw_panel(panels[1, 0], history, "Adversarial losses", adversarial)
    for (above, below), name in zip(panels[:, 1:].T, discriminators, strict=True):
        above.axhline(0.5, color="0.5", linewidth=1, label="chance")
        accuracies: dict[str, Curve] = {
            f"accuracy/{name}_{domain}": (_COLOURS[name], style, domain)
            for domain, style in (("source", "-"), ("target", "--"))
        }
        _draw_panel(above, history, f"{name.capitalize()} discriminator", accuracies)
        # Room above 1 for the legend: a discriminator that always wins is a line at 1.
        above.set(ylabel="accuracy", ylim=(-0.03, 1.35), yticks=[0, 0.25, 0.5, 0.75, 1])
        _draw_panel(below, history, f"{name.capitalize()} alignment", {f"weight/{name}": (_COLOURS[name], "-", None)})
        below.set_ylabel("weight")
        below.set_ylim(bottom=0)


def _draw_panel(axes: Axes, history: History, title: str, curves: Mapping[str, Curve]) -> None:
    """Curves of the log by their keys, and a legend of those that have a label."""
    for key, (colour, style, label) in curves.items():
        table = np.array([(row["step"], row[key]) for row in history if row.get(key) is not None]).reshape(-1, 2)
        steps, values = table[np.isfinite(table).all(1)].T
        window = len(values) // 25
        if window > 1 and not key.startswith("weight/"):
            # Single batches are noisy: they become a shade, and the line is their running mean.
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.18)
            sums = np.convolve(values, np.ones(window), "same")
            values = sums / np.convolve(np.ones_like(values), np.ones(window), "same")
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, values, style, color=colour, linewidth=1.8, label=label, marker=marker)
    axes.set(title=title, xlim=(0, max([1.0, *(row["step"] for row in history)])))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if len(curves) > 1:
        # Room above the curves, so that the legend hides none.
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.45 * (high - low))
        axes.legend(
            fontsize=9.5, loc="upper right", ncols=3 if len(curves) == 2 else 2, columnspacing=1.0, handlelength=1.5
        )


def _shorten(name: str, limit: int) -> str:
    """Leave out the middle of a long name, since file names differ by their ends."""
    head = limit // 3
    return name if len(name) <= limit else f"{name[:head]}…{name[head + 1 - limit :]}"
