"""Report of a study: its table in Markdown, a figure of its runs, and one of their curves."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.workbench.errors import InputError
from examples.workbench.files import save_figure, write_whole
from examples.workbench.reporting.style import STYLE, class_colours
from examples.workbench.studies.study import Record, Study, as_arguments

__all__ = ["count_classes", "draw_curves", "draw_study", "duration", "format_number", "format_spread", "study_table"]
__all__ += ["style_rows", "tabulate", "write_report"]


def write_report(study: Study, results: Sequence[Record], records: Path, command: str) -> str:
    """Write the table and the figures beside the records: `.md`, `.png` and, where there are curves, `-curves.png`.

    Returns the table. The file names below it the `command` that wrote it.
    """
    if not results:
        raise InputError(f"expected {records} to hold runs of {study.title}, got none")
    table = study_table(study, results)
    write_whole(records.with_suffix(".md"), lambda to: to.write_text(f"{table}\n`{command}`\n", encoding="utf-8"))
    draw_study(records.with_suffix(".png"), study, results)
    draw_curves(records.with_name(f"{records.stem}-curves.png"), study, results)
    return table


def study_table(study: Study, results: Sequence[Record]) -> str:
    """Tables in Markdown: mIoU of each row and seed, difference to the baseline, and IoU of each class."""
    common = " ".join(as_arguments(study.train))
    miou, differences, iou = tabulate(study, results)
    # The method has a column of its own.
    own = {row: as_arguments({k: v for k, v in study.rows[row].items() if k != "method"}) for row in miou.index}
    table = pd.DataFrame(
        {
            "method": [study.settings[row].method for row in miou.index],
            "settings": [", ".join(text[2:].replace("=", " ", 1) for text in own[row]) for row in miou.index],
            "mIoU": format_spread(miou.mean(axis=1), miou.std(axis=1)),
            "difference": format_spread(differences.mean(axis=1), differences.sem(axis=1), sign="+"),
            **{f"seed {seed}": miou[seed].map(format_number) for seed in miou},
        }
    )
    versions = pd.DataFrame([record["versions"] for record in results])
    found = ", ".join(f"{name} {' and '.join(versions[name].dropna().unique())}" for name in versions)
    parts = [
        f"## {study.title}",
        f"mIoU in percent on {study.split} images, over {count_classes(study, results)}: mean ± sample standard "
        f"deviation over the seeds. Difference to {study.baseline} with the same seed: mean ± standard error; below "
        f"two of them it may be chance. Every run: `train {common}`.",
        table.to_markdown(disable_numparse=True, colalign=["left"] * 3 + ["right"] * (len(table.columns) - 2)),
        "IoU of each class in percent, mean over the seeds.",
        iou.map(format_number).to_markdown(disable_numparse=True, colalign=["left"] + ["right"] * len(iou.columns)),
        f"{len(results)} runs, {duration(results)} in all. Versions: {found}.",
    ]
    return "\n\n".join(parts) + "\n"


def draw_study(path: Path, study: Study, results: Sequence[Record]) -> None:
    """Draw each run and the mean of each row, and beside them the differences to the baseline with the same seed."""
    miou, differences, _ = tabulate(study, results)
    panels = [(miou, f"mIoU on the {study.split} images", "percent")]
    if differences.notna().any(axis=None):
        panels.append((differences, f"Difference to {study.baseline}, same seed", "points of mIoU"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.5 + 5.5 * len(panels), 1.9 + 0.5 * len(miou)), layout="constrained")
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (values, title, unit) in zip(all_axes, panels, strict=True):
            axes.set(title=title, xlabel=unit)
            _draw_runs(axes, values, sign="" if values is miou else "+")
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=len(study.seeds) + 1)
        save_figure(figure, path)


def draw_curves(path: Path, study: Study, results: Sequence[Record]) -> None:
    """Draw mIoU on the validation images over the steps: a thin line for each run, a thick one for a row's mean.

    Draws nothing if no run evaluated them on its way (`validate_every`).
    """
    curves = pd.DataFrame({(r["row"], r["seed"]): dict(r["curve"]) for r in results if r.get("curve")}) * 100
    if curves.empty:
        return
    rows = curves.columns.get_level_values(0).unique()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 5.0), layout="constrained")
        axes = figure.subplots()
        # Colours and dashes both, for eyes that tell few colours apart; without the yellow, which is lost on white.
        colours = np.delete(class_colours(len(rows) + 1), 1, axis=0) / 255
        for index, row in enumerate(rows):
            look = {"color": colours[index], "linestyle": ("-", "--", ":", "-.")[index % 4]}
            for _, curve in curves[row].items():
                axes.plot(curve.dropna(), linewidth=0.8, alpha=0.5, **look)
            # Over the steps at which all runs were evaluated.
            axes.plot(curves[row].mean(axis=1, skipna=False).dropna(), linewidth=2.2, label=row, **look)
        axes.set(title=study.title, xlabel="step", ylabel="mIoU on the validation images, percent")
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        figure.legend(loc="outside right upper")
        save_figure(figure, path)


def tabulate(study: Study, results: Sequence[Record]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Rows with runs, in percent: mIoU of each seed, its difference to the baseline's, and mean IoU of each class."""
    scores = [study.scores(record) for record in results]
    runs = pd.MultiIndex.from_tuples([(r["row"], r["seed"]) for r in results], names=["row", "seed"])
    iou = 100 * pd.DataFrame([of["iou"] for of in scores], runs, dtype=float)
    means = iou.groupby("row", sort=False).mean()
    miou = 100 * pd.Series([of["miou"] for of in scores], runs).unstack("seed")
    miou = miou.reindex(index=means.index, columns=study.seeds)
    # Seed by seed: what a lucky seed gives to both cancels.
    differences = miou - miou.reindex([study.baseline]).iloc[0]
    differences[miou.index == study.baseline] = math.nan
    return miou, differences, means


