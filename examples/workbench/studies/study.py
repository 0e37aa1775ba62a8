"""A study: a file of rows, each some settings, run with several seeds; records that are kept, and a table of them."""

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jsonargparse
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from examples.workbench.errors import InputError
from examples.workbench.files import save_figure, write_whole
from examples.workbench.reporting.style import STYLE, class_colours
from examples.workbench.settings import METHODS
from examples.workbench.studies.compare import draw_comparison
from examples.workbench.studies.runs import Run, finished, run_all
from examples.workbench.studies.tables import duration, markdown, percent, spread, versions

__all__ = ["Study", "draw_curves", "draw_study", "read_study", "recorded", "run_study", "study_table"]


@dataclass(frozen=True)
class Study:
    """What is run, and what it is compared with.

    Args:
        title: of the table.
        split: whose mIoU is tabulated; settings are chosen on `validation`.
        baseline: the row that the others are compared with, seed by seed.
        seeds: of each row.
        train: options of `train` that every row has.
        rows: a row's name to the options that it adds; one of them is its `method`.
    """

    title: str
    split: str
    baseline: str
    seeds: list[int]
    train: dict[str, Any]
    rows: dict[str, dict[str, Any]]


def read_study(path: Path) -> Study:
    """Read a study's YAML file.

    Raises:
        InputError: the file is missing or says something else than a study.
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study, None)
    try:
        study = Study(**parser.parse_string(path.read_text(encoding="utf-8")).as_dict())
    except (OSError, UnicodeDecodeError, argparse.ArgumentError, TypeError) as error:
        parts = ", ".join(field.name for field in fields(Study))
        raise InputError(f"expected {path} to be a study of {parts}: {error}") from error
    if study.split not in ("validation", "test"):
        raise InputError(f"expected split of {path} to be validation or test, got {study.split}")
    if study.baseline not in study.rows:
        raise InputError(f"expected baseline of {path} to be one of its rows, got {study.baseline}")
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise InputError(f"expected seeds of {path} to be different numbers, got {study.seeds}")
    for name, options in study.rows.items():
        if options.get("method") not in METHODS:
            raise InputError(
                f"expected row {name} of {path} to have a method of {', '.join(METHODS)}, got {options.get('method')}"
            )
    return study


def run_study(
    study: Study, *, records: Path, out: Path, data_root: str | None, jobs: int, threads: int
) -> list[dict[str, Any]]:
    """Run what is not in the records yet, and keep the records up to date, also when it is stopped.

    Args:
        study: what is to be run.
        records: JSON file of finished runs; one counts when its options are those of the study.
        out: folder of the run folders and logs.
        data_root: where the images lie; not part of a record.
        jobs: runs at a time.
        threads: of each run.

    Returns:
        The study's records, row by row; those of other rows stay in the file.

    Raises:
        InputError: a run failed, or `out` holds other runs of the same names.
    """
    kept = _read_records(records)
    wanted = [(name, seed, {**study.train, **options}) for name, options in study.rows.items() for seed in study.seeds]
    done = {(r["row"], r["seed"]): r for r in kept}
    queue: dict[tuple[str, int], Run] = {}
    for name, seed, options in wanted:
        record = done.get((name, seed))
        if record is not None and record["options"] == options:
            continue
        queue[name, seed] = Run(str(options["method"]), seed, out, _arguments(options, data_root), name)
    try:
        run_all(
            [run for run in queue.values() if finished(run) is None],
            jobs,
            threads,
            done=len(wanted) - sum(finished(run) is None for run in queue.values()),
        )
    finally:
        for name, seed, options in wanted:
            metrics = finished(queue[name, seed]) if (name, seed) in queue else None
            if metrics is not None:
                done[name, seed] = {"row": name, "options": options, **metrics}
        lines = ",\n".join(json.dumps(record) for record in done.values())
        write_whole(records, lambda path: path.write_text(f"[\n{lines}\n]\n", encoding="utf-8"))
    return recorded(study, records=records)


def recorded(study: Study, *, records: Path) -> list[dict[str, Any]]:
    """The finished runs of a study that are on record, row by row.

    Raises:
        InputError: there are none.
    """
    done = {(r["row"], r["seed"]): r for r in _read_records(records)}
    found = [
        done[name, seed]
        for name, options in study.rows.items()
        for seed in study.seeds
        if (name, seed) in done and done[name, seed]["options"] == {**study.train, **options}
    ]
    if not found:
        raise InputError(f"expected {records} to hold runs of {study.title}, got none")
    return found


def study_table(study: Study, results: Sequence[Mapping[str, Any]]) -> str:
    """Tabulate a study in Markdown: mIoU, difference to the baseline with its standard error, IoU by class.

    Args:
        study: of the results.
        results: its records; a row may lack seeds.
    """
    scores = {name: {r["seed"]: _score(r, study.split) for r in results if r["row"] == name} for name in study.rows}
    scores = {name: of for name, of in scores.items() if of}
    base = scores.get(study.baseline, {})
    classes = list(results[0]["iou"])
    lines, by_class = [], []
    for name, of in scores.items():
        pairs = [of[seed]["miou"] - base[seed]["miou"] for seed in of if seed in base]
        error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
        difference = f"{percent(statistics.fmean(pairs), '+')} ± {percent(error)}" if pairs else "–"
        options = ", ".join(f"{key} {_plain(value)}" for key, value in study.rows[name].items() if key != "method")
        each = [percent(of[seed]["miou"] if seed in of else None) for seed in study.seeds]
        lines.append(
            [
                name,
                study.rows[name]["method"],
                options,
                spread([s["miou"] for s in of.values()]),
                "" if name == study.baseline else difference,
                *each,
            ]
        )
        held = [[s["iou"][k] for s in of.values() if s["iou"][k] is not None] for k in classes]
        by_class.append([name, *(percent(statistics.fmean(values) if values else None) for values in held)])
    seeds = [f"seed {seed}" for seed in study.seeds]
    common = " ".join(f"--{key} {_plain(value)}" for key, value in study.train.items())
    return (
        "\n\n".join(
            [
                f"## {study.title}",
                f"mIoU in percent on {study.split} images: mean ± sample standard deviation over the seeds. "
                f"Every run: `train {common}`.",
                markdown(["row", "method", "settings", "mIoU", "difference", *seeds], lines),
                "IoU of each class in percent, mean over the seeds.",
                markdown(["row", *classes], by_class),
                f"{len(results)} runs, {duration(sum(r['seconds'] for r in results))} in all. "
                f"Versions: {versions(results)}.",
            ]
        )
        + "\n"
    )


def draw_study(path: Path, study: Study, results: Sequence[Mapping[str, Any]]) -> None:
    """Draw the study: a dot a run, and the differences to the baseline."""
    scored = [{**r, "method": r["row"], **_score(r, study.split)} for r in results]
    draw_comparison(path, scored, baseline=study.baseline, alike=("num_classes",), split=study.split)


def draw_curves(path: Path, study: Study, results: Sequence[Mapping[str, Any]]) -> bool:
    """Draw mIoU on the validation images over the steps: a thin line a run, a thick one for the mean of a row's runs.

    Returns:
        Whether there was a run that has looked at them on its way (`validate_every`); else nothing is drawn.
    """
    curves = {name: [r["curve"] for r in results if r["row"] == name and r.get("curve")] for name in study.rows}
    curves = {name: of for name, of in curves.items() if of}
    if not curves:
        return False
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 5.0), layout="constrained")
        axes = figure.subplots()
        # Colours and dashes both, for eyes that tell few colours apart; without the yellow, which is lost on white.
        colours = np.delete(class_colours(len(curves) + 1), 1, axis=0) / 255
        for index, (name, of) in enumerate(curves.items()):
            colour, dashes = colours[index], ("-", "--", ":", "-.")[index % 4]
            for curve in of:
                axes.plot(*_points(curve), color=colour, linestyle=dashes, linewidth=0.8, alpha=0.5)
            mean = [[step, statistics.fmean(values)] for step, values in _by_step(of).items() if len(values) == len(of)]
            axes.plot(*_points(mean), color=colour, linestyle=dashes, linewidth=2.2, label=name)
        axes.set(title=study.title, xlabel="step", ylabel="mIoU on the validation images, percent")
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        figure.legend(loc="outside right upper")
        save_figure(figure, path)
    return True


def _points(curve: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [step for step, _ in curve], [100 * miou for _, miou in curve]


def _by_step(curves: Sequence[Sequence[tuple[int, float]]]) -> dict[int, list[float]]:
    held: dict[int, list[float]] = {}
    for curve in curves:
        for step, miou in curve:
            held.setdefault(step, []).append(miou)
    return held


def _read_records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        kept: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        complete = all(record.keys() >= {"row", "seed", "options"} for record in kept)
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"expected {path} to hold the records of a study, got a file that does not parse") from error
    if not complete:
        raise InputError(f"expected each record of {path} to have a row, a seed and options, got others")
    return kept


def _score(result: Mapping[str, Any], split: str) -> dict[str, Any]:
    held = result["validation"] if split == "validation" else result
    return {"miou": held["miou"], "iou": held["iou"]}


def _arguments(options: Mapping[str, Any], data_root: str | None) -> tuple[str, ...]:
    named = {"data-root": data_root} if data_root else {}
    chosen = {**named, **{key: value for key, value in options.items() if key != "method"}}
    return tuple(part for key, value in chosen.items() for part in (f"--{key}", _plain(value)))


def _plain(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | list) else str(value)
