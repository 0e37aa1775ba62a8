"""What may befall a run that its settings are not to blame for, each told in one line."""

from collections.abc import Iterator

import torch

__all__ = ["MachineError", "told"]


class MachineError(RuntimeError):
    """The machine let a run down: one line, shown without a traceback; `--resume` goes on once it is put right."""


def told(error: BaseException) -> str | None:
    """Say in one line what the machine did; None for what may be an error of ours, whose traceback is wanted."""
    for cause in _chain(error):
        if isinstance(cause, MachineError):
            return str(cause)
        if isinstance(cause, OSError):
            return f"{cause.strerror or cause}{f': {cause.filename}' if cause.filename else ''}"
        if isinstance(cause, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(cause):
            return f"out of memory, take fewer or smaller images a step: {str(cause).splitlines()[0]}"
        if isinstance(cause, RuntimeError) and "DataLoader" in str(cause):
            return f"{' '.join(str(cause).split())} (data.workers loads images, data.timeout is how long one may take)"
        if isinstance(cause, RuntimeError) and any(word in str(cause) for word in ("gloo", "NCCL", "TCPStore")):
            return f"another rank has gone: {str(cause).splitlines()[0]}"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it arose from, the innermost of them last."""
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__ or at.__context__
