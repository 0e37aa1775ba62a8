"""Harnesses that look for crashes: anything but a result or one of the errors that the docstrings name is one.

`test_fuzz.py` runs each for a moment with fixed draws. `python -m tests.reliability.fuzz --seconds 180 NAME` goes on
with new draws for as long as it is told.
"""

import argparse
import sys
import time
from collections.abc import Callable

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.reliability.fuzz_files import fuzz_checkpoints, fuzz_label_files
from tests.reliability.fuzz_tensors import fuzz_class_shares, fuzz_class_sums, fuzz_resize_labels

__all__ = ["TARGETS", "main"]

TARGETS: dict[str, Callable[[st.DataObject], None]] = {
    "class_sums": fuzz_class_sums,
    "resize_labels": fuzz_resize_labels,
    "class_shares": fuzz_class_shares,
    "label_files": fuzz_label_files,
    "checkpoints": fuzz_checkpoints,
}


def main(arguments: list[str]) -> int:
    """Run one harness, or each of them, with new draws until the time is up; a crash ends in its traceback."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TARGETS)}; all if none is given")
    parser.add_argument("--seconds", type=float, default=180, help="of each (default: 180)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in TARGETS]
    if unknown:
        parser.error(f"expected NAME to be one of {', '.join(TARGETS)}, got {unknown[0]}")
    how = settings(
        max_examples=200,
        deadline=None,
        database=None,
        derandomize=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    for name in options.names or TARGETS:
        tried, end = 0, time.monotonic() + options.seconds
        # New draws each time; until the time is up, and once at least.
        run = how(given(st.data())(TARGETS[name]))
        while not tried or time.monotonic() < end:
            run()
            tried += how.max_examples
        print(f"{name}: about {tried} cases in {options.seconds:g} s, no crash", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
