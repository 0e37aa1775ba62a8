"""Signal handling: after a stop signal, a run finishes its step and writes a checkpoint before it stops."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import distributed

from examples.workbench.progress import on_terminal

__all__ = ["Stopped", "agree_on_signals", "defer_signals", "load_until_stopped", "stop_at_once"]

T = TypeVar("T")

_STOP = (signal.SIGTERM, signal.SIGINT)
# Windows has no SIGUSR1.
_WRITE = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()


class Stopped(KeyboardInterrupt):
    """A signal stopped the command. During training, the checkpoint is written first.

    Like Ctrl-C, no `except Exception` catches it.
    """

    def __init__(self, signum: int, left: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}{left and f': {left}'}")
        self.signum, self.status = signum, 128 + signum


@contextlib.contextmanager
def stop_at_once() -> Iterator[None]:
    """Handle signals outside of training steps: SIGTERM raises `Stopped`; SIGUSR1 is ignored, with nothing to write."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Stopped(signum)

    with contextlib.ExitStack() as handlers:
        _handle(signal.SIGTERM, stop, handlers)
        for signum in _WRITE:
            _handle(signum, signal.SIG_IGN, handlers)
        yield


@contextlib.contextmanager
def defer_signals() -> Iterator[list[int]]:
    """Collect signals in a list that is read after each step.

    The first rank answers a stop signal with a line on standard error. If the signal comes again, it stops at once.
    """
    pending: list[int] = []
    stops: set[int] = set()
    # The processes that load images inherit the handlers, but must not answer.
    answering = os.getpid() if os.environ.get("RANK", "0") == "0" else None

    def collect(signum: int, frame: FrameType | None) -> None:
        if signum in stops:
            raise Stopped(signum)
        pending.append(signum)
        if signum in _STOP:
            stops.add(signum)
            if os.getpid() == answering:
                _answer(signum)
            if hasattr(signal, "SIGCHLD"):
                # The signal may also end the loading processes; PyTorch would then raise an error within the step.
                _handle(signal.SIGCHLD, lambda *_: None, handlers)

    with contextlib.ExitStack() as handlers:
        for signum in (*_STOP, *_WRITE):
            _handle(signum, collect, handlers)
        yield pending


def load_until_stopped(batches: Iterable[T], pending: list[int]) -> Iterator[T]:
    """Yield batches until the last one, or until a stop signal has ended the processes that load them."""
    try:
        yield from batches
    except (OSError, RuntimeError):
        # The same signal may reach this process a moment later.
        time.sleep(0.2)
        if not set(pending) & set(_STOP):
            raise


def agree_on_signals(pending: list[int], device: torch.device) -> tuple[bool, int]:
    """Agree over all ranks whether to write a checkpoint after a step, and which signal stops the run, or 0.

    A signal may reach only one rank, or several ranks at different steps, so each rank must call this after each step.
    """
    read = list(pending)
    stop = next((signum for signum in read if signum in _STOP), 0)
    write = bool(read)
    if distributed.is_initialized():
        both = torch.tensor([int(write), stop], device=device)
        distributed.all_reduce(both, distributed.ReduceOp.MAX)
        write, stop = bool(both[0]), int(both[1])
    # Signals that arrived in the meantime wait until the next step.
    del pending[: len(read)]
    return write, stop


def _answer(signum: int) -> None:
    """Print on standard error that the run finishes its step first, and how to stop it at once."""
    again = "press Ctrl-C again" if signum == signal.SIGINT else f"send {signal.Signals(signum).name} again"
    # os.write rather than print: the signal may have interrupted a print, which Python cannot enter twice.
    with contextlib.suppress(OSError):
        below_the_bar = "\n" if on_terminal() else ""
        os.write(2, f"{below_the_bar}finishing this step; {again} to stop now\n".encode())


def _handle(signum: signal.Signals, handler: Any, until: contextlib.ExitStack) -> None:
    """Set the handler of a signal until the stack closes."""
    # Python allows only the main thread to set handlers.
    if threading.current_thread() is threading.main_thread():
        until.callback(signal.signal, signum, signal.signal(signum, handler))