def count_classes(study: Study, results: Sequence[Record]) -> str:
    """Over how many of how many classes the mIoU of the runs is."""
    scores = [study.scores(record) for record in results]
    counted = sorted({sum(value is not None for value in of["iou"].values()) for of in scores})
    return f"{' or '.join(map(str, counted))} of {' or '.join(sorted({str(len(of['iou'])) for of in scores}))} classes"


def duration(results: Sequence[Record]) -> str:
    """The time of all runs together, such as `1 h 4 min`."""
    minutes, seconds = divmod(round(sum(record["seconds"] for record in results)), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"


def format_number(value: float, sign: str = "") -> str:
    """A number with one decimal, or a dash for none; `sign` is `+` where it is written."""
    # Adding 0.0 turns a -0.0 into 0.0.
    return "–" if math.isnan(value) else format(round(value, 1) + 0.0, f"{sign}.1f")


def format_spread(means: pd.Series, errors: pd.Series, sign: str = "") -> list[str]:
    """Means with their spreads or errors, such as `43.0 ± 3.6`."""
    return [
        "–" if math.isnan(mean) else f"{format_number(mean, sign)} ± {format_number(error)}"
        for mean, error in zip(means, errors)
    ]


def _draw_runs(axes: Axes, values: pd.DataFrame, *, sign: str) -> None:
    """A line of marks for each row, the first on top: a mark for each seed, and a bar for the mean."""
    if sign:
        axes.axvline(0, color="0.5", linewidth=1, zorder=0)
    lines = np.arange(len(values))
    for index, seed in enumerate(values.columns):
        marker = "osD^vP*X"[index % 8]
        axes.plot(values[seed], lines + 0.12, marker, color="#0072B2", markersize=7, alpha=0.8, label=f"seed {seed}")
    means = values.mean(axis=1)
    axes.vlines(means, lines - 0.18, lines + 0.32, color="#D55E00", linewidth=3, label="mean")
    for line, mean in zip(lines, means, strict=True):
        if not math.isnan(mean):
            axes.text(mean, line - 0.22, format_number(mean, sign), ha="center", va="bottom", fontsize=10)
    axes.set_yticks(lines, list(values.index))
    axes.set_ylim(len(values) - 0.4, -0.75)
    style_rows(axes)


def style_rows(axes: Axes) -> None:
    """The look of axes with a line for each row of a study."""
    axes.margins(x=0.08)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
