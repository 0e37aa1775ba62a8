"""A run that takes seconds, and what it has come to."""

import contextlib
import os
import signal
import time
from pathlib import Path

import torch

from examples.workbench.training import checkpoints, run_folder as runs

TINY = {
    "labelled": 2,
    "steps": 6,
    "log_every": 1,
    "save_every": 2,
    "data": {"size": [32, 32], "scenes": {"source": 6, "target": 6, "validation": 2, "test": 2}},
    "network": {"width": 8},
    "optimiser": {"images": 2, "unlabelled": 2},
    "global_alignment": {"base_channels": 4},
    "semantic_alignment": {"hidden_channels": [8]},
}


def steps(out):
    """How many steps the history tells of."""
    path = out / "history.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def rows(out):
    """The history, but for what differs between two runs of the same settings."""
    return [{n: v for n, v in row.items() if not n.startswith("machine/")} for row in run_folder.read_history(out)]


def state(out):
    """The newest checkpoint of a run."""
    return torch.load(checkpoints.newest_checkpoint(out), weights_only=True)


def equal(a, b):
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_run(a, b):
    """Have two runs come to the same, to the bit?"""
    return all(equal(state(a)[part], state(b)[part]) for part in ("step", "best", "pixels", "stateful"))


def kill_the_second_rank(agent, signum, out, after=10):
    """Send a signal to the process of rank 1 that a torchrun has started, after so many steps."""
    end = time.monotonic() + 300
    while steps(out) < after:
        assert agent.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    second = [pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(int(second[0]), signum)


def end_all(agent):
    """End what is left of a process that was started in a session of its own, and of its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(agent.pid, signal.SIGKILL)
