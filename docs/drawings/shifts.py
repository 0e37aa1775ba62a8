"""Drawing of a global and of a per-class shift: two targets beside their source, and the moves of mean colours."""

from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

import semshift
from examples.scenes import CLASSES, Scenes, Severity
from examples.workbench.files import save_figure
from examples.workbench.reporting.style import STYLE, class_colours

__all__ = ["draw_shifts"]

_GLOBAL = Severity(light=1.0, fog=0.7, noise=0.5, camera=0.0, texture=0.0, colour=0.0)
_PER_CLASS = Severity(light=0.0, fog=0.0, noise=0.0, camera=0.0, texture=1.0, colour=1.0)


_AT = {"pole": (0, -18), "car": (0, -18), "vegetation": (-36, 9)}
"""Places of names in points from the dot, where the usual place above it would hide an arrow."""


def draw_shifts(path: Path) -> None:
    """Draw both shifts with the built-in scenes."""
    source = Scenes("source", "train", 60, seed=0)
    targets = {
        "global: light, fog, noise": Scenes("target", "train", 60, seed=0, severity=_GLOBAL),
        "per-class: colour, texture": Scenes("target", "train", 60, seed=0, severity=_PER_CLASS),
    }
    with matplotlib.rc_context({**STYLE, "font.size": 14, "axes.titlesize": 14}):
        figure = Figure(figsize=(9, 6.8), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=[1, 1.75])
        above, below = parts
        panels = above.subplots(1, 3)
        shown = {"source": source, **targets}
        for axes, (title, scenes) in zip(panels, shown.items(), strict=True):
            axes.imshow(scenes[3].image, interpolation="nearest")
            axes.set_title(title, fontsize=12.5)
            axes.set(xticks=[], yticks=[])
        before = _colours(source)
        for axes, (title, scenes) in zip(below.subplots(1, 2, sharex=True, sharey=True), targets.items(), strict=True):
            _draw_moves(axes, before.means, _colours(scenes).means)
            axes.set_title(f"mean colours, {title.split(':')[0]} shift")
        save_figure(figure, path)


def _colours(scenes: Scenes) -> semshift.ClassSums:
    """Class prototypes of the colours of a whole domain."""
    samples = [scenes[i] for i in range(len(scenes))]
    images = torch.stack([torch.from_numpy(sample.image) for sample in samples]).permute(0, 3, 1, 2) / 255
    labels = torch.stack([torch.from_numpy(sample.label) for sample in samples])
    return semshift.class_sums(images, labels, len(CLASSES))


def _draw_moves(axes: Axes, before: Tensor, after: Tensor) -> None:
    colours = class_colours(CLASSES) / 255
    for k, name in enumerate(CLASSES):
        # Red and blue show more of the built-in shift than red and green, or green and blue.
        (x, u), (y, v) = ((float(before[k, c]), float(after[k, c])) for c in (0, 2))
        axes.annotate("", (u, v), (x, y), arrowprops={"arrowstyle": "-|>", "color": colours[k], "linewidth": 2.2})
        axes.plot(x, y, "o", color=colours[k], markersize=9)
        axes.annotate(
            name,
            (x, y),
            xytext=_AT.get(name, (0, 8)),
            textcoords="offset points",
            ha="center",
            fontsize=12,
            zorder=5,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )
    axes.set(xlabel="red (dot: source, arrow: to target)", ylabel="blue", xlim=(0.0, 0.95), ylim=(0.0, 1.0))
    axes.set(xticks=[0.2, 0.4, 0.6, 0.8], yticks=[0, 0.25, 0.5, 0.75, 1])
