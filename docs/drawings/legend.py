"""Legend of the class colours below a drawing."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from examples.workbench.reporting.style import class_colours

__all__ = ["name_classes"]


def name_classes(figure: Figure, classes: Sequence[str]) -> None:
    """Add a legend of the classes in one line."""
    handles = [Patch(color=c, label=name) for c, name in zip(class_colours(classes) / 255, classes, strict=True)]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(classes), fontsize=11.5, columnspacing=1, handlelength=1
    )
