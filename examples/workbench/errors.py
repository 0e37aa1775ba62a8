"""The two kinds of error that end a command with one line instead of a traceback."""

from collections.abc import Iterator

import torch

__all__ = ["InputError", "MachineError", "describe_machine_error"]


class InputError(ValueError):
    """The user gave something that cannot be used: exit status 2."""


class MachineError(RuntimeError):
    """The machine failed, such as a full disk or a lost rank: exit status 3; `--resume` continues the run."""


def describe_machine_error(error: BaseException) -> str | None:
    """One line about a failure of the machine; None for any other error, whose traceback is needed."""
    for cause in _causes(error):
        if isinstance(cause, MachineError):
            return str(cause)
        if isinstance(cause, OSError):
            return f"{cause.strerror or cause}{f': {cause.filename}' if cause.filename else ''}"
        if isinstance(cause, MemoryError | torch.OutOfMemoryError):
            return f"out of memory, use fewer or smaller images per step: {str(cause).splitlines()[0]}"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those that caused it, innermost last."""
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__ or at.__context__
