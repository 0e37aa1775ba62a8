"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.workbench.errors import MachineError, describe_machine_error

__all__ = ["save_figure", "write_whole"]


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then move it into place.

    Raises:
        MachineError: it could not be written; `path` keeps its old contents.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
        # Not every file system flushes folders.
        with contextlib.suppress(OSError):
            _flush(path.parent)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        # On a full disk torch.save raises an error about positions, caused by the OSError that says why.
        raise MachineError(f"{path} could not be written: {describe_machine_error(error) or error}") from error


def save_figure(figure: Any, path: Path) -> None:
    """Write a Matplotlib figure as a PNG whose bytes depend on the figure alone."""
    # By default the file names the version of Matplotlib.
    write_whole(path, lambda to: figure.savefig(to, format="png", dpi=120, metadata={"Software": None}))


def _flush(path: Path) -> None:
    """Wait until a file's contents, or a folder's list of files, are on the disk."""
    # Only POSIX opens folders.
    if path.is_dir() and os.name != "posix":
        return
    # Windows flushes only what is open for writing.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
