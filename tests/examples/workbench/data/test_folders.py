"""Data sets as they are distributed: small files in exactly their formats, through reading, check and training."""

import json
import re
import struct
import zlib

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from examples.workbench.__main__ import PRESETS, main
from examples.workbench.__main__ import _parse as parse
from examples.workbench.data.check import check_data
from examples.workbench.data.folders import FolderPair
from examples.workbench.errors import InputError
from examples.workbench.networks.deeplab import DeepLabV2
from examples.workbench.settings import Folder
from examples.workbench.training import checkpoints
from tests.errors import mentions, refuses

# Libraries under the trainer warn of things that are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")

CLASSES_19 = (
    "road sidewalk building wall fence pole traffic_light traffic_sign vegetation terrain sky person rider car truck "
    "bus train motorcycle bicycle"
)
CLASSES = {19: [name.replace("_", " ") for name in CLASSES_19.split()]}
CLASSES[16] = [name for name in CLASSES[19] if name not in ("terrain", "truck", "train")]
CLASSES[13] = [name for name in CLASSES[16] if name not in ("wall", "fence", "pole")]

# What other code bases remap by, index by index: Cityscapes' trainIds, and SYNTHIA's 16 classes.
CITYSCAPES_TO_19 = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
CITYSCAPES_TO_19 |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
SYNTHIA_TO_16 = {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 1: 9, 10: 10, 17: 11, 8: 12, 19: 13, 12: 14}
SYNTHIA_TO_16 |= {11: 15}


def ids(last, height=40, width=64, seed=0):
    """Every id up to the last, in no order."""
    label = np.random.default_rng(seed).integers(0, last + 1, (height, width))
    label.ravel()[: last + 1] = np.arange(last + 1)
    return label.astype(np.uint8)


