"""Prototypes of two domains on two principal axes."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from examples.workbench.reporting.style import class_colours

__all__ = ["draw_prototypes"]


def draw_prototypes(axes: Axes, source: np.ndarray, target: np.ndarray) -> None:
    """Draw the prototypes of the classes that both domains have, each class's two joined by a line.

    Args:
        axes: an empty panel of its final size.
        source: `float [K, C]`; the row of an absent class is NaN.
        target: `float [K, C]`, likewise.
    """
    source, target = source.astype(np.float64), target.astype(np.float64)
    present = np.flatnonzero(np.isfinite(source).all(1) & np.isfinite(target).all(1))
    if not present.size:
        axes.set(xticks=[], yticks=[])
        text = "no class has a prototype in both domains"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.35")
        return
    points, shares = _principal(np.concatenate([source[present], target[present]]))
    ends = points.reshape(2, len(present), 2)
    colours = class_colours(len(source)) / 255
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.12)
    for k, tail, head in zip(present, *ends, strict=True):
        axes.plot(*np.stack([tail, head]).T, color=colours[k], linewidth=1.8, zorder=1)
        axes.plot(*tail, "o", color=colours[k], markersize=13, zorder=2)
        # The white rim shows a cross that lies on its circle, as well-aligned ones do.
        axes.plot(
            *head,
            "X",
            color=colours[k],
            markersize=11,
            markeredgecolor="white",
            zorder=3,
        )
    # Each number stands beyond its circle, on the side away from the cross, as only the final scale tells.
    axes.apply_aspect()
    for k, tail, head in zip(present, *ends, strict=True):
        away = axes.transData.transform(tail) - axes.transData.transform(head)
        distance = float(np.hypot(*away))
        axes.annotate(
            str(k),
            tail,
            xytext=tuple(13 * away / distance) if distance > 1 else (9, 9),
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
    axes.set(xticks=[], yticks=[])
    ratio = _domain_gap(source[present], target[present])
    if ratio is not None:
        axes.text(
            0.01,
            0.015,
            f"domain gap {ratio:.2f} of class gap",
            transform=axes.transAxes,
            fontsize=10,
            color="0.35",
        )


def _principal(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Map points `[N, C]` to two principal axes `[N, 2]`, and tell the share of variance of each `[2]`."""
    centred = points - points.mean(0)
    _, strengths, axes = np.linalg.svd(centred, full_matrices=False)
    # An axis has no sign of its own; its largest entry is made positive, so that a picture never flips.
    signs = np.sign(np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1))
    flat = np.zeros((len(points), 2))
    count = min(2, len(axes))
    flat[:, :count] = centred @ (axes * signs)[:count].T
    variances = np.zeros(2)
    variances[:count] = strengths[:count] ** 2
    total = (strengths**2).sum()
    return flat, variances / total if total > 0 else variances


def _domain_gap(source: np.ndarray, target: np.ndarray) -> float | None:
    """Mean distance between the domains of a class, over that between the classes; None below two classes."""
    centres = (source + target) / 2
    first, second = np.triu_indices(len(centres), 1)
    between = np.linalg.norm(centres[first] - centres[second], axis=1)
    if not between.any():
        return None
    return float(np.linalg.norm(source - target, axis=1).mean() / between.mean())
