"""A run folder: settings, history and metrics beside the checkpoints, and one process at a time that writes it."""

import contextlib
import errno
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from examples.workbench.data.images import Images
from examples.workbench.errors import InputError, MachineError
from examples.workbench.files import write_whole
from examples.workbench.settings import Settings, as_plain
from examples.workbench.training.checkpoints import check_same_run, has_checkpoint, set_aside_damaged

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "append_history",
    "describe_run",
    "run_identity",
    "lock_folder",
    "prepare_folder",
    "read_history",
    "write_metrics",
]


def run_identity(settings: Settings, images: Images) -> dict[str, Any]:
    """What a checkpoint knows its run by: the settings, and which images there are."""
    names = {split: list(samples.names) for split, samples in images._asdict().items()}
    digests = {split: hashlib.sha256("\n".join(of).encode()).hexdigest()[:8] for split, of in names.items()}
    return as_plain(settings) | {"images": {split: f"{len(of)} ({digests[split]})" for split, of in names.items()}}


def prepare_folder(out: Path, settings: Settings, *, resume: bool) -> None:
    """Make the run folder, or make sure that it is one to go on with.

    Raises:
        InputError: the folder holds a run and `resume` is not given, a run with other settings, or cannot be written.
        MachineError: another process writes to it, or the disk is full.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"expected --out to be a folder, got the file {out}")
    written = out / "settings.yaml"
    if written.exists() or has_checkpoint(out):
        if not resume:
            raise InputError(f"expected --out to be a new folder, or --resume, got {out}, which holds a run")
        if written.exists():
            _refuse_other_settings(out, settings)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with lock_folder(out):
            for left_over in (out / "checkpoints").glob(".*.tmp"):
                left_over.unlink()
            set_aside_damaged(out)
    except OSError as error:
        raise InputError(f"expected --out to be a folder that can be written, got {out}: {error.strerror}") from error


def describe_run(out: Path, settings: Settings, labelled: Sequence[str]) -> None:
    """Write for people what the run is, once nothing speaks against it."""
    write_whole(
        out / "settings.yaml", lambda path: path.write_text(yaml.safe_dump(as_plain(settings), sort_keys=False))
    )
    write_whole(out / "labelled.txt", lambda path: path.write_text("".join(f"{name}\n" for name in labelled)))


@contextlib.contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Be the one process that writes to the run folder; the system takes the lock back however the process ends.

    Raises:
        MachineError: another process is.
    """
    if fcntl is None:
        yield
        return
    with (out / ".lock").open("a") as file:
        try:
            # Not flock, whose lock the processes that load images would share and outlive us with.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Subset network file systems have no locks.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise MachineError(
                    f"expected one process to write to {out}, got a second while the first runs"
                ) from None
        yield


def _refuse_other_settings(out: Path, settings: Settings) -> None:
    written = out / "settings.yaml"
    try:
        before = yaml.safe_load(written.read_text())
        if not isinstance(before, dict):
            raise yaml.YAMLError("no mapping")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        if has_checkpoint(out):
            # The checkpoint has them too, and is asked when it is loaded.
            tqdm.write(f"{written} is damaged, and written anew", file=sys.stderr)
            return
        raise InputError(f"expected {written} to hold the run's settings, got a file that does not parse") from error
    check_same_run(before, as_plain(settings), written)


def append_history(out: Path, row: Mapping[str, float]) -> None:
    """Add a row to the run's history."""
    with (out / "history.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_history(out: Path, *, before: int | None = None) -> list[dict[str, float]]:
    """The rows of the history; with `before`, those of later steps are dropped from the file too, and damaged ones."""
    path = out / "history.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = [row for line in lines if (row := _row(line)) is not None]
    if before is not None:
        if len(rows) < len(lines):
            tqdm.write(f"{path} has {len(lines) - len(rows)} damaged lines, which are left out", file=sys.stderr)
        rows = [row for row in rows if row["step"] < before]
        write_whole(path, lambda to: to.write_text("".join(json.dumps(row) + "\n" for row in rows)))
    return rows


def _row(line: bytes) -> dict[str, float] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def write_metrics(out: Path, metrics: Mapping[str, Any]) -> None:
    """Write `metrics.json`, the last thing that a run does."""
    write_whole(out / "metrics.json", lambda path: path.write_text(json.dumps(metrics, indent=2) + "\n"))
