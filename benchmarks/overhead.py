"""Overhead of health figures and checkpoints in a run: `python benchmarks/overhead.py [--check] [--json FILE]`.

The trainer runs in pairs on the built-in scenes: one run with both, one without. The processor time of the whole run is
measured, including evaluation. Wall-clock time would also depend on other jobs of the machine.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from timing import head, table

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.workbench.data_settings import Data, SceneSettings
from examples.workbench.settings import Settings
from examples.workbench.training import checkpoints
from examples.workbench.training.train import train

NEVER = 10**9


@contextlib.contextmanager
def without_checkpoints() -> Iterator[None]:
    """Prevent all checkpoints; the trainer would always write one at the last step."""
    save = checkpoints.save_checkpoint
    checkpoints.save_checkpoint = lambda *_: None
    try:
        yield
    finally:
        checkpoints.save_checkpoint = save


def seconds_of(settings: Settings, *, overhead: bool) -> float:
    """Processor time of a run, over all its threads."""
    how = {} if overhead else {"log_every": NEVER, "save_every": NEVER}
    with (
        tempfile.TemporaryDirectory() as out,
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.nullcontext() if overhead else without_checkpoints(),
    ):
        began = time.process_time()
        train(dataclasses.replace(settings, **how), Path(out) / "run")
        return time.process_time() - began


def main() -> None:
    """Print the table; with --check, fail if both together add more than 3 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs=2, type=int, default=list(Data.size), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--steps", type=int, default=500, help="steps of each run (default: 500)")
    parser.add_argument("--log-every", type=int, default=Settings.log_every, help="steps between two rows of the log")
    parser.add_argument("--save-every", type=int, default=500, help="steps between two checkpoints (default: 500)")
    parser.add_argument("--pairs", type=int, default=5, help="number of pairs of runs (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--check", action="store_true", help="exit with 1 if both add more than 3 %%")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = head("cpu")
    print(where, flush=True)
    scenes = SceneSettings(source=50, target=50, validation=1, test=1)
    settings = Settings(
        steps=args.steps,
        log_every=args.log_every,
        save_every=args.save_every,
        data=Data(size=(args.size[0], args.size[1]), scenes=scenes),
    )
    # The first run of a process also loads everything that is loaded only once, so it is not measured.
    seconds_of(dataclasses.replace(settings, steps=2), overhead=True)
    pairs = []
    for i in range(args.pairs):
        # The two runs take turns to go first, since a machine's speed changes from minute to minute.
        order = (False, True) if i % 2 else (True, False)
        taken = {overhead: seconds_of(settings, overhead=overhead) for overhead in order}
        pairs.append((taken[False], taken[True], 100 * (taken[True] / taken[False] - 1)))
        print(
            f"pair {i + 1}: without {taken[False]:.1f} s, with {taken[True]:.1f} s, {pairs[-1][2]:+.2f} %", flush=True
        )
    without, whole, more = (statistics.median(column) for column in zip(*pairs))
    low, high = min(pair[2] for pair in pairs), max(pair[2] for pair in pairs)
    print(f"\n{settings.method}, {args.steps} steps at {args.size[0]} x {args.size[1]}\n")
    columns = ["a row every", "a checkpoint every", "without, s", "with, s", "more", "lowest pair", "highest pair"]
    row = [str(args.log_every), str(args.save_every), f"{without:.1f}", f"{whole:.1f}", f"{more:+.2f} %"]
    print(table(columns, [[*row, f"{low:+.2f} %", f"{high:+.2f} %"]]))
    if args.json:
        args.json.write_text(json.dumps({"head": where, "more_percent": more, "pairs": pairs}, indent=1))
    if args.check and more > 3:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
