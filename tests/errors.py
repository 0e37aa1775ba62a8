"""Checks of an error message: its type, that it is one line, and its names and values, but not its wording.

Wording must be cheap to improve, so no test repeats a whole message.
"""

import contextlib
import re

import pytest


def mentions(message, *fragments):
    """Assert that a message is one line and holds each fragment, not as a part of a longer name or number.

    Fragments may be values: `-1`, `[2, 3]`, `torch.int64`.

    >>> mentions("expected steps to be at least 1, got -2", "steps", -2)
    >>> mentions("expected steps to be at least 1, got -2", "step")
    Traceback (most recent call last):
    AssertionError: 'step' is missing from: expected steps to be at least 1, got -2
    >>> mentions("expected source_weight [2], got [12.5]", 12)
    Traceback (most recent call last):
    AssertionError: '12' is missing from: expected source_weight [2], got [12.5]
    """
    message = str(message)
    if len(message.splitlines()) != 1:
        raise AssertionError(f"expected one line, got {message!r}")
    for fragment in map(str, fragments):
        # A number is not the end of another one; a name may be one of a module or an object.
        before = r"(?<![\w.-])" if re.match(r"\d", fragment) else r"(?<![\w-])" if re.match(r"\w", fragment) else ""
        after = r"(?!\w|\.\d)" if re.search(r"\w$", fragment) else ""
        if not re.search(before + re.escape(fragment) + after, message):
            raise AssertionError(f"{fragment!r} is missing from: {message}")


@contextlib.contextmanager
def refuses(error, *fragments):
    """Assert that a block raises an error of this type whose message `mentions` the fragments.

    >>> with refuses(ValueError, "steps", -2):
    ...     raise ValueError("expected steps to be at least 1, got -2")
    """
    with pytest.raises(error) as caught:
        yield
    mentions(caught.value, *fragments)
