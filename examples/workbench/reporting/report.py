"""Report of a run, one picture: predictions of two segmenters, the curves, and the prototypes of both domains."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import nn

from examples.scenes import Sample
from examples.workbench.data.samples import Samples, Subset
from examples.workbench.data_settings import Data
from examples.workbench.files import save_figure
from examples.workbench.reporting.predictions import choose_shown, paint_classes
from examples.workbench.reporting.prototypes import draw_prototypes, pool_prototypes
from examples.workbench.reporting.scores import predict
from examples.workbench.reporting.style import IGNORED, STRIPE, STYLE, class_colours
from examples.workbench.settings import Settings

__all__ = ["draw_report"]

_COLOURS = {"global": "#0072B2", "auxiliary": "#56B4E9", "semantic": "#D55E00"}
_STYLES = {"target": "--", "discriminator": ":"}
_POOLED = 40
"""Number of images of each domain whose prototypes are drawn."""

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
    """Draw two segmenters on the validation images, the curves of the log, and the prototypes of both domains.

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
    shown = choose_shown(validation)
    row = 3.3 * min(max(sample.image.shape[0] / sample.image.shape[1] for sample in shown), 1.2) + 0.35
    legend = 0.3 * math.ceil((len(data.classes) + 1) / 6) + 0.2
    heights = [len(shown) * row + legend + 0.5, 4.6] + ([5.4] if source is not None else [])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(14, sum(heights) + 0.5), layout="constrained")
        figure.suptitle(title, fontsize=16, weight="bold", x=0.01, ha="left")
        parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
        _draw_images(parts[0], shown, segmenters, data)
        _draw_curves(parts[1], pd.DataFrame(history), list(settings.alignments))
        if source is not None:
            _draw_all_prototypes(parts[2], source, validation, segmenters, data)
        save_figure(figure, path)


def _draw_all_prototypes(
    figure: SubFigure, source: Samples, target: Samples, segmenters: Sequence[Named], data: Data
) -> None:
    """The prototypes of both domains in each segmenter."""
    domains = [(source, data.source_crop), (target, data.size)]
    pooled = [(Subset(samples, range(min(_POOLED, len(samples)))), size) for samples, size in domains]
    for axes, (name, segmenter) in zip(figure.subplots(1, 2), segmenters, strict=True):
        axes.set_title(f"Prototypes, {name}")
        draw_prototypes(axes, *(pool_prototypes(segmenter, *domain, data) for domain in pooled))
    marks = {"o": "source, with the class's number", "X": "target, joined to its source"}
    handles = [Line2D([], [], marker=m, linestyle="", color="0.4", markersize=10, label=marks[m]) for m in marks]
    figure.legend(handles=handles, loc="outside lower left", ncols=2)


def _draw_images(figure: SubFigure, shown: Sequence[Sample], segmenters: Sequence[Named], data: Data) -> None:
    """A row of each image, its ground truth and the predictions, above a legend of the classes."""
    empty = {"xticks": [], "yticks": [], "frame_on": False}
    panels = figure.subplots(len(shown), 4, squeeze=False, subplot_kw=empty)
    for row, sample in zip(panels, shown, strict=True):
        masks, notes = [sample.label], [_shorten(sample.name, 38), ""]
        labelled = sample.label != data.ignore_index
        for _, segmenter in segmenters:
            masks.append(predict(segmenter, sample.image, data.size, sample.label.shape))
            right = (masks[-1] == sample.label)[labelled]
            notes.append(f"{100 * right.mean():.0f} % of pixels right" if right.size else "no labelled pixel")
        for axes, picture, note in zip(
            row, [sample.image, *(paint_classes(ids, data) for ids in masks)], notes, strict=True
        ):
            axes.imshow(picture)
            axes.set_xlabel(note, fontsize=10, color="0.35", labelpad=3)
    for axes, name in zip(panels[0], ["Target image", "Ground truth", *(name for name, _ in segmenters)], strict=True):
        axes.set_title(name)
    names = [_shorten(f"{k} {name}", 24) for k, name in enumerate(data.classes)]
    handles = [Patch(facecolor=c / 255, label=n) for n, c in zip(names, class_colours(len(names)), strict=True)]
    hatched: Any = {"facecolor": IGNORED / 255, "edgecolor": STRIPE / 255, "hatch": "////", "linewidth": 0}
    figure.legend(handles=[*handles, Patch(label="no class", **hatched)], loc="outside lower left", ncols=6)


def _draw_curves(figure: SubFigure, history: pd.DataFrame, discriminators: Sequence[str]) -> None:
    """The losses, and beside them the accuracy and the weight of each discriminator."""
    panels: Any = figure.subplots(2 if discriminators else 1, 1 + len(discriminators), sharex=True, squeeze=False)
    _draw_panel(panels[0, 0], history, "Segmentation loss", ["loss/segmentation"])
    figure.supxlabel("step", fontsize=11)
    if not discriminators:
        return
    # In a panel of their own, since they change by hundredths.
    panels[1, 0].plot([], [], ":", color="0.4", label="discriminators")
    adversarial = [f"loss/{name}{part}" for name in discriminators for part in ("", "_discriminator")]
    _draw_panel(panels[1, 0], history, "Adversarial losses", adversarial)
    for (above, below), name in zip(panels[:, 1:].T, discriminators, strict=True):
        above.axhline(0.5, color="0.5", linewidth=1, label="chance")
        accuracies = [f"accuracy/{name}_source", f"accuracy/{name}_target"]
        _draw_panel(above, history, f"{name.capitalize()} discriminator", accuracies)
        # Room above 1 for the legend: a discriminator that always wins is a line at 1.
        above.set(ylabel="accuracy", ylim=(-0.03, 1.35), yticks=[0, 0.25, 0.5, 0.75, 1])
        _draw_panel(below, history, f"{name.capitalize()} alignment", [f"weight/{name}"])
        below.set(ylabel="weight", ylim=(0, None))


def _draw_panel(axes: Axes, history: pd.DataFrame, title: str, keys: Sequence[str]) -> None:
    """Curves of the log, with a legend if there are several."""
    table = history.reindex(columns=["step", *keys]).astype(float).set_index("step")
    for key in keys:
        name, _, part = key.split("/")[1].partition("_")
        look: Any = {"color": _COLOURS.get(name, "0.13"), "linestyle": _STYLES.get(part, "-")}
        values = table[key].where(np.isfinite).dropna()
        window = len(values) // 25
        if window > 1 and not key.startswith("weight/"):
            # Single batches are noisy: they become a shade, and the line is their running mean.
            axes.plot(values, color=look["color"], linewidth=0.8, alpha=0.18)
            values = values.rolling(window, center=True, min_periods=1).mean()
        label = None if part == "discriminator" else part or name
        axes.plot(values, linewidth=1.8, label=label, marker="o" if len(values) == 1 else None, **look)
    axes.set(title=title, xlim=(0, max([1.0, *table.index])))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if len(keys) > 1:
        # Room above the curves, so that the legend hides none.
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.45 * (high - low))
        columns = 3 if len(keys) == 2 else 2
        axes.legend(fontsize=9.5, loc="upper right", ncols=columns, columnspacing=1.0, handlelength=1.5)


def _shorten(name: str, limit: int) -> str:
    """Leave out the middle of a long name, since file names differ by their ends."""
    head = limit // 3
    return name if len(name) <= limit else f"{name[:head]}…{name[head + 1 - limit :]}"
