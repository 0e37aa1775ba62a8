"""Class prototypes of a domain, and drawings of two domains' prototypes on two principal axes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from PIL import Image
from torch import nn

import semshift
from examples.workbench.data.samples import Samples, image_tensor, resize_image
from examples.workbench.data_settings import Data
from examples.workbench.reporting.style import class_colours

__all__ = ["draw_prototypes", "pool_prototypes"]


@torch.no_grad()
def pool_prototypes(segmenter: nn.Module, samples: Samples, size: tuple[int, int], data: Data) -> np.ndarray:
    """Class prototypes `[K, C]` over all images, which the segmenter sees at `size`; NaN where a class is absent."""
    pooled: Any = 0
    for index in range(len(samples)):
        sample = samples[index]
        images = image_tensor(resize_image(sample.image, size))[None].to(next(segmenter.parameters()))
        features = segmenter(images).features
        # At the network's size, since pooling refuses labels whose aspect ratio is far from that of the features.
        label = Image.fromarray(sample.label).resize((size[1], size[0]), Image.Resampling.NEAREST)
        labels = torch.from_numpy(np.array(label))[None].to(features.device)
        pooled += semshift.class_sums(features, labels, len(data.classes), ignore_index=data.ignore_index)
    result: np.ndarray = torch.where(pooled.present[:, None], pooled.means, torch.nan).cpu().numpy()
    return result


def draw_prototypes(
    panels: Sequence[Axes], pairs: Sequence[tuple[np.ndarray, np.ndarray]], classes: Sequence[str]
) -> None:
    """Draw prototypes of source and target, each `[K, C]`, a panel for each pair, all on the same two principal axes.

    The mean of each panel's prototypes is its origin. A line joins the two prototypes of a class. A class without a
    prototype in both domains is left out.
    """
    pairs = [(source.astype(np.float64), target.astype(np.float64)) for source, target in pairs]
    present = [np.flatnonzero(np.isfinite(source).all(1) & np.isfinite(target).all(1)) for source, target in pairs]
    # Centred panel by panel: that training moves all prototypes together says nothing about the domains.
    clouds = [_centre(np.concatenate([source[k], target[k]])) for (source, target), k in zip(pairs, present)]
    points, shares = _project(np.concatenate(clouds))
    drawn = np.split(points, np.cumsum([len(cloud) for cloud in clouds])[:-1])
    for axes, k, (source, target), both in zip(panels, present, pairs, drawn, strict=True):
        axes.set(xticks=[], yticks=[])
        if not k.size:
            text = "no class has a prototype in both domains"
            axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.35")
            continue
        circles, crosses = np.split(both, 2)
        _draw_pairs(axes, k, circles, crosses, class_colours(classes) / 255)
        axes.set_xlabel(f"first principal axis, {100 * shares[0]:.0f} % of the variance")
        axes.set_ylabel(f"second, {100 * shares[1]:.0f} %")
        _share_limits(axes, points)
        if gap := _describe_gap(source[k], target[k]):
            axes.text(0.01, 0.015, gap, transform=axes.transAxes, fontsize=11, color="0.35")


def _draw_pairs(axes: Axes, present: np.ndarray, source: np.ndarray, target: np.ndarray, colours: np.ndarray) -> None:
    """A circle for a class's source prototype, with the class's number, and a cross for its target prototype."""
    for k, tail, head in zip(present, source, target, strict=True):
        axes.plot(*np.stack([tail, head]).T, color=colours[k], linewidth=1.8, zorder=1)
        axes.plot(*tail, "o", color=colours[k], markersize=13, zorder=2)
        # The white rim shows a cross that lies on its circle, as well-aligned ones do.
        axes.plot(*head, "X", color=colours[k], markersize=11, markeredgecolor="white", zorder=3)
        # The number stands beyond the circle, on the side away from the cross.
        distance = float(np.hypot(*(tail - head)))
        axes.annotate(
            str(k),
            tail,
            xytext=tuple(14 * (tail - head) / distance) if distance > 0 else (10, 10),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=11,
            color="0.25",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            zorder=4,
        )


def _share_limits(axes: Axes, points: np.ndarray) -> None:
    """Limits that hold all points with a margin; a unit has the same length on both axes and in every panel."""
    centre, half = (points.max(0) + points.min(0)) / 2, 0.62 * (points.max(0) - points.min(0))
    # Not too flat a panel where one axis has nearly all variance.
    half = np.maximum(half, 0.7 * half.max()) if half.max() > 0 else np.ones(2)
    axes.set(xlim=centre[0] + half[0] * np.array([-1, 1]), ylim=centre[1] + half[1] * np.array([-1, 1]))
    axes.set_aspect("equal", adjustable="box")


def _describe_gap(source: np.ndarray, target: np.ndarray) -> str:
    """How far apart a class's domains are, relative to the distances between the classes; empty for one class."""
    within = np.linalg.norm(source - target, axis=1).mean()
    centres = (source + target) / 2
    between = np.linalg.norm(centres[:, None] - centres, axis=2)
    if not between.any():
        return ""
    return f"gap between domains / between classes: {within / between[np.triu_indices(len(centres), 1)].mean():.2f}"


def _centre(points: np.ndarray) -> np.ndarray:
    result: np.ndarray = points - points.mean(0) if len(points) else points
    return result


def _project(centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centred points `[N, C]` on their two principal axes `[N, 2]`, and each axis's share of the variance `[2]`."""
    # With zeros for missing channels and points there are always two axes.
    _, strengths, axes = np.linalg.svd(np.pad(centred, [(0, 2), (0, 2)]), full_matrices=False)
    # The sign of an axis is arbitrary: its largest entry becomes positive, so that a picture never flips.
    axes *= np.sign(np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1))
    shares = strengths[:2] ** 2 / max((strengths**2).sum(), np.finfo(float).tiny)
    return centred @ axes[:2, : centred.shape[1]].T, shares
