"""Writing of files that are either complete or absent."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.workbench.errors import MachineError, describe_machine_error

__all__ = ["save_figure", "write_whole"]


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, flush that file to disk, then move it to `path`.

    Raises:
        MachineError: the file could not be written; `path` keeps its old contents.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
        # Some file systems cannot flush folders.
        with contextlib.suppress(OSError):
            _flush(path.parent)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        # On a full disk torch.save raises an error about file positions; the OSError behind it has the reason.
        raise MachineError(f"{path} could not be written: {describe_machine_error(error) or error}") from error


def save_figure(figure: Any, path: Path) -> None:
    """Write a Matplotlib figure as a PNG file; its bytes depend on the figure only."""
    # By default Matplotlib writes its version into the file.
    write_whole(path, lambda to: figure.savefig(to, format="png", dpi=120, metadata={"Software": None}))


def _flush(path: Path) -> None:
    """Wait until a file's contents, or a folder's list of files, are on disk."""
    # Only POSIX systems can open folders.
    if path.is_dir() and os.name != "posix":
        return
    # Windows flushes only files that are open for writing.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
