"""One picture of a run: predictions before and after, the curves, and the prototypes of both domains."""

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

import semshift
from examples.workbench.data.samples import Samples, Subset
from examples.workbench.files import save_figure
from examples.workbench.reporting.prototypes import draw_prototypes
from examples.workbench.reporting.scores import _each, _network_input, predict
from examples.workbench.reporting.style import IGNORED, STRIPE, STYLE, class_colours
from examples.workbench.settings import Settings

__all__ = ["Prototypes", "Shown", "draw_report"]

_SEGMENTATION, _GLOBAL, _AUXILIARY, _SEMANTIC = "#222222", "#0072B2", "#56B4E9", "#D55E00"
_ADVERSARIAL = {
    "loss/global": ("global confusion", _GLOBAL, "-"),
    "loss/global_discriminator": ("global discriminator", _GLOBAL, ":"),
    "loss/auxiliary": ("auxiliary confusion", _AUXILIARY, "-"),
    "loss/auxiliary_discriminator": ("auxiliary discriminator", _AUXILIARY, ":"),
    "loss/semantic": ("semantic confusion", _SEMANTIC, "-"),
    "loss/semantic_discriminator": ("semantic discriminator", _SEMANTIC, ":"),
}
_DISCRIMINATORS = {"global": _GLOBAL, "auxiliary": _AUXILIARY, "semantic": _SEMANTIC}


class Shown(NamedTuple):
    """One target image."""

    name: str
    image: np.ndarray
    """`uint8 [H, W, 3]`."""
    label: np.ndarray
    """Class ids `[H, W]`."""
    before: np.ndarray
    """Predicted class ids `[H, W]`."""
    after: np.ndarray
    """Predicted class ids `[H, W]`."""


class Prototypes(NamedTuple):
    """One mean feature per class and domain; the row of an absent class is NaN."""

    source: np.ndarray
    """`float [K, C]`."""
    target: np.ndarray
    """`float [K, C]`."""


def _draw(
    path: Path,
    *,
    title: str,
    before_name: str,
    after_name: str,
    shown: Sequence[Shown],
    classes: Sequence[str],
    history: Sequence[Mapping[str, float | None]],
    before: Prototypes,
    after: Prototypes,
    ignore_index: int = 255,
) -> None:
    """Draw a run as one PNG, the same bytes for the same run.

    Args:
        path: the picture, replaced as a whole.
        title: of the picture.
        before_name: what predicted `Shown.before`.
        after_name: what predicted `Shown.after`.
        shown: target images, at least one.
        classes: names in the order of their ids.
        history: rows of the log, each with "step"; what a row lacks, or holds as None or NaN, leaves a gap.
        before: prototypes of the network `before_name`, `[K, C]` in both domains.
        after: prototypes of the network `after_name`, `[K, C]` in both domains.
        ignore_index: id of pixels without a class.

    Raises:
        ValueError: no image, arrays whose shapes or values do not belong together, or a row without "step".
    """
    _check(shown, classes, history, {"before": before, "after": after}, ignore_index)
    with matplotlib.rc_context(STYLE):
        page = _Page(width=14.0, shown=shown, classes=classes)
        page.figure.text(page.left / page.width, 1 - 0.32 / page.height, title, fontsize=16, weight="bold", va="center")
        _draw_images(page, shown, (before_name, after_name), classes, ignore_index)
        _draw_curves(page, history)
        for column, (name, prototypes) in enumerate([(before_name, before), (after_name, after)]):
            panel = page.half(column)
            panel.set_title(f"Prototypes, {name}")
            draw_prototypes(panel, *prototypes)
        page.figure.legend(
            handles=[
                Line2D(
                    [],
                    [],
                    marker="o",
                    linestyle="",
                    color="0.4",
                    markersize=11,
                    label="source, with the class's number",
                ),
                Line2D(
                    [],
                    [],
                    marker="X",
                    linestyle="",
                    color="0.4",
                    markersize=10,
                    label="target, joined to its source",
                ),
            ],
            loc="lower left",
            bbox_to_anchor=(page.left / page.width, 0.12 / page.height),
            ncols=2,
            borderaxespad=0,
            borderpad=0,
            handletextpad=0.3,
        )
        save_figure(page.figure, path)


