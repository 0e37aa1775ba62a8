"""Summary of several studies, such as one for each pair of domains: a table in Markdown, and a figure."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.workbench.files import save_figure, write_whole
from examples.workbench.reporting.style import STYLE
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

    Returns the table. The file names below it the `command` that wrote it.
    """
    table = summary_table(found)
    write_whole(path, lambda to: to.write_text(f"{table}\n`{command}`\n", encoding="utf-8"))
    draw_summary(path.with_suffix(".png"), found)
    return table


def summary_table(found: Results) -> str:
    """Table in Markdown: a line for each row of the studies, and a column for each study."""
    columns = pd.DataFrame({name: _cells(*of) for name, of in found.items()}).reindex(_rows(found)).fillna("–")
    columns.index.name = "row"
    notes = [
        f"- `{name}`: {study.title}. On {study.split} images, over {count_classes(study, results)}; differences to "
        f"{study.baseline}; {len(results)} runs, {duration(results)} in all, every one `train "
        f"{' '.join(as_arguments(study.train))}`."
        for name, (study, results) in found.items()
    ]
    parts = [
        f"## Summary of {', '.join(found)}",
        "mIoU in percent: mean ± sample standard deviation over the seeds; then the difference to the baseline with "
        "the same seed: mean ± standard error; in brackets the number of seeds. A difference below two of its errors "
        "may be chance. Rows with other numbers of seeds compare by their differences only.",
        columns.to_markdown(disable_numparse=True, colalign=["left"] + ["right"] * len(found)),
        "\n".join(notes),
    ]
    return "\n\n".join(parts) + "\n"


def draw_summary(path: Path, found: Results) -> None:
    """Draw the differences to the baseline: a panel for each study, a line for each row, a dot for each seed."""
    rows = _rows(found)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.7 + 4.0 * len(found), 2.4 + 0.5 * len(rows)), layout="constrained")
        # One scale, so that a point of mIoU has the same length in every panel.
        all_axes = figure.subplots(1, len(found), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (study, results) in zip(all_axes, found.values(), strict=True):
            axes.set_title(textwrap.fill(study.title, 32))
            axes.set_xlabel(f"worse  ←  points of mIoU against {study.baseline}  →  better")
            _draw_differences(axes, study, results, rows)
        all_axes[0].set_yticks(range(len(rows)), rows)
        all_axes[0].set_ylim(len(rows) - 0.4, -0.7)
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
        save_figure(figure, path)


def _rows(found: Results) -> list[str]:
    """The rows of all studies that have runs, in the order of the studies."""
    ran = {record["row"] for _, results in found.values() for record in results}
    return [row for row in dict.fromkeys(row for study, _ in found.values() for row in study.rows) if row in ran]


def _cells(study: Study, results: Sequence[Record]) -> pd.Series:
    """What the table says of each row of a study."""
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
        axes.plot(differences[seed], lines + 0.2, "o", color="#0072B2", markersize=5, alpha=0.7, label=label)
    bars = axes.errorbar(means, lines, xerr=2 * errors, fmt="D", color="#D55E00", capsize=4, elinewidth=2)
    bars.set_label("mean ± 2 standard errors; may be chance where it crosses 0")
    for line, (row, mean) in enumerate(means.items()):
        if not math.isnan(mean):
            axes.text(mean, line - 0.15, format_number(mean, "+"), ha="center", va="bottom", fontsize=10)
            continue
        note = f"mIoU {format_number(miou.loc[row].mean())}" if row in miou.index else "not run"
        look = {"boxstyle": "square", "facecolor": "white", "edgecolor": "none"}
        axes.text(0, line, note, ha="center", va="center", fontsize=10, bbox=look)
    style_rows(axes)
