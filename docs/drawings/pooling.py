"""Drawings of pooling: prototypes, the transpose of up-sampling, and the modes that resample labels."""

from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

import semshift
from docs.drawings.legend import name_classes
from examples.scenes import CLASSES, draw
from examples.workbench.files import save_figure
from examples.workbench.reporting.style import BLUE, ORANGE, STYLE, class_colours

__all__ = ["draw_modes", "draw_pooling", "draw_transpose"]

_LARGE = {**STYLE, "font.size": 14, "axes.titlesize": 14}
_SIZE, _GRID = (96, 144), (12, 18)
_MODES: tuple[Literal["nearest", "majority", "area", "bilinear"], ...] = ("nearest", "majority", "area", "bilinear")


def draw_pooling(path: Path) -> None:
    """Draw features, labels over the feature grid, the weights of one class, and the prototype of each class."""
    image, label = _scene()
    features = F.adaptive_avg_pool2d(torch.from_numpy(image).permute(2, 0, 1)[None] / 255, _GRID)
    labels = torch.from_numpy(label)[None]
    pooled = semshift.class_sums(features, labels, len(CLASSES))
    shares = semshift.class_shares(labels, _GRID, len(CLASSES), resample="bilinear")[0, CLASSES.index("car")]
    with matplotlib.rc_context(_LARGE):
        figure = Figure(figsize=(9, 7.15), layout="constrained")
        panels = figure.subplots(2, 2).flatten()
        panels[0].imshow(features[0].permute(1, 2, 0).numpy(), interpolation="nearest")
        panels[0].set_title("features f (here: mean colours)")
        _draw_labels(panels[1], label)
        panels[1].set_title("labels y and the grid of f")
        panels[2].imshow(shares.numpy(), cmap="Greys", interpolation="nearest")
        panels[2].set_title('weight of each cell in "car"')
        for axes in panels[:3]:
            _frame(axes)
        _draw_vectors(panels[3], pooled.means, pooled.mass)
        panels[3].set_title("prototypes v, one per class")
        name_classes(figure, CLASSES)
        save_figure(figure, path)


def _draw_vectors(axes: Axes, means: Tensor, mass: Tensor) -> None:
    for k, name in enumerate(CLASSES):
        if mass[k] > 0:
            axes.add_patch(matplotlib.patches.Rectangle((0, k - 0.4), 1.6, 0.8, color=means[k].numpy()))
            values = ", ".join(f"{value:.2f}" for value in means[k].tolist())
            axes.text(1.8, k, f"{name}: ({values})", va="center", fontsize=13)
        else:
            axes.text(1.8, k, f"{name}: absent", va="center", fontsize=12, color="0.45")
    axes.set(xlim=(0, 9), ylim=(len(CLASSES) - 0.4, -0.6))
    axes.axis("off")


