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
"""Row, seed, options, settings and metrics of a run."""


@dataclass(frozen=True)
class Study:
    """A study: what is run, and what it is compared with.

    Args:
        title: of the table.
        split: whose mIoU the table has. Choose settings on `validation`.
        baseline: the row that the others are compared with, seed by seed.
        seeds: of each row.
        train: options of `train` that all rows share.
        rows: a row's name to its own options.
        fewer_seeds: a row's name to how many of the seeds it has, the first ones; a row that is not named has all.
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
            raise InputError(f"expected seeds to be different numbers of at least 0, got {self.seeds}")
        for row, count in self.fewer_seeds.items():
            if row not in self.rows:
                meant = did_you_mean(row, self.rows)
                raise InputError(f"expected fewer_seeds to name rows, {', '.join(self.rows)}, got {row}{meant}")
            if not 1 <= count <= len(self.seeds):
                raise InputError(f"expected fewer_seeds.{row} from 1 to the {len(self.seeds)} seeds, got {count}")

    def seeds_of(self, row: str) -> list[int]:
        """The seeds of a row."""
        return self.seeds[: self.fewer_seeds.get(row)]

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Row and seed of every run, seed by seed: a study that is stopped has compared its rows over some seeds."""
        return [(row, seed) for seed in self.seeds for row in self.rows if seed in self.seeds_of(row)]

    def options(self, row: str) -> dict[str, Any]:
        """The options of `train` for a row, without the seed."""
        return {**self.train, **self.rows[row]}

    def scores(self, record: Record) -> dict[str, Any]:
        """`miou` and `iou` of a run, on the images that the study reports."""
        scores: dict[str, Any] = record["validation"] if self.split == "validation" else record
        return scores

    @functools.cached_property
    def settings(self) -> dict[str, Settings]:
        """The full settings of each row, with any seed."""
        found = {}
        for row in self.rows:
            try:
                found[row], _ = read_settings(as_arguments(self.options(row)))
            except InputError as error:
                raise InputError(f"row {row} of {self.title}: {error}") from error
            data = found[row].data
            if not data.uses_scenes and getattr(data, self.split) is None:
                raise InputError(
                    f"row {row} of {self.title} needs labelled images in data.{self.split} to be scored on, got none"
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
        way = "a file of settings goes with --methods and --config"
        raise InputError(f"expected {path} to be a study with {parts} ({way}): {error}") from error


def study_of_methods(methods: Sequence[str], seeds: Sequence[int], train_arguments: Sequence[str]) -> Study:
    """A study with a row for each method; its baseline is `joint`, or else the first method.

    `train_arguments` are options of `train` for all runs, as on the command line.
    """
    words = [part for word in train_arguments for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    train = dict(zip(words[::2], words[1::2]))
    if len(words) % 2 or not all(name[:2] == "--" for name in train) or {"--method", "--seed"} & train.keys():
        given = " ".join(train_arguments)
        raise InputError(f"expected options of train as --NAME VALUE, without --method and --seed, got {given}")
    options, rows = {name[2:]: value for name, value in train.items()}, {name: {"method": name} for name in methods}
    baseline = "joint" if "joint" in methods else methods[0]
    images = [Path(options[name]).stem for name in ("config", "preset") if name in options]
    return Study(": ".join([*images, ", ".join(methods)]), "test", baseline, list(seeds), options, rows)


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Options as arguments of `train`."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]


def known_settings(settings: Settings) -> dict[str, Any]:
    """The settings that a record keeps, by their dotted names: those on which the result of every seed depends."""
    return {name: value for name, value in flatten(as_plain(settings)).items() if name not in {"seed", *MAY_CHANGE}}


def read_records(study: Study, path: Path) -> list[Record]:
    """The records of a study's runs, row by row; those whose settings are no longer the study's are left out.

    A record with a setting that no longer exists is left out unless it was null. Only who removes a setting knows at
    which value a run would be the same today; such records count again once the setting is deleted from them.
    """
    records, found, changed, defaults = _load(path), [], [], known_settings(Settings())
    for row, settings in study.settings.items():
        now = known_settings(settings)
        for record in (records[row, seed] for seed in study.seeds_of(row) if (row, seed) in records):
            # A setting that the record lacks is new: the run had its present default.
            before = record["settings"]
            differing = [n for n in {**before, **now} if now.get(n) != before.get(n, defaults.get(n))]
            if differing:
                exists = is_setting(differing[0], setting_types(Settings))
                changed.append(f"{differing[0]} {'differs' if exists else 'no longer exists'}")
            else:
                found.append(record)
    if changed:
        reasons = ", ".join(sorted(set(changed)))
        print(f"{path}: {len(changed)} records are stale and left out, since {reasons}", file=sys.stderr)
    return found


def write_record(path: Path, record: Record) -> None:
    """Add a record to a file, in place of one of the same row and seed."""
    records = _load(path) | {(record["row"], record["seed"]): record}
    lines = ",\n".join(map(json.dumps, records.values()))
    write_whole(path, lambda to: to.write_text(f"[\n{lines}\n]\n", encoding="utf-8"))


def _load(path: Path) -> dict[tuple[str, int], Record]:
    try:
        records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        if not all(record.keys() >= {"row", "seed", "settings"} for record in records):
            raise ValueError("a record lacks one of them")
        return {(record["row"], record["seed"]): record for record in records}
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"expected {path} to hold records with row, seed and settings: {error}") from error
