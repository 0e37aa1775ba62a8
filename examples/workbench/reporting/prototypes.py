"""Class prototypes of a domain, and a drawing of two domains' prototypes on two principal axes."""

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
    """Prototypes `[K, C]` of images that the segmenter sees at `size`, pooled over all; NaN where a class is absent."""
    pooled: Any = 0
    for index in range(len(samples)):
        sample = samples[index]
        images = image_tensor(resize_image(sample.image, size))[None].to(next(segmenter.parameters()))
        features = segmenter(images).features
        # At the network's size, since pooling refuses labels whose shape is far from that of the features.
        label = Image.fromarray(sample.label).resize((size[1], size[0]), Image.Resampling.NEAREST)
        labels = torch.from_numpy(np.array(label))[None].to(features.device)
        pooled += semshift.class_sums(features, labels, len(data.classes), ignore_index=data.ignore_index)
    result: np.ndarray = torch.where(pooled.present[:, None], pooled.means, torch.nan).cpu().numpy()
    return result


def draw_prototypes(axes: Axes, source: np.ndarray, target: np.ndarray) -> None:
    """Draw the prototypes `[K, C]` of the classes that both domains have, each class's two joined by a line."""
    source, target = source.astype(np.float64), target.astype(np.float64)
    present = np.flatnonzero(np.isfinite(source).all(1) & np.isfinite(target).all(1))
    axes.set(xticks=[], yticks=[])
    if not present.size:
        text = "no class has a prototype in both domains"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.35")
        return
    points, shares = _project(np.concatenate([source[present], target[present]]))
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.12)
    colours = class_colours(len(source)) / 255
    for k, tail, head in zip(present, *np.split(points, 2), strict=True):
        axes.plot(*np.stack([tail, head]).T, color=colours[k], linewidth=1.8, zorder=1)
        axes.plot(*tail, "o", color=colours[k], markersize=13, zorder=2)
        # The white rim shows a cross that lies on its circle, as well-aligned ones do.
        axes.plot(*head, "X", color=colours[k], markersize=11, markeredgecolor="white", zorder=3)
        # The number stands beyond the circle, on the side away from the cross.
        distance = float(np.hypot(*(tail - head)))
        axes.annotate(
            str(k),
            tail,
            xytext=tuple(13 * (tail - head) / distance) if distance > 0 else (9, 9),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9.5,
            color="0.25",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            zorder=4,
        )
    axes.set_xlabel(f"first principal axis, {100 * shares[0]:.0f} % of the variance")
    axes.set_ylabel(f"second, {100 * shares[1]:.0f} %")
    # How far apart a class's domains are, relative to the distances between the classes.
    within = np.linalg.norm(source[present] - target[present], axis=1).mean()
    centres = (source[present] + target[present]) / 2
    between = np.linalg.norm(centres[:, None] - centres, axis=2)
    if between.any():
        text = f"domain gap {within / between[np.triu_indices(len(centres), 1)].mean():.2f} of class gap"
        axes.text(0.01, 0.015, text, transform=axes.transAxes, fontsize=10, color="0.35")


def _project(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points `[N, C]` on their two principal axes `[N, 2]`, and each axis's share of the variance `[2]`."""
    centred = points - points.mean(0)
    # With zeros for missing channels and points there are always two axes.
    _, strengths, axes = np.linalg.svd(np.pad(centred, [(0, 2), (0, 2)]), full_matrices=False)
    # The sign of an axis is arbitrary: its largest entry becomes positive, so that a picture never flips.
    axes *= np.sign(np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1))
    shares = strengths[:2] ** 2 / max((strengths**2).sum(), np.finfo(float).tiny)
    return centred @ axes[:2, : points.shape[1]].T, shares