def draw_transpose(path: Path) -> None:
    """Draw, along one axis, features up-sampled to a mask, and the mask resampled to the features."""
    cells, pixels = 6, 24
    f = torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0, 1.0])
    mask = torch.zeros(pixels)
    mask[9:14] = 1
    upsample = F.interpolate(f[None, None, None], size=(1, pixels), mode="bilinear")[0, 0, 0]
    shares = semshift.class_shares(1 - mask[None, None].long(), (1, cells), 2, resample="bilinear")[0, 0, 0]
    left, right = float(mask @ upsample), float(shares @ f)
    at, centres = np.arange(pixels) + 0.5, (np.arange(cells) + 0.5) * pixels / cells
    with matplotlib.rc_context(_LARGE):
        figure = Figure(figsize=(9, 4.4), layout="constrained")
        for axes in (panels := figure.subplots(1, 2, sharex=True, sharey=True)):
            axes.set(xlim=(0, pixels), ylim=(0, 8), yticks=range(6), xticks=np.linspace(0, pixels, cells + 1))
            axes.grid(axis="x", color="0.88")
            axes.set_axisbelow(True)
        up, down = panels
        up.set_title("up-sample f to the labels")
        up.bar(at[mask.numpy() > 0], upsample[mask > 0].numpy(), 0.8, color=ORANGE, label="f at pixels of the class")
        up.plot(at, upsample.numpy(), ".-", color=BLUE, label="f, up-sampled")
        up.plot(centres, f.numpy(), "o", color=BLUE, markersize=9, label="f")
        up.set_xlabel(f"{pixels} pixels: {pixels} values in each channel\nsum of the orange bars: {left:.5g}")
        down.set_title("resample the class to the grid of f")
        down.bar(centres, shares.numpy(), 1.6, color=ORANGE, label="weight w of each cell")
        for i, (x, weight, value) in enumerate(zip(centres, shares.tolist(), f.tolist(), strict=True)):
            if weight > 0:
                # Neighbours stand at two heights, so as not to meet.
                top = max(weight, value) + (0.9 if i % 2 else 0.25)
                down.text(x, top, f"{weight:.4g} × {value:.0f}", ha="center", fontsize=13)
        down.plot(centres, f.numpy(), "o", color=BLUE, markersize=9, label="f")
        down.set_xlabel(f"{cells} cells: {cells} values in each channel\nsum of w × f: {right:.5g}")
        for axes in panels:
            axes.legend(loc="upper left", fontsize=12)
        save_figure(figure, path)


def draw_modes(path: Path) -> None:
    """Draw an image with thin poles, its labels, and the weights of the cells of the feature grid in each mode."""
    image, label = _scene()
    labels, pole = torch.from_numpy(label)[None], CLASSES.index("pole")
    pixels = int((labels == pole).sum())
    with matplotlib.rc_context(_LARGE):
        figure = Figure(figsize=(9, 9.2), layout="constrained")
        panels = figure.subplots(3, 2).flatten()
        panels[0].imshow(image, interpolation="nearest")
        panels[0].set_title("image, 96 × 144, with poles")
        _draw_labels(panels[1], label)
        panels[1].set_title(f"labels: {pixels} pixels of pole")
        for axes, mode in zip(panels[2:], _MODES, strict=True):
            weights = _weights(labels, mode)[pole]
            # Each panel has its own scale, since one mode counts pixels and the others count cells.
            axes.imshow(weights.numpy(), cmap="Greys", vmin=0, vmax=float(weights.max()), interpolation="nearest")
            unit = "pixels" if mode == "bilinear" else "cells"
            number = f"{float(weights.sum()):.3g}"
            axes.set_title(f"{mode}: mass of {number} {unit.removesuffix('s') if number == '1' else unit}")
        for axes in panels:
            _frame(axes)
        name_classes(figure, CLASSES)
        save_figure(figure, path)


def _frame(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color="0.7")


def _scene() -> tuple[np.ndarray, np.ndarray]:
    return draw("source", "val", 31, seed=0, size=_SIZE)


def _draw_labels(axes: Axes, label: np.ndarray) -> None:
    axes.imshow(label, cmap=ListedColormap(class_colours(CLASSES) / 255), vmin=-0.5, vmax=len(CLASSES) - 0.5)
    rows, columns = _SIZE[0] // _GRID[0], _SIZE[1] // _GRID[1]
    for y in range(rows, _SIZE[0], rows):
        axes.axhline(y - 0.5, color="white", linewidth=0.6)
    for x in range(columns, _SIZE[1], columns):
        axes.axvline(x - 0.5, color="white", linewidth=0.6)


def _weights(labels: Tensor, resample: Literal["nearest", "majority", "area", "bilinear"]) -> Tensor:
    if resample == "area" or resample == "bilinear":
        return semshift.class_shares(labels, _GRID, len(CLASSES), resample=resample)[0]
    resized = semshift.resize_labels(labels, _GRID, len(CLASSES), resample=resample)
    return F.one_hot(resized.long(), len(CLASSES))[0].movedim(-1, 0).float()
