"""Summary of several studies, such as one for each pair of domains: a table in Markdown, and a figure."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.workbench.files import save_figure, write_whole
from examples.workbench.reporting.style import BLUE, ORANGE, STYLE
from examples.workbench.studies.report import (
    count_classes,
    duration,
    format_number,
    format_spread,
    style_rows,
    tabulate,
)
from examples.workbench.studies.study import Record, Study, as_arguments

__all__ = ["Results", "draw_summary", "summary_table", "write_summary"]

Results = Mapping[str, tuple[Study, Sequence[Record]]]
"""A study's name to the study and one or more records of its runs."""


def write_summary(found: Results, path: Path, command: str) -> str:
    """Write the table to `path`, and the figure beside it as `.png`.

    Returns the table. In the file, the figure and the `command` that wrote it follow the table.
    """
    table = summary_table(found)
    alternative = "Difference of each row to the baseline, by study: each seed, the mean, and two standard errors"
    text = f"{table}\n![{alternative}]({path.stem}.png)\n\n`{command}`\n"
    write_whole(path, lambda to: to.write_text(text, encoding="utf-8"))
    draw_summary(path.with_suffix(".png"), found)
    return table


def summary_table(found: Results) -> str:
    """Table in Markdown: a line for each row of the studies, and a column for each study."""
    columns = pd.DataFrame({name: _cells(*of) for name, of in found.items()}).reindex(_rows(found)).fillna("–")
    columns.index.name = "row"
    notes = [
        f"- `{name}`: {study.title}. mIoU on the {study.split} images over {count_classes(study, results)}. Baseline: "
        f"`{study.baseline}`. {len(results)} runs, {duration(results)} in total, each with "
        f"`train {' '.join(as_arguments(study.train))}`."
        for name, (study, results) in found.items()
    ]
    parts = [
        f"## Summary of {', '.join(found)}",
        "Each cell has three parts. The first is mIoU in percent: mean ± sample standard deviation over the seeds. The "
        "second is the difference to the baseline with the same seed: mean ± standard error. The number of seeds is in "
        "brackets. A difference below two standard errors is not statistically significant. Where two rows have "
        "different numbers of seeds, compare their differences only.",
        columns.to_markdown(disable_numparse=True, colalign=["left"] + ["right"] * len(found)),
        "\n".join(notes),
    ]
    return "\n\n".join(parts) + "\n"


def draw_summary(path: Path, found: Results) -> None:
    """Draw the differences to the baseline: a panel for each study, a line for each row, a dot for each seed."""
    rows = _rows(found)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(9.0, 1.5 + 2.5 * len(found)), 2.2 + 0.55 * len(rows)), layout="constrained")
        # One scale, so that a point of mIoU has the same length in every panel.
        all_axes = figure.subplots(1, len(found), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (study, results) in zip(all_axes, found.values(), strict=True):
            axes.set_title(textwrap.fill(study.title, 22))
            axes.set_xlabel(f"points against {study.baseline}\nworse  ←  →  better")
            _draw_differences(axes, study, results, rows)
        for axes in all_axes:
            # After all panels are drawn: they share a scale that holds the data of all.
            style_rows(axes)
        all_axes[0].set_yticks(range(len(rows)), rows)
        all_axes[0].set_ylim(len(rows) - 0.4, -0.7)
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
        save_figure(figure, path)


def _rows(found: Results) -> list[str]:
    """The rows of all studies that have runs, in the order of the studies."""
    ran = {record["row"] for _, results in found.values() for record in results}
    return [row for row in dict.fromkeys(row for study, _ in found.values() for row in study.rows) if row in ran]


def _cells(study: Study, results: Sequence[Record]) -> pd.Series:
    """Cells of one study's column, by row."""
    miou, differences, _ = tabulate(study, results)
    means = format_spread(miou.mean(axis=1), miou.std(axis=1))
    changes = format_spread(differences.mean(axis=1), differences.sem(axis=1), sign="+")
    counts = differences.count(axis=1).where(lambda pairs: pairs > 0, miou.count(axis=1))
    cells = [f"{m} ({n})" if c == "–" else f"{m}, {c} ({n})" for m, c, n in zip(means, changes, counts, strict=True)]
    return pd.Series(cells, miou.index)


def _draw_differences(axes: Axes, study: Study, results: Sequence[Record], rows: Sequence[str]) -> None:
    miou, differences, _ = tabulate(study, results)
    differences = differences.reindex(rows)
    means, errors, lines = differences.mean(axis=1), differences.sem(axis=1), np.arange(len(rows))
    axes.axvline(0, color="0.5", linewidth=1, zorder=0)
    for index, seed in enumerate(differences):
        label = "_" if index else "one seed"
        axes.plot(differences[seed], lines + 0.2, "o", color=BLUE, markersize=5, alpha=0.7, label=label)
    several = errors.notna()
    bars = axes.errorbar(means[several], lines[several], xerr=2 * errors[several], fmt="D", **_BARS)
    bars.set_label("mean ± 2 standard errors; not significant where it crosses 0")
    for line, (row, mean) in enumerate(means.items()):
        if not math.isnan(mean):
            text = format_number(mean, "+") if several[row] else f"{format_number(mean, '+')}, one seed"
            axes.text(mean, line - 0.15, text, ha="center", va="bottom", fontsize=11)
            continue
        note = f"mIoU {format_number(miou.loc[row].mean())}" if row in miou.index else "not run"
        look = {"boxstyle": "square", "facecolor": "white", "edgecolor": "none"}
        axes.text(0, line, note, ha="center", va="center", fontsize=11, bbox=look)


_BARS: Any = {"color": ORANGE, "capsize": 4, "elinewidth": 2}
