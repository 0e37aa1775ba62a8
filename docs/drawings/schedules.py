"""Drawing of every schedule over a run of a thousand steps."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

import semshift
from examples.workbench.files import save_figure
from examples.workbench.reporting.style import BLUE, STYLE

__all__ = ["SHOWN", "draw_schedules"]

SHOWN: tuple[semshift.Schedule, ...] = (
    semshift.Constant(0.01),
    semshift.Linear(0.0, 0.01, steps=600),
    semshift.Cosine(0.01, 0.0, steps=1000),
    semshift.Polynomial(0.01, 0.0, steps=1000),
    semshift.Sigmoid(0.0, 0.01, steps=600),
    semshift.Then(semshift.Constant(0.0), 200, semshift.Sigmoid(0.0, 0.01, steps=200)),
)
"""Schedules in the drawing, one of each kind."""

_STEPS = 1000


def draw_schedules(path: Path) -> None:
    """Draw a panel for each schedule, with its code as the title."""
    with matplotlib.rc_context({**STYLE, "font.size": 14}):
        figure = Figure(figsize=(9, 8), layout="constrained")
        panels = figure.subplots(3, 2, sharex=True, sharey=True).flatten()
        for axes, schedule in zip(panels, SHOWN, strict=True):
            axes.plot([schedule(step) for step in range(_STEPS)], color=BLUE, linewidth=2.5)
            axes.set_title(_code(schedule), fontsize=12, family="monospace", weight="normal")
            axes.grid(color="0.9")
            axes.set(ylim=(-0.0005, 0.0108), yticks=[0, 0.005, 0.01], xticks=[0, 200, 400, 600, 800, 1000])
        for axes in panels[-2:]:
            axes.set_xlabel("step")
        save_figure(figure, path)


def _code(schedule: semshift.Schedule) -> str:
    if isinstance(schedule, semshift.Then):
        return f"Then({_code(schedule.first)}, {schedule.steps},\n     {_code(schedule.second)})"
    if isinstance(schedule, semshift.Constant):
        return f"Constant({schedule.value})"
    assert isinstance(schedule, semshift.Linear | semshift.Cosine | semshift.Polynomial | semshift.Sigmoid)
    return f"{type(schedule).__name__}({schedule.start}, {schedule.stop}, steps={schedule.steps})"