def photo(height=40, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def save(array, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    image.save(file)


def save_palette(label, file):
    """As GTA5's: an index a pixel, and a table of colours."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label, "P") if label.ndim == 2 else label
    image.putpalette(np.random.default_rng(1).integers(0, 256, 768).astype(np.uint8).tobytes())
    image.save(file)


def save_deep(channels, file):
    """A PNG of 16 bits with two channels (grey and alpha) or three, as SYNTHIA's, which Pillow cannot write."""
    height, width, count = channels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in channels)
    header = struct.pack(">2I5B", width, height, 16, {2: 4, 3: 2}[count], 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def gta5(root, count=4):
    for i in range(1, count + 1):
        save(photo(seed=i), root / f"gta5/images/{i:05d}.png")
        # The last label has another size than its image, as a few of GTA5 have.
        size = (40, 64) if i < count else (38, 60)
        save_palette(ids(34, *size, seed=i), root / f"gta5/labels/{i:05d}.png")


def synthia(root, count=4):
    for i in range(count):
        save(photo(seed=i), root / f"RAND_CITYSCAPES/RGB/{i:07d}.png")
        instances = np.random.default_rng(i).integers(0, 60_000, (40, 64, 1 + i % 2))
        label = np.concatenate([ids(22, seed=i)[..., None], instances], axis=2)
        save_deep(label, root / f"RAND_CITYSCAPES/GT/LABELS/{i:07d}.png")


def cityscapes(root, splits=(("train", 6), ("val", 2))):
    for split, count in splits:
        for i in range(count):
            city = ("aachen", "bochum")[i % 2]
            name = f"{city}/{city}_{i:06d}_000019"
            save(photo(64, 128, seed=i), root / f"cityscapes/leftImg8bit/{split}/{name}_leftImg8bit.png")
            below = root / f"cityscapes/gtFine/{split}"
            save(ids(33, 64, 128, seed=i), below / f"{name}_gtFine_labelIds.png")
            save(photo(64, 128), below / f"{name}_gtFine_color.png")
            save(ids(33, 64, 128).astype(np.uint16), below / f"{name}_gtFine_instanceIds.png")
            (below / f"{name}_gtFine_polygons.json").write_text("{}")


FOLDERS = {
    "gta5": Folder("gta5/images", "gta5/labels", "gta5"),
    "synthia": Folder("RAND_CITYSCAPES/RGB", "RAND_CITYSCAPES/GT/LABELS", "synthia"),
    "cityscapes": Folder("cityscapes/leftImg8bit/train", "cityscapes/gtFine/train", "cityscapes"),
}


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "data"
    gta5(root)
    synthia(root)
    cityscapes(root)
    return root


def pair(root, layout, classes=19):
    return FolderPair(root, FOLDERS[layout], classes=CLASSES[classes])


def by_table(label, table):
    return np.array([table.get(i, 255) for i in range(256)], np.uint8)[label]


def test_gta5(root):
    samples = pair(root, "gta5")
    assert samples.names == ["00001", "00002", "00003", "00004"]
    assert np.array_equal(samples[0].image, photo(seed=1))
    assert np.array_equal(samples[0].label, by_table(ids(34, seed=1), CITYSCAPES_TO_19))


def test_a_label_of_gta5_of_another_size_is_brought_to_its_images(root):
    label = ids(34, 38, 60, seed=4)
    rows, columns = ((np.arange(n) + 0.5) * m // n for n, m in ((40, 38), (64, 60)))
    expected = label[rows.astype(int)][:, columns.astype(int)]
    assert np.array_equal(pair(root, "gta5")[3].label, by_table(expected, CITYSCAPES_TO_19))


@pytest.mark.parametrize("index", [0, 1], ids=["two channels", "three channels"])
def test_synthia(root, index):
    sample = pair(root, "synthia", 16)[index]
    assert sample.name == f"{index:07d}"
    assert np.array_equal(sample.label, by_table(ids(22, seed=index), SYNTHIA_TO_16))


def test_cityscapes(root):
    samples = pair(root, "cityscapes")
    numbers = ("aachen_000000", "aachen_000002", "aachen_000004", "bochum_000001", "bochum_000003", "bochum_000005")
    assert samples.names == [f"{number}_000019" for number in numbers]
    assert np.array_equal(samples[0].label, by_table(ids(33, 64, 128, seed=0), CITYSCAPES_TO_19))


@pytest.mark.parametrize("count", [16, 13])
def test_fewer_classes_are_numbered_anew(root, count):
    table = {
        old: CLASSES[count].index(CLASSES[19][new])
        for old, new in CITYSCAPES_TO_19.items()
        if CLASSES[19][new] in CLASSES[count]
    }
    assert len(table) == count
    assert np.array_equal(pair(root, "cityscapes", count)[1].label, by_table(ids(33, 64, 128, seed=2), table))
    assert np.array_equal(pair(root, "gta5", count)[1].label, by_table(ids(34, seed=2), table))


def test_the_licence_plate_has_no_class(root):
    label = np.full((64, 128), 255, np.uint8)
    save(label, root / "cityscapes/gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png")
    assert (pair(root, "cityscapes")[0].label == 255).all()


GTA5, SYNTHIA = "gta5/labels/00001.png", "RAND_CITYSCAPES/GT/LABELS/0000000.png"
AACHEN = "cityscapes/gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"


@pytest.mark.parametrize(
    ("layout", "damage", "words"),
    [
        ("gta5", lambda r: save(ids(40), r / GTA5), (GTA5, "ids", "table")),
        (
            "gta5",
            lambda r: save(photo(), r / GTA5),
            (GTA5, "RGB"),
        ),
        (
            "cityscapes",
            lambda r: save(ids(33, 64, 128) + np.uint8(100), r / AACHEN),
            (AACHEN, "ids", "table", "100, 101, 102, 103, 104", "29 more"),
        ),
        (
            "cityscapes",
            lambda r: save(by_table(ids(33, 64, 128), CITYSCAPES_TO_19), r / AACHEN),
            (AACHEN, "gtFine_labelIds.png", 255, "train ids"),
        ),
        (
            "gta5",
            lambda r: save_palette(by_table(ids(34), CITYSCAPES_TO_19), r / GTA5),
            (GTA5, "ids", "table", 255),
        ),
        (
            "cityscapes",
            lambda r: save(ids(33, 32, 64), r / AACHEN),
            (AACHEN, "128 x 64", "64 x 32"),
        ),
        (
            "synthia",
            lambda r: save(ids(22), r / SYNTHIA),
            (SYNTHIA, "16 bits", "L of 8"),
        ),
        (
            "synthia",
            lambda r: save(photo(), r / SYNTHIA),
            (SYNTHIA, "16 bits", "RGB of 8"),
        ),
        (
            "synthia",
            lambda r: save(ids(22).astype(np.uint16), r / SYNTHIA),
            (SYNTHIA, "several channels", "I;16 of 16"),
        ),
        (
            "synthia",
            lambda r: save_deep(np.full((40, 64, 2), 300), r / SYNTHIA),
            (SYNTHIA, "ids", "table", 300, 2560),
        ),
        (
            "synthia",
            lambda r: (r / SYNTHIA).write_bytes((r / SYNTHIA).read_bytes()[:-3000]),
            (SYNTHIA, "whole"),
        ),
    ],
)
def test_label_files_that_are_not_of_the_layout(root, layout, damage, words):
    damage(root)
    file, *words = words
    with refuses(InputError, root / file, *words):
        pair(root, layout, 16)[0]


@pytest.mark.parametrize(
    ("folder", "files", "words"),
    [
        (
            Folder("cityscapes/leftImg8bit", "cityscapes/gtFine", "cityscapes"),
            ("cityscapes/leftImg8bit",),
            ("_leftImg8bit.png",),
        ),
        (Folder("gta5/images", "gta5/labels", "cityscapes"), ("gta5/images",), ("_leftImg8bit.png",)),
        (
            Folder("cityscapes/leftImg8bit/train", "cityscapes/gtFine/val", "cityscapes"),
            ("cityscapes/gtFine/val", "cityscapes/leftImg8bit/train/aachen/aachen_000002_000019_leftImg8bit.png"),
            ("mask", "3 more"),
        ),
        (
            Folder("gta5/images", "RAND_CITYSCAPES/GT/LABELS", "gta5"),
            ("RAND_CITYSCAPES/GT/LABELS", "gta5/images/00001.png"),
            ("mask", "3 more"),
        ),
        (Folder("images", "labels", "gta5"), ("images",), ()),
    ],
)
def test_folders_that_are_not_of_the_layout(root, folder, files, words):
    with refuses(InputError, *(root / file for file in files), *words):
        FolderPair(root, folder, classes=CLASSES[19])


def test_a_class_that_the_layout_lacks(root):
    with refuses(InputError, "gta5", "road", "got unicorn"):
        FolderPair(root, FOLDERS["gta5"], classes=["road", "unicorn"])


def test_preset_classes():
    for preset, count in (("gta5-cityscapes", 19), ("synthia-cityscapes", 16)):
        settings, _ = parse("train", ["--preset", preset, "--network.init", "w.pth"])
        assert settings.data.classes == CLASSES[count]
    assert settings.data.subsets == {"13": CLASSES[13]}


def test_every_number_of_the_presets_says_whose_it_is():
    for preset in ("gta5-cityscapes", "synthia-cityscapes"):
        lines = (PRESETS / f"{preset}.yaml").read_text().splitlines()
        method = lines[next(i for i, line in enumerate(lines) if line.startswith("network:")) :]
        numbers = [line for line in method if re.search(r":\s+\S", line)]
        assert len(numbers) > 20
        assert all("# published" in line or "# ours" in line for line in numbers), numbers


SMALL = ["--data.size", "[64,128]", "--data.source_size", "[40,64]", "--network.depth", "50", "--data.workers", "0"]


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    state = DeepLabV2(2, depth=50).state_dict()
    file = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save({n: t * 0.5 if n.endswith("bn3.weight") else t for n, t in state.items() if "layer5" not in n}, file)
    return file


def arguments(preset, root, out, init, *more):
    shared = ["--preset", preset, "--data-root", str(root), "--labelled", "2", "--init", str(init), "--out", str(out)]
    return ["train", *shared, *SMALL, "--steps", "2", "--save_every", "1", "--log_every", "1", *more]


@pytest.mark.parametrize(
    ("preset", "method"),
    [
        ("gta5-cityscapes", "ass"),
        pytest.param("synthia-cityscapes", "ass", marks=pytest.mark.slow),
        pytest.param("gta5-cityscapes", "ass-plus", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_two_steps_evaluation_and_resume(root, init, tmp_path, capsys, monkeypatch, preset, method):
    out = tmp_path / "run"
    how = ["--method", method, *(["--self_training.start", "0"] if method == "ass-plus" else [])]
    save = checkpoints.save_checkpoint

    def stop(*arguments, **options):
        save(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_checkpoint", stop)
    assert main(arguments(preset, root, out, init, *how)) == 130
    monkeypatch.undo()
    assert main(arguments(preset, root, out, init, *how, "--resume", "--save-predictions")) == 0
    captured = capsys.readouterr()
    assert "memory of a step, estimated: " in captured.err
    assert "tensors loaded as torchvision weights" in captured.err
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["resumed_from"] == [1]
    assert metrics["validation"] == {"miou": metrics["miou"], "iou": metrics["iou"]}
    names = pair(root, "cityscapes").names
    drawn = np.random.RandomState(0).permutation(6)[:2]
    assert (out / "labelled.txt").read_text().split() == [names[i] for i in drawn]
    # At the labels' size.
    with Image.open(out / "predictions" / "aachen_000000_000019.png") as mask:
        assert mask.size == (128, 64)
    rates = torch.load(checkpoints.newest_checkpoint(out), weights_only=True)["stateful"]
    assert rates["optimiser"]["param_groups"][0]["lr"] == pytest.approx(2.5e-4 * (1 - 1 / 250_000) ** 0.9)
    assert rates["global alignment optimiser"]["param_groups"][0]["lr"] == pytest.approx(
        1e-4 * (1 - 1 / 250_000) ** 0.9
    )
    if preset == "synthia-cityscapes":
        of_13 = [metrics["iou"][name] for name in CLASSES[13] if metrics["iou"][name] is not None]
        assert metrics["subsets"] == {"13": pytest.approx(sum(of_13) / len(of_13))}
        last = ["mean", "over", "13", f"{100 * metrics['subsets']['13']:.1f}"]
        assert captured.out.splitlines()[-2].split() == last
        for more in ([], ["--subset", "13"]):
            assert main(["evaluate", "--out", str(out), "--data-root", str(root), *more]) == 0
            table = capsys.readouterr().out
            assert table.splitlines()[-1].split() == last
            assert ("wall" in table) == ("mean over all classes" in table) == (not more)


def test_more_labelled_than_there_are(root, init, tmp_path, capsys):
    assert main([*arguments("gta5-cityscapes", root, tmp_path / "run", init), "--labelled", "7"]) == 2
    mentions(capsys.readouterr().err, "error", "labelled", 6, 7)
    assert not (tmp_path / "run").exists()


def test_a_data_root_of_another_set(root, init, tmp_path, capsys):
    assert main(arguments("gta5-cityscapes", root / "cityscapes", tmp_path / "run", init)) == 2
    mentions(capsys.readouterr().err, "error", f"{root}/cityscapes/gta5/images")


def check_of(preset, root, *more):
    small = ["--network.depth", "50", "--data.size", "[64,128]", "--data.source_size", "[40,64]"]
    return main(["train", "--preset", preset, "--data-root", str(root), *small, "--check", *more])


def test_check(root, capsys):
    assert check_of("gta5-cityscapes", root, "--labelled", "2") == 0
    report = capsys.readouterr().out
    assert "memory of a step, estimated: " in report
    assert "source: 4 images (as distributed: 24966), 4 with whole ends, 4 of them read" in report
    assert "  sizes: 64 x 40 (4); labels of another size, to be scaled: 1" in report
    assert "target: 6 images (as distributed: 500 or 2975), 6 with whole ends, 6 of them read" in report
    assert "test: the validation images" in report
    notes = [line for line in report.splitlines() if line.startswith("note: ")]
    assert notes[0] == "note: source has 4 images, not as distributed: is the copy complete?"
    assert [note.split()[1] for note in notes] == ["source", "target", "validation"]
    shares = {line.split("  ")[0]: line.split()[-3:] for line in report.splitlines() if re.match(r"[a-z ]+ \d", line)}
    label = np.concatenate([pair(root, "cityscapes")[i].label.ravel() for i in range(6)])
    assert float(shares["road"][1]) == pytest.approx(100 * (label == 0).mean(), abs=6e-4)
    assert float(shares["without a class"][1]) == pytest.approx(100 * (label == 255).mean(), abs=6e-4)


def test_check_names_every_file_that_is_unfit(root, capsys):
    save(photo(), root / GTA5)
    (root / AACHEN).write_bytes(b"")
    cut = root / "cityscapes/leftImg8bit/val/bochum/bochum_000001_000019_leftImg8bit.png"
    cut.write_bytes(cut.read_bytes()[:1000])
    assert check_of("gta5-cityscapes", root, "--labelled", "2") == 2
    errors = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("error")]
    expected = [(root / GTA5, "RGB"), (root / AACHEN, "empty"), (cut, 1000), ("3 unfit",)]
    assert len(errors) == len(expected)
    for error, words in zip(errors, expected):
        mentions(error, *words)


def test_check_notes_classes_without_a_pixel(root, capsys):
    for i in range(1, 5):
        save_palette(np.full((40, 64), 7, np.uint8), root / f"gta5/labels/{i:05d}.png")
    assert check_of("gta5-cityscapes", root, "--labelled", "2", "--data.classes", "[road,sky,car]") == 0
    assert "note: source has no pixel of sky, car in the 4 images that were read" in capsys.readouterr().out


def test_check_looks_at_the_weights_too(root, init, tmp_path, capsys):
    assert check_of("gta5-cityscapes", root, "--labelled", "2", "--init", str(init)) == 0
    assert f"{init}: 318 tensors loaded as torchvision weights (RGB, stride in the 3x3)" in capsys.readouterr().out
    other = tmp_path / "other.pth"
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, other)
    assert check_of("gta5-cityscapes", root, "--labelled", "2", "--init", str(other)) == 2
    mentions(capsys.readouterr().err, "error", other, "depth 50", "no bn1.weight", "263 more")


def test_check_ends_in_time(root):
    settings, _ = parse("train", ["--preset", "gta5-cityscapes", "--network.init", "w.pth", "--labelled", "2"])
    report = check_data(settings, root, seconds=0.0)
    # Subset of each split are read in any case.
    assert all(int(n) > 0 for n in re.findall(r"(\d+) of them read", report.text))
    assert report.problems == []


def test_check_looks_at_the_built_in_scenes_too(tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    scenes = {"source": 3, "target": 3, "validation": 2, "test": 2}
    config.write_text(yaml.safe_dump({"labelled": 2, "data": {"size": [32, 32], "scenes": scenes}}))
    assert main(["train", "--config", str(config), "--check"]) == 0
    assert "source: 3 images, 3 of them read" in capsys.readouterr().out
