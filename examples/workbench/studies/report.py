"""Report of a study: tables in Markdown, a figure of the runs, and a figure of their curves."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from examples.workbench.errors import InputError
from examples.workbench.files import save_figure, write_whole
from examples.workbench.reporting.style import BLUE, ORANGE, STYLE
from examples.workbench.studies.study import Record, Study, as_arguments

__all__ = ["count_classes", "draw_curves", "draw_study", "duration", "format_number", "format_spread", "study_table"]
__all__ += ["style_rows", "tabulate", "write_report"]


def write_report(study: Study, results: Sequence[Record], records: Path, command: str) -> str:
    """Write the tables and the figures beside the records: `.md`, `.png` and, where there are curves, `-curves.png`.

    Returns the tables. In the file, the pictures and the `command` that wrote it follow them.
    """
    if not results:
        raise InputError(f"expected {records} to hold runs of {study.title}, got none")
    table = study_table(study, results)
    pictures = [
        f"![mIoU of every run, the mean of each row, and the differences to {study.baseline}]({records.stem}.png)"
    ]
    draw_study(records.with_suffix(".png"), study, results)
    if any(record.get("curve") for record in results):
        draw_curves(records.with_name(f"{records.stem}-curves.png"), study, results)
        pictures.append(f"![mIoU of each row on the validation images over the steps]({records.stem}-curves.png)")
    text = "\n\n".join([table.rstrip("\n"), *pictures, f"`{command}`"]) + "\n"
    write_whole(records.with_suffix(".md"), lambda to: to.write_text(text, encoding="utf-8"))
    return table


def study_table(study: Study, results: Sequence[Record]) -> str:
    """Tables in Markdown: mIoU of each row, its difference to the baseline, each seed, and IoU of each class."""
    common = " ".join(as_arguments(study.train))
    miou, differences, iou = tabulate(study, results)
    table = pd.DataFrame(
        {
            "mIoU": format_spread(miou.mean(axis=1), miou.std(axis=1)),
            "difference": format_spread(differences.mean(axis=1), differences.sem(axis=1), sign="+"),
        },
        miou.index,
    )
    seeds = ", ".join(map(str, miou.columns))
    if len(miou.columns) > 1:
        table[f"seeds {seeds}"] = [", ".join(map(format_number, row)) for row in miou.to_numpy()]
    versions = pd.DataFrame([record["versions"] for record in results])
    found = ", ".join(f"{name} {' and '.join(versions[name].dropna().unique())}" for name in versions)
    spread, error = ": mean ± sample standard deviation over the seeds", ": mean ± standard error"
    if len(miou.columns) == 1:
        spread, error = f", from one seed ({seeds})", ""
    parts = [
        f"## {study.title}",
        f"mIoU in percent on the {study.split} images, over {count_classes(study, results)}{spread}. "
        f"The difference is to `{study.baseline}` with the same seed{error}. "
        + (_HOW_TO_READ if len(miou.columns) > 1 else "With one seed, small differences may be chance."),
        _markdown(table),
        *_describe_rows(study, list(miou.index)),
        f"Settings of every run: `train {common}`." if common else "",
        f"IoU of each class in percent{', mean over the seeds' if len(miou.columns) > 1 else ''}.",
        *min(_fit(iou.map(format_number)), _fit(iou.map(format_number).T.rename_axis("class")), key=_width),
        f"{len(results)} runs, {duration(results)} in total. Versions: {found}.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


_HOW_TO_READ = (
    "A difference below two standard errors is not statistically significant. A value without ± comes from one seed."
)


def _describe_rows(study: Study, rows: Sequence[str]) -> list[str]:
    """A list of the rows whose name does not say it all: their methods and their own settings."""
    lines = []
    for row in rows:
        method = study.settings[row].method
        own = [text[2:] for text in as_arguments({k: v for k, v in study.rows[row].items() if k != "method"})]
        if own or method != row:
            lines.append(f"- `{row}`: method `{method}`" + "".join(f", `{text}`" for text in own))
    return ["Rows with their own settings:", "\n".join(lines)] if lines else []


def _markdown(table: pd.DataFrame) -> str:
    text: str = table.to_markdown(disable_numparse=True, colalign=["left"] + ["right"] * len(table.columns))
    return text


def _width(tables: list[str]) -> tuple[int, int]:
    """The number of tables and of their columns: few of both also fit on a phone."""
    return len(tables), tables[0].partition("\n")[0].count("|")


def _fit(table: pd.DataFrame) -> list[str]:
    """Tables in Markdown, with as many columns in each as fit into 110 characters."""
    text, columns = _markdown(table), len(table.columns)
    if columns < 2 or text.index("\n") <= 110:
        return [text]
    half = math.ceil(columns / 2)
    return [*_fit(table.iloc[:, :half]), *_fit(table.iloc[:, half:])]


def draw_study(path: Path, study: Study, results: Sequence[Record]) -> None:
    """Draw each run and the mean of each row, and beside them the differences to the baseline with the same seed."""
    miou, differences, _ = tabulate(study, results)
    panels = [(miou, f"mIoU, {study.split} images", "percent")]
    if differences.notna().any(axis=None):
        panels.append((differences, f"Difference to {study.baseline}", "points of mIoU, same seed"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 1.6 + 0.37 * len(miou)), layout="constrained")
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (values, title, unit) in zip(all_axes, panels, strict=True):
            axes.set(title=title, xlabel=unit)
            _draw_runs(axes, values, sign="" if values is miou else "+")
        figure.legend(handles=_legend(miou), loc="outside lower left", ncols=3)
        save_figure(figure, path)


def draw_curves(path: Path, study: Study, results: Sequence[Record]) -> None:
    """Draw mIoU on the validation images over the steps: a thin line for each run, a thick line for a row's mean.

    Draws nothing if no run recorded such a curve (`validate_every`).
    """
    curves = pd.DataFrame({(r["row"], r["seed"]): dict(r["curve"]) for r in results if r.get("curve")}) * 100
    if curves.empty:
        return
    rows, seeds = (curves.columns.get_level_values(level).unique() for level in (0, 1))
    how = f"one seed ({seeds[0]})" if len(seeds) == 1 else "thin lines: one seed each; thick lines: their mean"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 4.8), layout="constrained")
        axes = figure.subplots()
        for index, row in enumerate(rows):
            # Colours and dashes both, for eyes that tell few colours apart.
            look: Any = {"color": _LINES[index % len(_LINES)], "linestyle": ("-", "--", ":", "-.")[index % 4]}
            for _, curve in curves[row].items():
                axes.plot(curve.dropna(), linewidth=0.8, alpha=0.5, **look)
            # Over the steps at which all runs were evaluated.
            axes.plot(curves[row].mean(axis=1, skipna=False).dropna(), linewidth=2.5, label=row, **look)
        axes.set(title=f"{study.title}\n{how}", xlabel="step", ylabel="mIoU on the validation images, percent")
        axes.set_xlim(0, axes.dataLim.intervalx[1])
        _limit(axes.set_ylim, axes.dataLim.intervaly)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        figure.legend(loc="outside right upper")
        save_figure(figure, path)


_LINES = (BLUE, ORANGE, "#009E73", "#AA3F9E", "#555555", "#7C3328")
"""Colours of lines that are dark enough on white."""


def tabulate(study: Study, results: Sequence[Record]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Values of the rows in percent: mIoU of each seed, its difference to the baseline, and mean IoU of each class."""
    scores = [study.scores(record) for record in results]
    runs = pd.MultiIndex.from_tuples([(r["row"], r["seed"]) for r in results], names=["row", "seed"])
    iou = 100 * pd.DataFrame([of["iou"] for of in scores], runs, dtype=float)
    means = iou.groupby("row", sort=False).mean()
    miou = 100 * pd.Series([of["miou"] for of in scores], runs).unstack("seed")
    miou = miou.reindex(index=means.index, columns=study.seeds)
    # Paired by seed: an advantage that a seed gives to both rows cancels.
    differences = miou - miou.reindex([study.baseline]).iloc[0]
    differences[miou.index == study.baseline] = math.nan
    return miou, differences, means


