"""A run folder: settings, history, checkpoints and metrics, each written whole or not at all."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from torch import Tensor

from examples.ass.data import InputError
from examples.ass.settings import Settings, as_plain

__all__ = [
    "BEFORE",
    "LAST",
    "Stateful",
    "append_history",
    "load_checkpoint",
    "load_weights",
    "prepare",
    "read_history",
    "save_before",
    "save_checkpoint",
    "write_metrics",
    "write_whole",
]

LAST = Path("checkpoints/last.pt")
BEFORE = Path("checkpoints/before.pt")


class Stateful(Protocol):
    """What a checkpoint saves: modules and optimisers."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def prepare(out: Path, settings: Settings, *, labelled: Sequence[str], resume: bool) -> None:
    """Make the run folder, or make sure that it is one to go on with.

    Raises:
        InputError: the folder holds a run and `resume` is not given, or a run with other settings.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"expected --out to be a folder, got the file {out}")
    written = out / "settings.yaml"
    if written.exists() or (out / LAST).exists():
        if not resume:
            raise InputError(f"expected --out to be a new folder, or --resume, got {out}, which holds a run")
        if written.exists():
            _refuse_other_settings(written, settings)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(written, lambda path: path.write_text(yaml.safe_dump(as_plain(settings), sort_keys=False)))
        write_whole(out / "labelled.txt", lambda path: path.write_text("".join(f"{name}\n" for name in labelled)))
    except OSError as error:
        raise InputError(f"expected --out to be a folder that can be written, got {out}: {error.strerror}") from error


def _refuse_other_settings(written: Path, settings: Settings) -> None:
    try:
        before = _flat(yaml.safe_load(written.read_text()))
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise InputError(f"expected {written} to hold the run's settings, got a file that does not parse") from error
    now = _flat(as_plain(settings))
    for name in [*now, *before]:
        if before.get(name) != now.get(name):
            raise InputError(
                f"expected --resume with the settings of the run, got {name} {now.get(name)} where {written} has "
                f"{before.get(name)}"
            )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def save_checkpoint(
    out: Path,
    step: int,
    stateful: Mapping[str, Stateful],
    pixels: Mapping[str, Tensor],
    *,
    settings: Settings,
    resumed_from: Sequence[int],
) -> None:
    """Save all that a run needs to go on at `step`; loads with `weights_only=True`."""
    state = {
        "step": step,
        "resumed_from": list(resumed_from),
        "settings": as_plain(settings),
        "pixels": dict(pixels),
        "stateful": {name: part.state_dict() for name, part in stateful.items()},
    }
    write_whole(out / LAST, lambda path: torch.save(state, path))


def load_checkpoint(out: Path, stateful: Mapping[str, Stateful], pixels: Mapping[str, Tensor]) -> tuple[int, list[int]]:
    """Load the last checkpoint, if there is one.

    Returns:
        The step to go on with, and the steps at which the run has been resumed, this one included.
    """
    if not (out / LAST).exists():
        return 0, []
    state = _read(out / LAST)
    for name, part in stateful.items():
        part.load_state_dict(state["stateful"][name])
    for name, counts in pixels.items():
        counts.copy_(state["pixels"][name])
    return state["step"], [*state["resumed_from"], state["step"]]


def save_before(out: Path, segmenter: Stateful) -> None:
    """Save the segmenter as it stands before any adversary reaches it, for the report."""
    state = {"stateful": {"segmenter": segmenter.state_dict()}}
    write_whole(out / BEFORE, lambda path: torch.save(state, path))


def load_weights(path: Path, *, teacher: bool = False) -> dict[str, Tensor]:
    """The segmenter's weights in a checkpoint, or their running mean, the teacher's.

    Raises:
        InputError: the file is missing or damaged.
    """
    stateful = _read(path)["stateful"]
    if not teacher:
        weights: dict[str, Tensor] = stateful["segmenter"]
        return weights
    return {name.removeprefix("module."): value for name, value in stateful["teacher"].items() if name != "n_averaged"}


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"expected a checkpoint, got no file {path}")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types for a damaged file
        raise InputError(f"expected {path} to be a whole checkpoint, got a file that does not load") from error
    return state


def append_history(out: Path, row: Mapping[str, float]) -> None:
    """Add a row to the run's history."""
    with (out / "history.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_history(out: Path, *, before: int | None = None) -> list[dict[str, float]]:
    """The rows of the history; with `before`, those of later steps are dropped from the file too."""
    path = out / "history.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows: list[dict[str, float]] = [json.loads(line) for line in lines if line.endswith("}")]
    if before is not None:
        rows = [row for row in rows if row["step"] < before]
        write_whole(path, lambda to: to.write_text("".join(json.dumps(row) + "\n" for row in rows)))
    return rows


def write_metrics(out: Path, metrics: Mapping[str, Any]) -> None:
    """Write `metrics.json`, the last thing that a run does."""
    write_whole(out / "metrics.json", lambda path: path.write_text(json.dumps(metrics, indent=2) + "\n"))
