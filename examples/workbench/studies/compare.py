"""Several methods and seeds side by side: the runs, a table that tells differences from spread, a figure."""

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from examples.workbench.errors import InputError
from examples.workbench.files import save_figure, write_whole
from examples.workbench.reporting.style import STYLE
from examples.workbench.settings import METHODS
from examples.workbench.studies.runs import Run, finished, run_all
from examples.workbench.studies.tables import duration, markdown, percent, spread, versions

__all__ = ["compare", "comparison_table", "draw_comparison"]

_BASELINE = "joint"


def compare(
    train_arguments: Sequence[str],
    *,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    jobs: int = 2,
    threads: int = 1,
) -> list[dict[str, Any]]:
    """Train each method with each seed, and leave a table and a figure beside the runs.

    A finished run that `out` already holds is taken as it is, and one that was cut short goes on.

    Args:
        train_arguments: options of `train` that every run gets.
        methods: names of methods, none twice.
        seeds: of the runs of each method, none twice.
        out: folder of the run folders `METHOD-seedS`, their logs, and `comparison.json`, `.md` and `.png`.
        jobs: runs at a time.
        threads: of each run.

    Returns:
        What each run wrote to its `metrics.json`, with its `command`; method by method.

    Raises:
        InputError: an argument is not fit, `out` holds other runs of the same names, or a run failed.
    """
    _check(methods, seeds, jobs, threads)
    runs = [Run(method, seed, out, tuple(train_arguments)) for method in methods for seed in seeds]
    due = [run for run in runs if finished(run) is None]
    run_all(due, jobs, threads, done=len(runs) - len(due))
    results = []
    for run in runs:
        metrics = finished(run)
        if metrics is None:
            raise InputError(f"expected {run.folder} to hold metrics.json after its run, got none; see {run.log}")
        results.append(
            {**metrics, "command": shlex.join(["python", "-m", "examples.workbench", "train", *run.options])}
        )
    table = comparison_table(results)
    command = shlex.join(["--method", "METHOD", "--seed", "SEED", *train_arguments])
    how = f"Each run: `python -m examples.workbench train {command}`, {jobs} at a time, OMP_NUM_THREADS={threads}."
    write_whole(out / "comparison.json", lambda path: path.write_text(json.dumps(results, indent=2) + "\n"))
    write_whole(out / "comparison.md", lambda path: path.write_text(f"{table}\n{how}\n", encoding="utf-8"))
    draw_comparison(out / "comparison.png", results)
    return results


