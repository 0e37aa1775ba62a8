"""Tiny runs: in this process by `run`, and as processes that can be killed by `start`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from examples.workbench.__main__ import main
from tests.reliability.tiny import TINY


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture
def run(config, tmp_path):
    """Train in this process, into `tmp_path/run` unless told otherwise; gives the exit status."""

    def train(*arguments, out=tmp_path / "run"):
        return main(["train", "--config", str(config), "--out", str(out), *map(str, arguments)])

    return train


@pytest.fixture
def folders(tmp_path):
    """Arguments for a run on folders of small images, below `tmp_path/data`."""
    rng = np.random.default_rng(0)
    splits = ("source", "target", "validation", "test")
    for split in splits:
        for kind in ("images", "labels"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for i in range(3):
            label = rng.integers(0, 3, (40, 48)).astype(np.uint8)
            Image.fromarray(label).save(tmp_path / "data" / split / "labels" / f"{i}.png")
            Image.fromarray(np.stack([80 * label] * 3, -1)).save(tmp_path / "data" / split / "images" / f"{i}.png")
    data = {split: {"images": f"{split}/images", "labels": f"{split}/labels"} for split in splits}
    settings = TINY | {"data": data | {"classes": ["a", "b", "c"], "size": [32, 32]}}
    (tmp_path / "folders.yaml").write_text(yaml.safe_dump(settings))
    return ["--config", str(tmp_path / "folders.yaml"), "--data-root", str(tmp_path / "data")]


class Process:
    """A run in a process of its own."""

    def __init__(self, server, arguments, log, memory):
        self.server, self.log, self.ended = server, log, False
        self.pid = self._ask({"arguments": list(map(str, arguments)), "log": str(log), "memory": memory})

    def kill(self, signum=signal.SIGKILL):
        os.kill(self.pid, signum)

    def wait(self):
        """Its exit status; negative for a signal that it died of."""
        self.until(lambda: Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z", 600)
        status = self._ask({"wait": self.pid})
        self.ended = True
        return status

    def until(self, what, seconds=120):
        """Wait until `what()` is true."""
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, f"waited {seconds} s in vain; {self.log}: {self.log.read_text()}"
            time.sleep(0.002)

    def _ask(self, order):
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())


@pytest.fixture(scope="session")
def server():
    program = [sys.executable, str(Path(__file__).parent / "fork_server.py")]
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def start(server, config, tmp_path):
    """Start a training in a process of its own, into `tmp_path/run` unless told otherwise."""
    started = []

    def begin(*arguments, out=tmp_path / "run", log=tmp_path / "log.txt", memory=None):
        command = ["train", "--config", config, "--out", out, *arguments]
        started.append(Process(server, command, log, memory))
        return started[-1]

    yield begin
    for process in started:
        if not process.ended:
            process.kill()
            process.wait()
