"""Runs of the trainer in processes of their own, some at a time, and how to know those that are done."""

import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from examples.workbench.errors import InputError

__all__ = ["Run", "finished", "run_all"]

# What starts a run; tests put a program of their own here.
_TRAIN = [sys.executable, "-m", "examples.workbench", "train"]
_KEYS = {
    "method",
    "labelled",
    "seed",
    "steps",
    "num_classes",
    "miou",
    "iou",
    "resumed_from",
    "seconds",
    "versions",
}


class Run(NamedTuple):
    """One training to be run."""

    method: str
    seed: int
    out: Path
    train_arguments: tuple[str, ...]
    row: str = ""
    """What tells it from other runs of its method."""

    @property
    def folder(self) -> Path:
        return self.out / f"{self.row or self.method}-seed{self.seed}"

    @property
    def log(self) -> Path:
        return self.out / f"{self.row or self.method}-seed{self.seed}.log"

    @property
    def options(self) -> list[str]:
        return [
            "--method",
            self.method,
            "--seed",
            str(self.seed),
            "--out",
            str(self.folder),
            *self.train_arguments,
        ]

    @property
    def heading(self) -> str:
        """First line of the log, by which a later comparison knows the run as one of its own."""
        return "train " + shlex.join(["--method", self.method, "--seed", str(self.seed), *self.train_arguments])


def finished(run: Run) -> dict[str, Any] | None:
    """Read what a finished run has written; None where there is no run, or half of one."""
    if run.folder.exists() and run.log.exists():
        with run.log.open(encoding="utf-8", errors="replace") as log:
            heading = log.readline().rstrip("\n")
        if heading != run.heading:
            raise InputError(f"expected {run.folder} to be a run of `{run.heading}`, {run.log} has `{heading}`")
    try:
        metrics = json.loads((run.folder / "metrics.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if not isinstance(metrics, dict) or not metrics.keys() >= _KEYS:
        return None
    # Also for a run that was started by hand, and so has no log of ours.
    expected = {"method": run.method, "seed": str(run.seed)}
    expected |= {name: value for name in ("labelled", "steps") if (value := _option(run.train_arguments, name))}
    for name, value in expected.items():
        if str(metrics[name]) != value:
            raise InputError(f"expected {run.folder} to be a run with {name} {value}, got {metrics[name]}")
    return metrics


def run_all(due: Sequence[Run], jobs: int, threads: int, *, done: int) -> None:
    """Run trainings, each with a log of its own; the first that fails ends the others too.

    Args:
        due: the runs; one whose folder exists is resumed.
        jobs: runs at a time.
        threads: of each run.
        done: finished runs that the progress bar counts.

    Raises:
        InputError: a run ended with a status other than 0.
    """
    waiting = deque(due)
    running: dict[Run, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
    with tqdm(total=len(due) + done, initial=done, desc="compare", unit="run") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.popleft()
                    running[run] = _start(run, threads)
                time.sleep(0.05)
                for run, (process, log) in list(running.items()):
                    if process.poll() is None:
                        continue
                    log.close()
                    del running[run]
                    if process.returncode != 0:
                        raise InputError(f"expected each run to end with status 0, {_last_words(run, process)}")
                    bar.update()
        finally:
            # The others keep their last checkpoint, and the next comparison goes on from it.
            for process, log in running.values():
                process.terminate()
                process.wait()
                log.close()


def _option(arguments: Sequence[str], name: str) -> str | None:
    """Find the value of `--NAME value` or `--NAME=value`, the last one given."""
    found = None
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        if argument == f"--{name}":
            found = following
        elif argument.startswith(f"--{name}="):
            found = argument.partition("=")[2]
    return found


def _start(run: Run, threads: int) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    run.out.mkdir(parents=True, exist_ok=True)
    resume = run.folder.exists()
    if not (resume and run.log.exists()):
        run.log.write_text(run.heading + "\n", encoding="utf-8")
    log = run.log.open("ab")
    process = subprocess.Popen(
        [*_TRAIN, *run.options, *(["--resume"] if resume else [])],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    return process, log


def _last_words(run: Run, process: subprocess.Popen[bytes]) -> str:
    lines = [line for line in run.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"{run.folder.name} ended with {process.returncode} (`{lines[-1].strip()}`); see {run.log}"
