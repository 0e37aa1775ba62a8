"""The presets, on small files in the formats of their data sets."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from examples.workbench.__main__ import main
from examples.workbench.networks.deeplab import DeepLabV2
from examples.workbench.options import PRESETS, read_settings
from examples.workbench.training import checkpoints
from tests.errors import mentions
from tests.examples.workbench.data import formats
from tests.examples.workbench.data.formats import CLASSES

# Libraries warn of things that we cannot change.
pytestmark = pytest.mark.filterwarnings("default")

SMALL = ["--data.size", "[64,128]", "--data.source_size", "[40,64]", "--network.depth", "50", "--data.workers", "0"]


@pytest.fixture
def root(tmp_path):
    return formats.write_all(tmp_path / "data")


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    state = DeepLabV2(2, depth=50).state_dict()
    file = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save({n: t * 0.5 if n.endswith("bn3.weight") else t for n, t in state.items() if "layer5" not in n}, file)
    return file


def arguments(preset, root, *more):
    return ["train", "--preset", preset, "--data-root", str(root), "--labelled", "2", *SMALL, *more]


@pytest.mark.parametrize(("preset", "count"), [("gta5-cityscapes", 19), ("synthia-cityscapes", 16)])
def test_published_presets(preset, count):
    settings, _ = read_settings(["--preset", preset])
    assert settings.data.classes == CLASSES[count]
    assert settings.data.subsets == ({"13": CLASSES[13]} if count == 16 else {})
    # Every number of the method says where it is from.
    method = (PRESETS / f"{preset}.yaml").read_text().partition("\nnetwork:")[2]
    numbers = [line for line in method.splitlines() if re.search(r":\s+\S", line)]
    assert len(numbers) > 20
    assert all("# published" in line or "# ours" in line for line in numbers), numbers


@pytest.mark.parametrize(
    ("preset", "method"),
    [("gta5-cityscapes", "ass"), ("synthia-cityscapes", "ass"), ("gta5-cityscapes", "ass-plus")],
)
@pytest.mark.slow
def test_two_steps_evaluation_and_resume(root, init, tmp_path, capsys, monkeypatch, preset, method):
    out = tmp_path / "run"
    more = ["--init", str(init), "--out", str(out), "--steps", "2", "--save_every", "1", "--method", method]
    command = arguments(preset, root, *more, *(["--self_training.start", "0"] if method == "ass-plus" else []))
    save = checkpoints.save_checkpoint

    def stop(*arguments, **options):
        save(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_checkpoint", stop)
    assert main(command) == 130
    monkeypatch.undo()
    assert main([*command, "--resume", "--save-predictions"]) == 0
    captured = capsys.readouterr()
    assert "tensors loaded as torchvision weights" in captured.err
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["resumed_from"] == [1]
    assert metrics["validation"] == {name: metrics[name] for name in ("miou", "iou", "unlabelled")}
    names = [f"{city}_{i:06d}_000019" for city, first in (("aachen", 0), ("bochum", 1)) for i in range(first, 6, 2)]
    drawn = np.random.RandomState(0).permutation(6)[:2]
    assert (out / "labelled.txt").read_text().split() == [names[i] for i in drawn]
    # At the labels' size.
    with Image.open(out / "predictions" / "aachen_000000_000019.png") as mask:
        assert mask.size == (128, 64)
    state = torch.load(checkpoints.newest_checkpoint(out), weights_only=True)["stateful"]
    for optimiser, rate in (("segmenter optimiser", 2.5e-4), ("global optimiser", 1e-4)):
        assert state[optimiser]["param_groups"][0]["lr"] == pytest.approx(rate * (1 - 1 / 250_000) ** 0.9)
    if preset == "synthia-cityscapes":
        of_13 = [metrics["iou"][name] for name in CLASSES[13] if metrics["iou"][name] is not None]
        assert metrics["subsets"] == {"13": pytest.approx(sum(of_13) / len(of_13))}
        for subset in ([], ["--subset", "13"]):
            assert main(["evaluate", "--out", str(out), "--data-root", str(root), *subset]) == 0
            table = capsys.readouterr().out
            mentions(table.splitlines()[-1], "13", f"{100 * metrics['subsets']['13']:.1f}")
            assert ("wall" in table) == (not subset)


def test_check(root, init, tmp_path, capsys):
    """A check reports on images and weights, and names what cannot be used."""
    assert main(arguments("gta5-cityscapes", root, "--check", "--init", str(init))) == 0
    report = capsys.readouterr().out
    mentions(report.splitlines()[0], init, 318, "torchvision")
    assert sum(line.startswith("note: ") for line in report.splitlines()) == 3
    (root / formats.AACHEN).write_bytes(b"")
    assert main(arguments("gta5-cityscapes", root, "--check")) == 2
    errors = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("error")]
    mentions(errors[0], root / formats.AACHEN)
    assert len(errors) == 2
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "other.pth")
    assert main(arguments("gta5-cityscapes", root, "--check", "--init", str(tmp_path / "other.pth"))) == 2
    mentions(capsys.readouterr().err.splitlines()[-1], "error", tmp_path / "other.pth", "depth 50", "263 more")


def test_a_refused_run_leaves_no_folder(root, init, tmp_path, capsys):
    out = tmp_path / "run"
    shared = ["--out", str(out), "--init", str(init)]
    assert main([*arguments("gta5-cityscapes", root, *shared), "--labelled", "7"]) == 2
    mentions(capsys.readouterr().err, "error", "labelled", 6, 7)
    assert main(arguments("gta5-cityscapes", root / "cityscapes", *shared)) == 2
    mentions(capsys.readouterr().err, "error", root / "cityscapes/gta5/images")
    assert not out.exists()


@pytest.mark.parametrize("preset", ["kitti-camvid", "camvid-kitti", "idd-camvid", "airsim-camvid"])
def test_presets_on_real_images_start_from_trained_weights(preset):
    """They differ in their folders and classes only: nothing is chosen on the pairs that are reported."""
    settings, _ = read_settings(["--preset", preset])
    chosen, _ = read_settings(["--preset", "camvid-kitti"])
    assert (settings.network.name, settings.network.pretrained, settings.labelled) == ("efficientnet-lite0", True, 10)
    assert dataclasses.replace(settings, data=chosen.data) == chosen
    assert (settings.data.augmentation, settings.data.size) == (chosen.data.augmentation, chosen.data.size)
    source, target = preset.split("-")
    data = settings.data
    assert data.source.images.split("/")[0].split("_")[0] == source
    assert {data.target.images, data.validation.images, data.test.images} == {
        f"{target}/{split}/img" for split in ("train", "val", "test")
    }
    assert len(data.classes) == (11 if "kitti" in preset else 7)
    assert data.crop_endings == (["_c", "_l", "_r"] if target == "kitti" else [])