def count_classes(study: Study, results: Sequence[Record]) -> str:
    """Number of classes in the mIoU, and number of all classes, such as `11 of 11 classes`."""
    scores = [study.scores(record) for record in results]
    counted = sorted({sum(value is not None for value in of["iou"].values()) for of in scores})
    return f"{' or '.join(map(str, counted))} of {' or '.join(sorted({str(len(of['iou'])) for of in scores}))} classes"


def duration(results: Sequence[Record]) -> str:
    """Total time of all runs, such as `1 h 4 min`."""
    minutes, seconds = divmod(round(sum(record["seconds"] for record in results)), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"


def format_number(value: float, sign: str = "") -> str:
    """A number with one decimal, or a dash for NaN; with `sign="+"` positive numbers have a sign."""
    # Adding 0.0 turns a -0.0 into 0.0.
    return "–" if math.isnan(value) else format(round(value, 1) + 0.0, f"{sign}.1f")


def format_spread(means: pd.Series, errors: pd.Series, sign: str = "") -> list[str]:
    """Means with their spreads or errors, such as `43.0 ± 3.6`; a mean of one value has none."""
    spreads = ["" if math.isnan(error) else f" ± {format_number(error)}" for error in errors]
    return [format_number(mean, sign) + spread for mean, spread in zip(means, spreads, strict=True)]


def _legend(miou: pd.DataFrame) -> list[Line2D]:
    """Handles for the marks that the rows need."""
    counts = miou.count(axis=1)
    marks = [
        ((counts > 1).any(), {"marker": "o", "linestyle": "", "alpha": 0.7, "color": BLUE, "label": "one seed"}),
        ((counts > 1).any(), {"marker": "|", "linestyle": "", **_MEAN, "label": "mean of the seeds"}),
        ((counts == 1).any(), {"marker": "o", "linestyle": "", **_SINGLE, "label": "row with one seed only"}),
    ]
    return [Line2D([], [], **look) for needed, look in marks if needed]


_MEAN: Any = {"color": ORANGE, "markersize": 15, "markeredgewidth": 3}
_SINGLE: Any = {"color": BLUE, "markerfacecolor": "white", "markeredgewidth": 1.8}


def _draw_runs(axes: Axes, values: pd.DataFrame, *, sign: str) -> None:
    """A line of marks for each row, the first on top: a mark for each seed, a bar for the mean, and its number."""
    if sign:
        axes.axvline(0, color="0.5", linewidth=1, zorder=0)
    means, counts = values.mean(axis=1), values.count(axis=1)
    for line, (row, mean) in enumerate(means.items()):
        single = counts[row] == 1
        look = _SINGLE if single else {"color": BLUE, "alpha": 0.7}
        axes.plot(values.loc[row], [line] * len(values.columns), "o", markersize=7, **look)
        if counts[row] > 1:
            axes.plot(mean, line, "|", **_MEAN)
        if not math.isnan(mean):
            # In a column at the right, where no mark hides it.
            at = axes.get_yaxis_transform()
            axes.text(1.02, line, format_number(mean, sign), ha="left", va="center", transform=at)
    axes.set_yticks(range(len(values)), list(values.index))
    axes.set_ylim(len(values) - 0.5, -0.5)
    style_rows(axes)


def style_rows(axes: Axes, ticks: int = 5) -> None:
    """Style axes with a line for each row of a study, and a scale of at least five points."""
    # Panels may share the scale, which then holds the data of all.
    spans = [each.dataLim.intervalx for each in axes.get_shared_x_axes().get_siblings(axes)]
    _limit(axes.set_xlim, (min(low for low, _ in spans), max(high for _, high in spans)))
    axes.xaxis.set_major_locator(MaxNLocator(ticks - 1, integer=True))
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _limit(set_limits: Callable[[float, float], Any], span: Sequence[float]) -> None:
    """Show a span of data with a margin, and five points of mIoU at least, so that no noise fills the axis."""
    low, high = span
    half = max(5.0, 1.12 * (high - low)) / 2
    set_limits((low + high) / 2 - half, (low + high) / 2 + half)
