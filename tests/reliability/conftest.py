"""Tiny runs: in this process by `run`, and as processes that can be killed by `start`."""

import multiprocessing

import numpy as np
import pytest
import yaml
from PIL import Image

from examples.workbench.__main__ import main
from tests.reliability.tiny import TINY, run_command


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture
def run(config, tmp_path):
    """Train in this process; gives the exit status."""

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


@pytest.fixture
def start(config, tmp_path):
    """Start a training as a separate process, forked from a server that has already imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.reliability.tiny"])
    started = []

    def begin(*arguments, out=tmp_path / "run", log=tmp_path / "log.txt", memory=None):
        command = ["train", "--config", config, "--out", out, *arguments]
        started.append(context.Process(target=run_command, args=([str(word) for word in command], log, memory)))
        started[-1].start()
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def last_line(capsys):
    """The last line on standard error, which must explain the failure."""

    def last():
        error = capsys.readouterr().err.replace("\r", "\n")
        assert "Traceback" not in error
        return error.splitlines()[-1]

    return last
