"""Drawings for `docs/tutorial.md` from the results of its own code blocks, and the inputs of the discriminators."""

import contextlib
import functools
import os
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

import semshift
from docs.drawings.legend import name_classes
from docs.pages import read_blocks
from examples.scenes import CLASSES
from examples.workbench.files import save_figure
from examples.workbench.reporting.style import BLUE, ORANGE, STYLE, class_colours

__all__ = ["draw_discriminators", "draw_health", "draw_predictions", "draw_scenes"]

_PAGE = Path(__file__).parent.parent / "tutorial.md"
_LARGE = {**STYLE, "font.size": 14, "axes.titlesize": 14}


@functools.cache
def _computed() -> dict[str, Any]:
    """The variables that the page's code blocks define; takes a minute or two."""
    names: dict[str, Any] = {}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        for block in read_blocks(_PAGE):
            if block.language == "python":
                exec(compile(block.code, f"{_PAGE.name}:{block.line}", "exec"), names)
    return names


def draw_scenes(path: Path) -> None:
    """Draw two images of each domain above their labels."""
    names = _computed()
    pairs = [names["source"][i] for i in (0, 1)] + [names["labelled"][i] for i in (0, 1)]
    with matplotlib.rc_context(_LARGE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        for i, (image, label) in enumerate(pairs):
            above, below = figure.add_subplot(2, 4, i + 1), figure.add_subplot(2, 4, i + 5)
            above.imshow(_picture(image), interpolation="nearest")
            above.set_title("source" if i < 2 else "target")
            _draw_classes(below, label)
            for axes in (above, below):
                axes.set(xticks=[], yticks=[])
        name_classes(figure, names["CLASSES"])
        save_figure(figure, path)


def draw_health(path: Path) -> None:
    """Draw the discriminator's accuracy and the distance of the prototypes, with and without alignment."""
    names = _computed()
    runs = {"without alignment": names["plain_rows"], "with alignment": names["aligned_rows"]}
    with matplotlib.rc_context(_LARGE):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for (title, rows), colour in zip(runs.items(), (ORANGE, BLUE), strict=True):
            steps = [row["step"] for row in rows]
            accuracy = [(row["source_accuracy"] + row["target_accuracy"]) / 2 for row in rows]
            distance = [row["prototype_distance"] for row in rows]
            for axes, values in ((left, accuracy), (right, distance)):
                axes.plot(steps, values, color=colour, linewidth=1, alpha=0.35)
                axes.plot(steps, _smooth(values), color=colour, linewidth=2.5, label=title)
        left.axhline(0.5, color="0.5", linestyle=":", linewidth=1.5)
        left.text(left.get_xlim()[1], 0.48, "chance", ha="right", va="top")
        left.set(title="accuracy of the discriminator", ylim=(0, 1.05), yticks=[0, 0.25, 0.5, 0.75, 1])
        left.set(xlabel="step", ylabel="mean of both domains")
        right.set(title="distance of the prototypes", ylim=(0, None), xlabel="step")
        right.yaxis.set_major_locator(MaxNLocator(4))
        handles = [*right.get_legend_handles_labels()[0], Line2D([], [], color="0.4", linewidth=1, alpha=0.5)]
        labels = [*runs, "thin: single batches; thick: mean of five"]
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=12)
        save_figure(figure, path)


def draw_predictions(path: Path) -> None:
    """Draw three test images, their labels, and the predictions of both networks."""
    names = _computed()
    shown = [names["test"][i] for i in (0, 1, 4)]
    with matplotlib.rc_context(_LARGE):
        figure = Figure(figsize=(9, 5.0), layout="constrained")
        panels = figure.subplots(len(shown), 4)
        for row, (image, label) in zip(panels, shown, strict=True):
            row[0].imshow(_picture(image), interpolation="nearest")
            for axes, ids in zip(row[1:], [label, *(_predicted(names, n, image) for n in ("plain", "aligned"))]):
                _draw_classes(axes, ids)
            for axes in row:
                axes.set(xticks=[], yticks=[])
        for axes, title in zip(panels[0], ["target image", "labels", "plain", "aligned"], strict=True):
            axes.set_title(title)
        name_classes(figure, names["CLASSES"])
        save_figure(figure, path)


def draw_discriminators(path: Path) -> None:
    """Draw the inputs of both discriminators in both domains, and the outputs of the one over prototypes."""
    names = _computed()
    classes = names["CLASSES"]
    inputs = {"source": names["source"][:40], "target": names["test"]}
    prototypes = {
        (run, domain): _prototypes(names, names[run], pairs)
        for run in ("plain", "aligned")
        for domain, pairs in inputs.items()
    }
    with matplotlib.rc_context(_LARGE):
        figure = Figure(figsize=(9, 9.8), layout="constrained")
        panels = figure.subplots(3, 2, height_ratios=[1, 1, 1])
        for axes, (domain, pairs) in zip(panels[0], inputs.items(), strict=True):
            with torch.no_grad():
                _, logits = names["plain"](pairs[0][0][None])
            colours = torch.from_numpy(class_colours(classes)).float() / 255
            axes.imshow(torch.einsum("khw,kc->hwc", logits[0].softmax(0), colours).numpy(), interpolation="nearest")
            axes.set_title(f"output map, {domain}")
            axes.set(xticks=[], yticks=[])
        # Square roots, since a few channels are far larger than the rest. All values are outputs of a ReLU.
        seen = {domain: prototypes["plain", domain].sqrt() for domain in inputs}
        largest = max(float(value.max()) for value in seen.values())
        for axes, domain in zip(panels[1], inputs, strict=True):
            axes.imshow(seen[domain].numpy(), aspect="auto", cmap="Greys", vmin=0, vmax=largest)
            axes.set_title(f"prototypes, {domain}")
            axes.set(xticks=[], yticks=range(len(classes)), yticklabels=classes, xlabel="64 channels")
        for axes, run, align in zip(panels[2], ("plain", "aligned"), ("plain_align", "align"), strict=True):
            for domain, marker, colour in (("source", "o", BLUE), ("target", "X", ORANGE)):
                with torch.no_grad():
                    answers = names[align].discriminator(prototypes[run, domain])
                axes.plot(answers.numpy(), range(len(classes)), marker, color=colour, markersize=10, label=domain)
            axes.axvline(0, color="0.75", linestyle=":", linewidth=1.5)
            axes.set(yticks=range(len(classes)), yticklabels=classes, ylim=(len(classes) - 0.5, -0.5))
            axes.set(title=f"output of D_s, {run} run", xlabel="logit (positive: source)", xlim=(-8, 8))
        panels[2, 1].legend(loc="lower right", handletextpad=0.1)
        name_classes(figure, classes)
        save_figure(figure, path)


def _prototypes(names: dict[str, Any], network: torch.nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    images, labels = (torch.stack(parts) for parts in zip(*pairs))
    with torch.no_grad():
        return semshift.class_sums(network(images)[0], labels, names["K"]).means


def _predicted(names: dict[str, Any], network: str, image: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = names[network](image[None])[1]
    return logits[0].argmax(0)


def _picture(image: Tensor) -> np.ndarray:
    picture: np.ndarray = image.permute(1, 2, 0).numpy()
    return picture


def _draw_classes(axes: Axes, ids: Tensor) -> None:
    colours = class_colours(CLASSES) / 255
    axes.imshow(ids.numpy(), cmap=ListedColormap(colours), vmin=-0.5, vmax=len(CLASSES) - 0.5, interpolation="nearest")


def _smooth(values: list[float]) -> np.ndarray:
    """Running mean of five neighbours, of fewer at both ends."""
    ones = np.ones(5)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
