"""A run that takes seconds: its settings, its files, and processes that train it."""

import contextlib
import os
import resource
import signal
import sys
import time
from pathlib import Path

from examples.workbench.__main__ import main
from examples.workbench.training import run_folder
from tests.examples.workbench.tiny import checkpoint, equal

TINY = {
    "labelled": 2,
    "steps": 6,
    "log_every": 1,
    "save_every": 2,
    "data": {"size": [32, 32], "scenes": {"source": 6, "target": 6, "validation": 2, "test": 2}},
    "network": {"width": 8},
    "optimiser": {"batch_size": 2, "unlabelled_batch_size": 2},
    "global_alignment": {"base_channels": 4},
    "semantic_alignment": {"hidden_channels": [8]},
}


def steps(out):
    """Number of rows in the history."""
    path = out / "history.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kept(out):
    return sorted((out / "checkpoints").glob("step-*.pt"))


def same_run(a, b):
    """Whether two runs ended bit-identically."""
    return all(equal(checkpoint(a)[part], checkpoint(b)[part]) for part in ("step", "best", "stateful"))


def at_step(patch, step, act):
    """Call `act` in the middle of a step, once its row is written."""
    append = run_folder.append_history

    def append_and_act(out, row):
        append(out, row)
        if row["step"] == step:
            act()

    patch.setattr(run_folder, "append_history", append_and_act)


def run_command(arguments, log, memory):
    """Run the command line in a separate process that prints to a file, with this many bytes of memory left."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # A separate process group, so that a signal can be sent to all its processes.
    os.setpgid(0, 0)
    if memory is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
    sys.exit(main(arguments))


def wait_until(true, process, seconds=120):
    """Wait for a condition while a process runs."""
    end = time.monotonic() + seconds
    while not true():
        assert process.is_alive() if hasattr(process, "is_alive") else process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.002)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_second_rank(agent, signum, out, after=10):
    """Send a signal to the process of rank 1 that torchrun has started, after this many steps."""
    wait_until(lambda: steps(out) >= after, agent, seconds=300)
    second = [pid for pid in children(agent.pid) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(second[0], signum)


def kill_group(agent):
    """Kill the remaining processes of a session: a process that was started in it, and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(agent.pid, signal.SIGKILL)