def comparison_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Tabulate runs in Markdown: mIoU by method and seed, paired differences to `joint`, IoU by class.

    Args:
        results: `metrics.json` of each run, all on the same classes, labelled images and steps.

    Returns:
        Values in percent; "–" where there is none: an absent class, a missing run, the spread of one seed.

    Raises:
        InputError: there is no run, two are the same, or two differ in more than method and seed.
    """
    miou, seeds = _by_method(results)
    first = results[0]
    seed_names = [f"seed {seed}" for seed in seeds]
    parts = [
        f"mIoU in percent on the test images: mean ± sample standard deviation over the seeds. "
        f"{first['labelled']} labelled target images, {first['steps']} steps.",
        markdown(
            ["method", "mIoU", *seed_names],
            [[m, spread(list(of.values())), *(percent(of.get(s)) for s in seeds)] for m, of in miou.items()],
        ),
    ]
    differences = _differences(miou)
    if differences:
        parts += [
            f"Difference to `{_BASELINE}` with the same seed, in points: mean ± sample standard deviation.",
            markdown(
                ["method", "difference", *seed_names],
                [
                    [m, spread(list(of.values()), sign="+"), *(percent(of.get(s), sign="+") for s in seeds)]
                    for m, of in differences.items()
                ],
            ),
        ]
    parts += [
        "IoU of each class in percent: mean over the seeds whose test images or predictions hold it.",
        markdown(
            ["class", *miou],
            [[name, *(_class_mean(results, m, name) for m in miou)] for name in first["iou"]],
        ),
        f"{len(results)} runs, {duration(sum(result['seconds'] for result in results))} in all. "
        f"Versions: {versions(results)}.",
    ]
    return "\n\n".join(parts) + "\n"


def draw_comparison(
    path: Path,
    results: Sequence[Mapping[str, Any]],
    *,
    baseline: str = _BASELINE,
    alike: Sequence[str] = ("labelled", "steps", "num_classes"),
    split: str = "test",
) -> None:
    """Draw each seed and the mean of every method, and beside them the paired differences to the baseline.

    Args:
        path: the picture, replaced as a whole.
        results: as for `comparison_table`.
        baseline: the method that the others are compared with.
        alike: what the runs must have in common.
        split: whose scores they are.

    Raises:
        InputError: as `comparison_table`.
    """
    miou, seeds = _by_method(results, alike)
    differences = _differences(miou, baseline)
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1)
        figure = Figure(figsize=(12.0 if differences else 7.5, 1.9 + 0.5 * len(miou)), layout=layout)
        panels = figure.subplots(1, 2 if differences else 1, sharey=True, squeeze=False)[0]
        _draw_panel(panels[0], miou, list(miou), seeds, sign="")
        panels[0].set(title=f"mIoU on the {split} images", xlabel="percent")
        if differences:
            panels[1].axvline(0, color="0.5", linewidth=1, zorder=0)
            _draw_panel(panels[1], differences, list(miou), seeds, sign="+")
            panels[1].set(title=f"Difference to {baseline}, same seed", xlabel="points of mIoU")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=len(labels))
        save_figure(figure, path)


def _check(methods: Sequence[str], seeds: Sequence[int], jobs: int, threads: int) -> None:
    if not methods or len(set(methods)) < len(methods) or not set(methods) <= set(METHODS):
        raise InputError(f"expected methods to be different ones of {', '.join(METHODS)}, got {list(methods)}")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise InputError(f"expected seeds to be different and not negative, got {list(seeds)}")
    for name, count in (("jobs", jobs), ("threads", threads)):
        if count < 1:
            raise InputError(f"expected {name} of at least 1, got {count}")


def _by_method(
    results: Sequence[Mapping[str, Any]], alike: Sequence[str] = ("labelled", "steps", "num_classes")
) -> tuple[dict[str, dict[int, float]], list[int]]:
    """Sort mIoU by method and seed, in the order of the runs."""
    if not results:
        raise InputError("expected at least one run to compare, got none")
    miou: dict[str, dict[int, float]] = {}
    for result in results:
        name = f"{result['method']} with seed {result['seed']}"
        for key in alike:
            if result[key] != results[0][key]:
                raise InputError(
                    f"expected runs with the same {key}, got {results[0][key]} and {result[key]}, the latter of {name}"
                )
        if list(result["iou"]) != list(results[0]["iou"]):
            raise InputError(
                f"expected runs on the same classes, got {list(results[0]['iou'])} and "
                f"{list(result['iou'])}, the latter of {name}"
            )
        if result["seed"] in miou.setdefault(result["method"], {}):
            raise InputError(f"expected different runs, got {name} twice")
        miou[result["method"]][result["seed"]] = result["miou"]
    return miou, list(dict.fromkeys(result["seed"] for result in results))


def _differences(miou: Mapping[str, Mapping[int, float]], baseline: str = _BASELINE) -> dict[str, dict[int, float]]:
    """Subtract the baseline seed by seed: what a lucky seed gives to both cancels."""
    base = miou.get(baseline, {})
    pairs = {
        method: {seed: value - base[seed] for seed, value in of.items() if seed in base}
        for method, of in miou.items()
        if method != baseline
    }
    return {method: of for method, of in pairs.items() if of}


def _class_mean(results: Sequence[Mapping[str, Any]], method: str, name: str) -> str:
    values = [result["iou"][name] for result in results if result["method"] == method]
    present = [value for value in values if value is not None]
    return percent(statistics.fmean(present) if present else None)


def _draw_panel(
    axes: Axes,
    values: Mapping[str, Mapping[int, float]],
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    sign: str,
) -> None:
    """Draw a line of marks per method, the first on top."""
    rows = {method: row for row, method in enumerate(methods)}
    for index, seed in enumerate(seeds):
        points = [(100 * of[seed], rows[method] + 0.12) for method, of in values.items() if seed in of]
        marker = "osD^vP*X"[index % 8]
        axes.plot(*zip(*points, strict=True), marker, color="#0072B2", markersize=7, alpha=0.8, label=f"seed {seed}")
    for method, of in values.items():
        mean = 100 * statistics.fmean(of.values())
        label = "mean" if method == next(iter(values)) else None
        axes.plot(
            [mean, mean],
            [rows[method] - 0.18, rows[method] + 0.32],
            color="#D55E00",
            linewidth=3,
            label=label,
        )
        axes.text(mean, rows[method] - 0.22, percent(mean / 100, sign), ha="center", va="bottom", fontsize=10)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.4, -0.75)
    axes.margins(x=0.08)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
