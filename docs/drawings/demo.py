"""README's picture: what the two networks of `python -m examples.workbench demo` see in four target images."""

import sys
import tempfile
from pathlib import Path

import matplotlib
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from examples.workbench import checkpoints
from examples.workbench.__main__ import main as trainer
from examples.workbench.build import build_segmenter
from examples.workbench.evaluate import predict
from examples.workbench.images import open_images
from examples.workbench.settings import Settings
from examples.workbench.style import STYLE, class_colours, save_figure

__all__ = ["draw_demo"]

_METHODS = ("source-only", "ass")
_SHOWN = (0, 20, 39, 59)


def draw_demo(path: Path) -> None:
    """Train as the demo does, for some minutes, and draw validation images, labels and predictions."""
    settings = Settings()
    segmenters = []
    with tempfile.TemporaryDirectory() as out:
        if trainer(["demo", "--out", out]):
            sys.exit("expected the demo to train, got an error")
        for method in _METHODS:
            segmenter = build_segmenter(settings)
            segmenter.load_state_dict(checkpoints.load_weights(checkpoints.newest(Path(out) / method)))
            segmenters.append(segmenter.eval())
    images, classes = open_images(settings, None).validation, settings.data.classes
    colours = class_colours(len(classes)) / 255
    with matplotlib.rc_context({**STYLE, "font.size": 13, "axes.titlesize": 13}):
        figure = Figure(figsize=(9, 7.2), layout="constrained")
        panels = figure.subplots(len(_SHOWN), 4)
        for row, index in zip(panels, _SHOWN, strict=True):
            sample = images[index]
            row[0].imshow(sample.image, interpolation="nearest")
            predictions = [predict(segmenter, sample, settings.data.size) for segmenter in segmenters]
            for axes, ids in zip(row[1:], [sample.label, *predictions], strict=True):
                cmap = ListedColormap(colours)
                axes.imshow(ids, cmap=cmap, vmin=-0.5, vmax=len(classes) - 0.5, interpolation="nearest")
            for axes, ids in zip(row[2:], predictions, strict=True):
                axes.set_xlabel(f"{100 * (ids == sample.label).mean():.0f} % of pixels right", fontsize=11)
            for axes in row:
                axes.set(xticks=[], yticks=[])
        names = ["target image", "ground truth", "source-only", f"ass, {settings.labelled} labelled"]
        for axes, name in zip(panels[0], names, strict=True):
            axes.set_title(name)
        handles = [Patch(color=colour, label=name) for colour, name in zip(colours, classes, strict=True)]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=8, fontsize=11, columnspacing=1, handlelength=1
        )
        save_figure(figure, path)
