"""Signals: a run finishes its step and writes a checkpoint before it obeys."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

import torch
from torch import distributed

__all__ = ["Stopped", "agree_on_signals", "defer_signals", "load_until_stopped", "stop_at_once"]

_STOPS = (signal.SIGTERM, signal.SIGINT)
# Where there is no such signal, none comes.
_WRITE = getattr(signal, "SIGUSR1", None)


T = TypeVar("T")


class Stopped(KeyboardInterrupt):
    """A signal ended the command; what it had to write is written. No `except Exception` takes it for an error."""

    def __init__(self, signum: int, message: str = "the last checkpoint is kept, --resume goes on from it") -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}: {message}")
        self.status = 128 + signum


@contextlib.contextmanager
def stop_at_once() -> Iterator[None]:
    """Where there is nothing to finish first: SIGTERM raises `Stopped`, and SIGUSR1, with nothing to write, no more."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Stopped(signum)

    with _handling({signal.SIGTERM: stop} | ({_WRITE: signal.SIG_IGN} if _WRITE else {})):
        yield


@contextlib.contextmanager
def defer_signals() -> Iterator[list[int]]:
    """Signals are kept in a list for a loop to look at after each step; one to stop that comes twice stops at once."""
    heard: list[int] = []
    muted: list[object] = []

    def hear(signum: int, frame: FrameType | None) -> None:
        if signum in _STOPS and signum in heard:
            raise Stopped(signum)
        heard.append(signum)
        if signum in _STOPS and hasattr(signal, "SIGCHLD") and not muted:
            # Sent to all processes of a job, it ends those that load images too: that must not break off the step.
            muted.append(signal.signal(signal.SIGCHLD, signal.SIG_DFL))

    with _handling(dict.fromkeys((*_STOPS, *((_WRITE,) if _WRITE else ())), hear)):
        try:
            yield heard
        finally:
            for handler in muted:
                signal.signal(signal.SIGCHLD, handler)  # type: ignore[arg-type]


def load_until_stopped(batches: Iterable[T], heard: list[int]) -> Iterator[T]:
    """Batches until there are no more, or until the signal to stop has ended those that load them too."""
    try:
        yield from batches
    except (OSError, RuntimeError):
        # The signal that has ended them may not have reached this process yet.
        time.sleep(0.2)
        if not set(heard) & set(_STOPS):
            raise


def agree_on_signals(heard: list[int], device: torch.device) -> tuple[bool, int]:
    """What all ranks do after a step: whether to write a checkpoint, and the signal by which to stop, or 0.

    A signal may reach ranks at different steps, or one of them only: each rank has to call this after each step.
    """
    seen = list(heard)
    stop = next((signum for signum in seen if signum in _STOPS), 0)
    write = bool(seen)
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        both = torch.tensor([int(write), stop], device=device)
        distributed.all_reduce(both, distributed.ReduceOp.MAX)
        write, stop = bool(both[0]), int(both[1])
    # What has come meanwhile is for the next step.
    del heard[: len(seen)]
    return write, stop


@contextlib.contextmanager
def _handling(handlers: dict[signal.Signals, object]) -> Iterator[None]:
    # Python lets no other thread than the main one set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
