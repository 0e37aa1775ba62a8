"""The pictures of `docs/tutorial.md`, drawn from what its own blocks compute, and what the discriminators see of it."""

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
from matplotlib.patches import Patch
from torch import Tensor

import semshift
from docs.pages import read_blocks
from examples.scenes import CLASSES
from examples.workbench.files import save_figure
from examples.workbench.reporting.style import STYLE, class_colours

__all__ = ["draw_discriminators", "draw_health", "draw_predictions", "draw_scenes"]

_PAGE = Path(__file__).parent.parent / "tutorial.md"
_LARGE = {**STYLE, "font.size": 13, "axes.titlesize": 13}
_ORANGE, _BLUE = "#D55E00", "#0072B2"


@functools.cache
def _computed() -> dict[str, Any]:
    """The names that the page's blocks leave behind; takes a minute."""
    names: dict[str, Any] = {}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        for block in read_blocks(_PAGE):
            if block.language == "python":
                exec(compile(block.code, f"{_PAGE.name}:{block.line}", "exec"), names)
    return names


def draw_scenes(path: Path) -> None:
    """Two images of each domain above their labels."""
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
        _name_classes(figure, names["CLASSES"])
        save_figure(figure, path)


def draw_health(path: Path) -> None:
    """The discriminator's accuracy, and the distance of the prototypes, over the steps."""
    names = _computed()
    runs = {"without alignment": names["plain_rows"], "with alignment": names["aligned_rows"]}
    with matplotlib.rc_context(_LARGE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for (title, rows), colour in zip(runs.items(), ("0.45", _BLUE), strict=True):
            steps = [row["step"] for row in rows]
            accuracy = [(row["source_accuracy"] + row["target_accuracy"]) / 2 for row in rows]
            left.plot(steps, _smooth(accuracy), color=colour, linewidth=2.5, label=title)
            right.plot(
                steps, _smooth([row["prototype_distance"] for row in rows]), color=colour, linewidth=2.5, label=title
            )
        left.axhline(0.5, color="0.75", linestyle=":", linewidth=1.5)
        left.set(title="accuracy, mean of both domains", ylim=(0, 1.05), xlabel="step")
        right.set(title="distance of the prototypes", ylim=(0, 0.9), xlabel="step")
        right.legend()
        save_figure(figure, path)


def draw_predictions(path: Path) -> None:
    """Three test images, their labels, and what each network sees."""
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
        _name_classes(figure, names["CLASSES"])
        save_figure(figure, path)


def draw_discriminators(path: Path) -> None:
    """What either discriminator sees of both domains, and what the one over prototypes answers."""
    names = _computed()
    classes = names["CLASSES"]
    inputs = {"source": names["source"][:40], "target": names["test"]}
    prototypes = {
        (run, domain): _prototypes(names, names[run], pairs)
        for run in ("plain", "aligned")
        for domain, pairs in inputs.items()
    }
    with matplotlib.rc_context(_LARGE):
        figure = Figure(figsize=(9, 9.2), layout="constrained")
        panels = figure.subplots(3, 2, height_ratios=[1, 1, 1])
        for axes, (domain, pairs) in zip(panels[0], inputs.items(), strict=True):
            with torch.no_grad():
                _, logits = names["plain"](pairs[0][0][None])
            colours = torch.from_numpy(class_colours(classes)).float() / 255
            axes.imshow(torch.einsum("khw,kc->hwc", logits[0].softmax(0), colours).numpy(), interpolation="nearest")
            axes.set_title(f"output map, {domain}")
            axes.set(xticks=[], yticks=[])
        # Roots, since a few channels are far larger than the rest; they are the outputs of a ReLU.
        seen = {domain: prototypes["plain", domain].sqrt() for domain in inputs}
        largest = max(float(value.max()) for value in seen.values())
        for axes, domain in zip(panels[1], inputs, strict=True):
            axes.imshow(seen[domain].numpy(), aspect="auto", cmap="Greys", vmin=0, vmax=largest)
            axes.set_title(f"prototypes, {domain}")
            axes.set(xticks=[], yticks=range(len(classes)), yticklabels=classes, xlabel="64 channels")
        for axes, run, align in zip(panels[2], ("plain", "aligned"), ("plain_align", "align"), strict=True):
            for domain, marker, colour in (("source", "o", _BLUE), ("target", "X", _ORANGE)):
                with torch.no_grad():
                    answers = names[align].discriminator(prototypes[run, domain])
                axes.plot(answers.numpy(), range(len(classes)), marker, color=colour, markersize=10, label=domain)
            axes.axvline(0, color="0.75", linestyle=":", linewidth=1.5)
            axes.set(yticks=range(len(classes)), yticklabels=classes, ylim=(len(classes) - 0.5, -0.5))
            axes.set(title=f"D_s answers, {run} training", xlabel="logit, positive for source", xlim=(-8, 8))
        panels[2, 1].legend(loc="lower right")
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


def _name_classes(figure: Figure, classes: tuple[str, ...]) -> None:
    handles = [Patch(color=c, label=name) for c, name in zip(class_colours(classes) / 255, classes, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, fontsize=11, columnspacing=1, handlelength=1)


def _smooth(values: list[float]) -> np.ndarray:
    """A mean over five neighbours, fewer at the ends."""
    ones = np.ones(5)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
