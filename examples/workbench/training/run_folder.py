"""The run folder: settings, history, and a lock so that only one process writes to the folder."""

import contextlib
import errno
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from examples.workbench.data.samples import Samples
from examples.workbench.errors import InputError, MachineError
from examples.workbench.files import write_whole
from examples.workbench.networks.segmentation import Segmenter
from examples.workbench.plain import as_plain, check_same_run
from examples.workbench.progress import say
from examples.workbench.settings import Settings
from examples.workbench.training.checkpoints import has_checkpoint, set_aside_damaged

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["append_history", "describe_run", "lock_folder", "network_file", "prepare_folder", "read_history"]
__all__ += ["run_identity", "save_network_file"]

NETWORK = "network.json"


def run_identity(settings: Settings, images: Mapping[str, Samples | None]) -> dict[str, Any]:
    """The values that must be the same when a run resumes: its settings, and the number and names of its images."""
    names = {split: list(samples.names) for split, samples in images.items() if samples is not None}
    digests = {split: hashlib.sha256("\n".join(of).encode()).hexdigest()[:8] for split, of in names.items()}
    return as_plain(settings) | {"images": {split: f"{len(of)} ({digests[split]})" for split, of in names.items()}}


def prepare_folder(out: Path, settings: Settings, *, resume: bool) -> None:
    """Create the run folder, or check that the run in it can be resumed."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out must be a folder, got the file {out}")
    written = out / "settings.yaml"
    if not resume and (written.exists() or has_checkpoint(out)):
        raise InputError(f"--out must be a new folder, got {out}, which already holds a run; --resume continues it")
    if written.exists():
        try:
            before = yaml.safe_load(written.read_text())
        except (yaml.YAMLError, UnicodeDecodeError):
            before = None
        if isinstance(before, dict):
            check_same_run(before, as_plain(settings), written)
        elif not has_checkpoint(out):
            raise InputError(f"{written} must hold the settings of the run, but the file cannot be parsed")
        else:
            # The checkpoint also has the settings. They are compared when it is loaded.
            say(f"{written} is damaged and will be written again")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with lock_folder(out):
            for unfinished in (out / "checkpoints").glob(".*.tmp"):
                unfinished.unlink()
            set_aside_damaged(out)
    except OSError as error:
        raise InputError(f"--out must be a writable folder, got {out}: {error.strerror}") from error


def describe_run(out: Path, settings: Settings, labelled: Sequence[str]) -> None:
    """Write the settings, and the names of the labelled target images, for people to read."""
    plain, names = yaml.safe_dump(as_plain(settings), sort_keys=False), "".join(f"{name}\n" for name in labelled)
    write_whole(out / "settings.yaml", lambda path: path.write_text(plain))
    write_whole(out / "labelled.txt", lambda path: path.write_text(names))


def save_network_file(out: Path, segmenter: Segmenter) -> None:
    """Copy the network's configuration into the run folder, so that the network can be built from the folder alone."""
    text = segmenter.configuration
    if text is not None:
        write_whole(out / NETWORK, lambda path: path.write_text(text))


def network_file(out: Path) -> Path | None:
    """The file that `save_network_file` wrote; None if there is none."""
    return out / NETWORK if (out / NETWORK).exists() else None


@contextlib.contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Lock the run folder against other processes that write to it. The lock ends with the process in any case."""
    if fcntl is None:
        yield
        return
    with (out / ".lock").open("a") as file:
        try:
            # flock would not do: the processes that load images would inherit it, and may outlive this process.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems have no locks.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise MachineError(f"only one process may write to {out}, and another process holds its lock") from None
        yield


def append_history(out: Path, row: Mapping[str, float]) -> None:
    """Add a row to the history of the run."""
    with (out / "history.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_history(out: Path, *, before: int | None = None) -> list[dict[str, float]]:
    """The rows of the history. With `before`, the file is rewritten without damaged rows and rows from that step on."""
    path = out / "history.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows: list[dict[str, float]] = []
    for line in lines:
        with contextlib.suppress(ValueError, LookupError, TypeError):
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
    if before is not None:
        if len(rows) < len(lines):
            say(f"removing {len(lines) - len(rows)} damaged lines from {path}")
        rows = [row for row in rows if row["step"] < before]
        write_whole(path, lambda to: to.write_text("".join(json.dumps(row) + "\n" for row in rows)))
    return rows