class _Page:
    """The layout in inches from the top left corner: a heading, images, their legend, curves, prototypes."""

    left, right, gap = 0.75, 0.3, 0.15
    images_top, curves_height, prototypes_height = 1.0, 4.2, 4.6

    def __init__(self, *, width: float, shown: Sequence[Shown], classes: Sequence[str]) -> None:
        self.width = width
        self.cell = (width - self.left - self.right - 3 * self.gap) / 4
        self.row = min(self.cell * max(item.image.shape[0] / item.image.shape[1] for item in shown), 4.0)
        longest = min(max(map(len, [*classes, "no class"])), 24)
        self.column = 0.75 + 0.095 * longest
        self.columns = min(int((width - self.left - self.right) / self.column), len(classes) + 1)
        self.lines = math.ceil((len(classes) + 1) / self.columns)
        self.legend_top = self.images_top + len(shown) * (self.row + 0.3) + 0.1
        self.curves_top = self.legend_top + 0.28 * self.lines + 0.75
        self.prototypes_top = self.curves_top + self.curves_height + 1.15
        self.height = self.prototypes_top + self.prototypes_height + 0.95
        self.figure = Figure(figsize=(width, self.height))

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        return self.figure.add_axes(
            (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        )

    def half(self, column: int) -> Axes:
        """Add the left or the right prototype panel."""
        width = (self.width - self.left - self.right - 0.7) / 2
        return self.axes(self.left + column * (width + 0.7), self.prototypes_top, width, self.prototypes_height)


def _check(
    shown: Sequence[Shown],
    classes: Sequence[str],
    history: Sequence[Mapping[str, float | None]],
    prototypes: Mapping[str, Prototypes],
    ignore_index: int,
) -> None:
    if not shown:
        raise ValueError("expected shown to hold at least one image, got none")
    for item in shown:
        if item.image.ndim != 3 or item.image.shape[2] != 3 or item.image.dtype != np.uint8:
            raise ValueError(
                f"expected the image of {item.name} to be uint8 [H, W, 3], "
                f"got {item.image.dtype} {list(item.image.shape)}"
            )
        for name, ids in (("label", item.label), ("before", item.before), ("after", item.after)):
            if ids.shape != item.image.shape[:2]:
                raise ValueError(
                    f"expected {name} of {item.name} to be {list(item.image.shape[:2])} as its image is, "
                    f"got {list(ids.shape)}"
                )
            wrong = ids[((ids < 0) | (ids >= len(classes))) & (ids != ignore_index)]
            if wrong.size:
                raise ValueError(
                    f"expected {name} of {item.name} to hold ids below {len(classes)} or {ignore_index}, got {wrong[0]}"
                )
    for row in history:
        if row.get("step") is None:
            raise ValueError(f"expected each row of history to have a step, got {dict(row)}")
    for name, (source, target) in prototypes.items():
        if source.ndim != 2 or len(source) != len(classes) or target.shape != source.shape:
            raise ValueError(
                f"expected the prototypes {name} to be [{len(classes)}, C] in both domains, "
                f"got {list(source.shape)} and {list(target.shape)}"
            )


def _draw_images(
    page: _Page, shown: Sequence[Shown], names: tuple[str, str], classes: Sequence[str], ignore_index: int
) -> None:
    colours = class_colours(len(classes))
    for row, item in enumerate(shown):
        pictures = [
            item.image,
            *(_paint(ids, colours, ignore_index) for ids in (item.label, item.before, item.after)),
        ]
        notes = [
            _shorten(item.name, 38),
            "",
            *(_share_right(ids, item.label, ignore_index) for ids in item[3:]),
        ]
        for column, (picture, note) in enumerate(zip(pictures, notes, strict=True)):
            axes = page.axes(
                page.left + column * (page.cell + page.gap),
                page.images_top + row * (page.row + 0.3),
                page.cell,
                page.row,
            )
            axes.imshow(picture)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.set_xlabel(note, fontsize=10, color="0.35", labelpad=3)
            if row == 0:
                axes.set_title(["Target image", "Ground truth", *names][column])
    legend = page.axes(page.left, page.legend_top, page.columns * page.column, page.lines * 0.28)
    legend.set(xlim=(0, page.columns), ylim=(page.lines, 0))
    legend.axis("off")
    for k, name in enumerate([*classes, "no class"]):
        y, x = divmod(k, page.columns)
        look: dict[str, Any] = {"facecolor": IGNORED / 255, "edgecolor": STRIPE / 255, "hatch": "////"}
        if k < len(classes):
            look = {"facecolor": colours[k] / 255}
            name = f"{k} {name}"
        legend.add_patch(Rectangle((x, y + 0.15), 0.25 / page.column, 0.7, linewidth=0, **look))
        legend.text(x + 0.33 / page.column, y + 0.5, _shorten(name, 24), va="center_baseline")


def _paint(ids: np.ndarray, colours: np.ndarray, ignore_index: int) -> np.ndarray:
    ignored = ids == ignore_index
    picture: np.ndarray = colours[np.where(ignored, 0, ids)]
    y, x = np.indices(ids.shape)
    period = max(4, ids.shape[1] // 24)
    stripe = (x + y) % period < period // 3
    picture[ignored] = IGNORED
    picture[ignored & stripe] = STRIPE
    return picture


def _share_right(predicted: np.ndarray, label: np.ndarray, ignore_index: int) -> str:
    labelled = label != ignore_index
    if not labelled.any():
        return "no labelled pixel"
    return f"{100 * np.mean(predicted[labelled] == label[labelled]):.0f} % of pixels right"


def _draw_curves(page: _Page, history: Sequence[Mapping[str, float | None]]) -> None:
    last = max((float(row["step"] or 0) for row in history), default=0.0)
    width = (page.width - page.left - page.right - 2 * 0.7) / 3
    top, height = page.curves_top, page.curves_height

    # Apart, for the adversarial losses move by hundredths and the other by units.
    adversarial = any(_series(history, key)[0].size for key in _ADVERSARIAL)
    losses = page.axes(page.left, top, width, 0.42 * height if adversarial else height)
    losses.set_title("Segmentation loss")
    if not _draw_curve(losses, history, "loss/segmentation", "segmentation", _SEGMENTATION, "-"):
        _say(losses, "not in the log")
    _steps(losses, last, labelled=not adversarial)
    if adversarial:
        losses = page.axes(page.left, top + 0.53 * height, width, 0.47 * height)
        losses.set_title("Adversarial losses")
        for key, (label, colour, style) in _ADVERSARIAL.items():
            _draw_curve(losses, history, key, label, colour, style)
        # Room above the curves, so that the legend hides none.
        low, high = losses.get_ylim()
        losses.set_ylim(low, high + 0.45 * (high - low))
        losses.legend(fontsize=9.5, loc="upper right", ncols=2, columnspacing=1.0, handlelength=1.5)
        _steps(losses, last)

    present = [
        name for name in _DISCRIMINATORS if any(_series(history, f"accuracy/{name}_{d}")[0].size for d in _DOMAINS)
    ]
    left = page.left + width + 0.7
    if not present:
        axes = page.axes(left, top, 2 * width + 0.7, height)
        axes.set_title("Accuracy of the discriminators")
        _say(axes, "no discriminator in this method")
        axes.set(xticks=[], yticks=[])
        return
    wide = width if len(present) == 2 else 2 * width + 0.7
    for name in present:
        axes = page.axes(left, top, wide, 0.68 * height)
        axes.set_title(f"Accuracy of the {name} discriminator")
        for domain, style in _DOMAINS.items():
            _draw_curve(axes, history, f"accuracy/{name}_{domain}", f"on {domain}", _DISCRIMINATORS[name], style)
        axes.axhline(0.5, color="0.5", linewidth=1, label="chance")
        # Room above 1 for the legend: a discriminator that always wins is a line at 1.
        axes.set_ylim(-0.03, 1.25)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.legend(fontsize=9.5, loc="upper right", ncols=3, columnspacing=1.2)
        _steps(axes, last, labelled=False)
        weight = page.axes(left, top + 0.79 * height, wide, 0.21 * height)
        weight.set_title("Its weight in the segmenter's loss", fontsize=10, weight="normal")
        if not _draw_curve(weight, history, f"weight/{name}", name, _DISCRIMINATORS[name], "-"):
            _say(weight, "not in the log")
        highest = _series(history, f"weight/{name}")[1].max(initial=0) or 1.0
        weight.set_ylim(-0.08 * highest, 1.15 * highest)
        weight.set_yticks([0, highest], ["0", f"{highest:.2g}"])
        _steps(weight, last)
        left += wide + 0.7


_DOMAINS = {"source": "-", "target": "--"}


def _series(history: Sequence[Mapping[str, float | None]], key: str) -> tuple[np.ndarray, np.ndarray]:
    rows = [(row["step"], value) for row in history if (value := row.get(key)) is not None and np.isfinite(value)]
    table = np.array(rows, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _draw_curve(
    axes: Axes, history: Sequence[Mapping[str, float | None]], key: str, label: str, colour: str, style: str
) -> bool:
    steps, values = _series(history, key)
    if not steps.size:
        return False
    window = len(values) // 25
    if window > 1 and not key.startswith("weight/"):
        # Single batches are noisy: they stay as a shade, and the line is their running mean.
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.18)
        sums = np.convolve(values, np.ones(window), "same")
        values = sums / np.convolve(np.ones_like(values), np.ones(window), "same")
    axes.plot(
        steps,
        values,
        style,
        color=colour,
        linewidth=1.8,
        label=label,
        marker="o" if len(steps) == 1 else None,
    )
    return True


def _steps(axes: Axes, last: float, *, labelled: bool = True) -> None:
    axes.set_xlim(0, max(last, 1.0))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(labelbottom=labelled)
    if labelled:
        axes.set_xlabel("step")


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.35")


def _shorten(name: str, limit: int) -> str:
    """Leave out the middle of a long name: it is by their ends that file names differ."""
    if len(name) <= limit:
        return name
    head = limit // 3
    return f"{name[:head]}…{name[head + 1 - limit :]}"


@torch.no_grad()
def prototypes(
    segmenter: nn.Module,
    source: Samples,
    target: Samples,
    *,
    num_classes: int,
    sizes: tuple[tuple[int, int], tuple[int, int]],
    ignore_index: int,
) -> Prototypes:
    """Prototypes of two domains, each pooled over all its images: sums are added, then divided once.

    `sizes` are those at which the segmenter sees source and target images.
    """

    def pool(samples: Samples, size: tuple[int, int]) -> np.ndarray:
        pooled = functools.reduce(
            operator.add,
            (
                semshift.class_sums(
                    (features := segmenter(_network_input(segmenter, sample, size)).features),
                    torch.from_numpy(sample.label)[None].to(features.device),
                    num_classes,
                    ignore_index=ignore_index,
                )
                for sample in _each(samples)
            ),
        )
        means: Tensor = torch.where(pooled.present[:, None], pooled.means, torch.nan)
        result: np.ndarray = means.cpu().numpy()
        return result

    return Prototypes(pool(source, sizes[0]), pool(target, sizes[1]))


def draw_report(
    path: Path,
    settings: Settings,
    source_images: Samples,
    validation: Samples,
    *,
    title: str,
    before: tuple[str, nn.Module],
    after: tuple[str, nn.Module],
    history: Sequence[Mapping[str, float]],
    shown: int = 4,
    pooled: int = 40,
) -> None:
    """Draw the report of two segmenters, each with its name, on the validation images.

    Args:
        path: of the picture.
        settings: of the run.
        title: of the picture.
        before: name and segmenter to compare with.
        after: name and segmenter that the report is about.
        history: rows of the log.
        shown: number of validation images that are shown.
        pooled: number of images of each domain whose prototypes are drawn.
    """
    data = settings.data
    spread = np.linspace(0, len(validation) - 1, min(shown, len(validation))).round().astype(int)
    rows = []
    for i in spread:
        sample = validation[int(i)]
        predictions = [predict(segmenter, sample, data.size) for _, segmenter in (before, after)]
        rows.append(Shown(sample.name, sample.image, sample.label, *predictions))
    source, target = (Subset(part, range(min(pooled, len(part)))) for part in (source_images, validation))
    drawn = [
        prototypes(
            segmenter,
            source,
            target,
            num_classes=len(data.classes),
            sizes=(data.source_size or data.size, data.size),
            ignore_index=data.ignore_index,
        )
        for _, segmenter in (before, after)
    ]
    _draw(
        path,
        title=title,
        before_name=before[0],
        after_name=after[0],
        shown=rows,
        classes=data.classes,
        history=history,
        before=drawn[0],
        after=drawn[1],
        ignore_index=data.ignore_index,
    )
