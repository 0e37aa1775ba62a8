"""Progress on standard error: bars in a terminal, plain lines elsewhere."""

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

__all__ = ["bar", "on_terminal", "say", "time_left"]


def on_terminal() -> bool:
    """Whether standard error is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def bar(items: Iterable[Any] | None = None, *, disable: bool = False, **options: Any) -> Any:
    """A tqdm progress bar, which prints nothing if there is no terminal; `options` go to tqdm."""
    return tqdm(items, disable=disable or not on_terminal(), dynamic_ncols=True, **options)


def say(line: str) -> None:
    """Print a line on standard error, above the bars."""
    # The line and its newline are one write, so that a signal handler's message cannot come in between.
    tqdm.write(f"{line}\n", file=sys.stderr, end="")


def time_left(seconds: float) -> str:
    """A duration in words, such as `4.1 min left`.

    >>> time_left(247)
    '4.1 min left'
    """
    if seconds < 60:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.1f} min left" if seconds < 3600 else f"{seconds / 3600:.1f} h left"
