"""A run on folders of images of several sizes, trained once for all tests here."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from examples.workbench.data_settings import Folder
from examples.workbench.training import checkpoints
from examples.workbench.training.train import train
from tests.examples.workbench.tiny import tiny

SIZES = [(40, 48), (32, 32), (75, 51), (20, 33)]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """`run` with its predictions, `images` that it was tested on, and `root` of the data."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split in ("source", "target", "validation", "test"):
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for i, size in enumerate(SIZES):
            label = np.repeat(rng.integers(0, 3, (size[0], 1)), size[1], axis=1).astype(np.uint8)
            image = (60 * label[..., None] + rng.integers(0, 40, (*size, 3))).astype(np.uint8)
            ending = "jpg" if i == 2 else "png"
            Image.fromarray(image).save(root / split / "images" / f"{i}.{ending}")
            Image.fromarray(label).save(root / split / "labels" / f"{i}.png")
    folders = {s: Folder(f"{s}/images", f"{s}/labels") for s in ("source", "target", "validation", "test")}
    settings = tiny(
        steps=12,
        labelled=4,
        method="ass-plus",
        validate_every=6,
        data={"classes": ["a", "b", "c"], "size": (32, 48), **folders},
    )
    run = tmp_path_factory.mktemp("runs") / "run"
    train(settings, run, data_root=root, save_predictions=True)
    # So that the best is not the last.
    shutil.copy(run / "checkpoints" / "step-00000006.pt", run / checkpoints.BEST)
    return SimpleNamespace(run=run, images=root / "test" / "images", root=root)
