"""The two kinds of error that end a command with a one-line message instead of a traceback."""

import traceback
from collections.abc import Iterator, Sequence

import torch

__all__ = ["InputError", "MachineError", "describe_machine_error", "some"]


class InputError(ValueError):
    """Wrong input from the user: exit status 2."""


class MachineError(RuntimeError):
    """A failure of the machine, such as a full disk or a lost rank: exit status 3. `--resume` continues the run."""


def describe_machine_error(error: BaseException) -> str | None:
    """A one-line message for a failure of the machine; None for any other error, which needs its traceback."""
    for cause in _causes(error):
        text = " ".join(str(cause).splitlines()[:1])
        if isinstance(cause, MachineError):
            return text
        if isinstance(cause, OSError):
            return f"{cause.strerror or cause}{f': {cause.filename}' if cause.filename else ''}"
        if isinstance(cause, MemoryError | torch.OutOfMemoryError):
            return f"out of memory, use fewer or smaller images per step: {text}"
        # PyTorch raises a plain RuntimeError for both of these; only the module that raised it shows the kind.
        module = _raised_in(cause) if isinstance(cause, RuntimeError) else ""
        if module.startswith("torch.utils.data."):
            return (
                f"loading a batch failed: {text} (data.workers sets the number of processes, data.timeout their time "
                "limit in seconds)"
            )
        if module.startswith("torch.distributed."):
            return f"communication with another rank failed: {text}"
    return None


def some(things: Sequence[object]) -> str:
    """The first of several things, and the number of the others, for a message."""
    return f"{things[0]}{f' and {len(things) - 1} more' if len(things) > 1 else ''}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then the errors that caused it; the original error is last."""
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__ or at.__context__


def _raised_in(error: BaseException) -> str:
    """The name of the module that raised an error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")) if frames else ""
