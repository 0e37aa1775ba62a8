"""Studies: rows of settings, each run with several seeds, and the records of these runs."""

import argparse
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jsonargparse

from examples.workbench.errors import InputError
from examples.workbench.files import write_whole
from examples.workbench.options import read_settings
from examples.workbench.plain import MAY_CHANGE, as_plain, flatten
from examples.workbench.settings import Settings
from examples.workbench.spelling import did_you_mean, is_setting, setting_types

__all__ = ["STUDIES", "Record", "Study", "as_arguments", "known_settings", "read_records", "read_study"]
__all__ += ["study_of_methods", "write_record"]

STUDIES = Path(__file__).parent

Record = dict[str, Any]
"""The row, seed, options, settings and metrics of a run."""


@dataclass(frozen=True)
class Study:
    """A study: rows of settings to compare, each with several seeds.

    Args:
        title: title of the table.
        split: the images whose mIoU the table reports. Choose settings on `validation`.
        baseline: the row that the others are compared with, paired by seed.
        seeds: the seeds of each row.
        train: options of `train` that all rows share.
        rows: the own options of each row, by the row's name.
        fewer_seeds: the number of seeds of rows that have fewer, by the row's name. Such a row uses the first seeds.
    """

    title: str
    split: Literal["validation", "test"]
    baseline: str
    seeds: list[int]
    train: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    fewer_seeds: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.baseline not in self.rows:
            raise InputError(f"expected baseline to be one of the rows {', '.join(self.rows)}, got {self.baseline}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise InputError(f"expected seeds to be different integers of at least 0, got {self.seeds}")
        for row, count in self.fewer_seeds.items():
            if row not in self.rows:
                meant = did_you_mean(row, self.rows)
                raise InputError(f"expected fewer_seeds to name only rows ({', '.join(self.rows)}), got {row}{meant}")
            if not 1 <= count <= len(self.seeds):
                raise InputError(
                    f"expected fewer_seeds.{row} from 1 to {len(self.seeds)}, the number of seeds, got {count}"
                )

    def seeds_of(self, row: str) -> list[int]:
        """The seeds of a row."""
        return self.seeds[: self.fewer_seeds.get(row)]

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Row and seed of every run, seed by seed, so that a stopped study has compared its rows over some seeds."""
        return [(row, seed) for seed in self.seeds for row in self.rows if seed in self.seeds_of(row)]

    def options(self, row: str) -> dict[str, Any]:
        """The options of `train` for a row, except the seed."""
        return {**self.train, **self.rows[row]}

    def scores(self, record: Record) -> dict[str, Any]:
        """`miou` and `iou` of a run, on the split that the study reports."""
        scores: dict[str, Any] = record["validation"] if self.split == "validation" else record
        return scores

    @functools.cached_property
    def settings(self) -> dict[str, Settings]:
        """The full settings of each row; their seed has no meaning."""
        found = {}
        for row in self.rows:
            try:
                found[row], _ = read_settings(as_arguments(self.options(row)))
            except InputError as error:
                raise InputError(f"row {row} of {self.title}: {error}") from error
            data = found[row].data
            if not data.uses_scenes and getattr(data, self.split) is None:
                raise InputError(
                    f"row {row} of {self.title} needs labelled images in data.{self.split} for its score, got none"
                )
        return found


def read_study(path: Path) -> Study:
    """Read a study's YAML file."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study, None)
    try:
        return Study(**parser.parse_string(path.read_text(encoding="utf-8")).as_dict())
    except (OSError, argparse.ArgumentError, TypeError, ValueError) as error:
        parts = ", ".join(Study.__dataclass_fields__)
        way = "a file of settings is used with --methods and --config"
        raise InputError(f"expected {path} to be a study with {parts} ({way}): {error}") from error


def study_of_methods(methods: Sequence[str], seeds: Sequence[int], train_arguments: Sequence[str]) -> Study:
    """A study with a row for each method. The baseline is `joint`, or the first method if `joint` is missing.

    `train_arguments` are the options of `train` for all runs, as on the command line.
    """
    words = [part for word in train_arguments for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    train = dict(zip(words[::2], words[1::2]))
    if len(words) % 2 or not all(name[:2] == "--" for name in train) or {"--method", "--seed"} & train.keys():
        given = " ".join(train_arguments)
        raise InputError(f"expected options of train as --NAME VALUE, but not --method or --seed, got {given}")
    options, rows = {name[2:]: value for name, value in train.items()}, {name: {"method": name} for name in methods}
    baseline = "joint" if "joint" in methods else methods[0]
    images = [Path(options[name]).stem for name in ("config", "preset") if name in options]
    return Study(": ".join([*images, ", ".join(methods)]), "test", baseline, list(seeds), options, rows)


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Options as command-line arguments of `train`."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]


def known_settings(settings: Settings) -> dict[str, Any]:
    """The settings that a record keeps, by dotted name: all that change the result, except the seed."""
    return {name: value for name, value in flatten(as_plain(settings)).items() if name not in {"seed", *MAY_CHANGE}}


def read_records(study: Study, path: Path) -> list[Record]:
    """The records of a study's runs, row by row. Records with settings that differ from the study's are left out.

    A record with a setting that no longer exists is left out, unless its value is null. Only the person who removes a
    setting knows the value at which a run would be the same today. If the setting is deleted from such records, they
    count again.
    """
    records, found, changed, defaults = _load(path), [], [], known_settings(Settings())
    for row, settings in study.settings.items():
        now = known_settings(settings)
        for record in (records[row, seed] for seed in study.seeds_of(row) if (row, seed) in records):
            # A setting that is missing in the record is new: the run had the setting's current default.
            before = record["settings"]
            differing = [n for n in {**before, **now} if now.get(n) != before.get(n, defaults.get(n))]
            if differing:
                exists = is_setting(differing[0], setting_types(Settings))
                changed.append(f"{differing[0]} {'differs' if exists else 'no longer exists'}")
            else:
                found.append(record)
    if changed:
        reasons = ", ".join(sorted(set(changed)))
        print(f"{path}: {len(changed)} records are out of date and left out, since {reasons}", file=sys.stderr)
    return found


def write_record(path: Path, record: Record) -> None:
    """Add a record to a file. It replaces a record of the same row and seed."""
    records = _load(path) | {(record["row"], record["seed"]): record}
    lines = ",\n".join(map(json.dumps, records.values()))
    write_whole(path, lambda to: to.write_text(f"[\n{lines}\n]\n", encoding="utf-8"))


def _load(path: Path) -> dict[tuple[str, int], Record]:
    try:
        records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        if not all(record.keys() >= {"row", "seed", "settings"} for record in records):
            raise ValueError("one of them is missing in a record")
        return {(record["row"], record["seed"]): record for record in records}
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"expected {path} to hold records with row, seed and settings: {error}") from error
