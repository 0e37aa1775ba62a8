"""The check of a run's images before the run."""

import dataclasses
import re

import numpy as np
import pytest
from PIL import Image

from examples.workbench.data.check import check_data
from examples.workbench.data.folders import FolderPair
from examples.workbench.data.samples import labelled_subset
from examples.workbench.data_settings import Data, Folder, SceneSettings
from examples.workbench.settings import Settings
from tests.errors import mentions
from tests.examples.workbench.data import formats
from tests.examples.workbench.data.formats import FOLDERS, save

SETTINGS = Settings(data=formats.DATA, labelled=2)


@pytest.fixture
def root(tmp_path):
    return formats.write_all(tmp_path)


def test_counts_sizes_and_frequencies(root):
    text, notes, problems = check_data(SETTINGS, root)
    counts = "source: 4 images (as distributed: 24966), 4 with a label file, 4 with complete file ends, 4 of them read"
    assert counts in text
    assert "sizes: 64 x 40 (4); 1 labels of a different size, resized" in text
    assert "target: 6 images (as distributed: 500 or 2975), 6 with a label file, 6 with complete file ends" in text
    assert "labelled: 2 images, 2 of them read" in text
    assert "test: the validation images" in text
    assert [(note.split()[0], "complete" in note) for note in notes] == [
        (split, True) for split in ("source", "target", "validation")
    ]
    assert problems == []
    shares = {line.split("  ")[0]: line.split()[-3:] for line in text.splitlines() if re.match(r"[a-z ]+ \d", line)}
    samples = FolderPair(root, FOLDERS["cityscapes"], classes=formats.CLASSES[19])
    label = np.concatenate([samples[i].label.ravel() for i in labelled_subset(6, 2)])
    assert float(shares["road"][1]) == pytest.approx(100 * (label == 0).mean(), abs=6e-4)
    assert float(shares["without a class"][1]) == pytest.approx(100 * (label == 255).mean(), abs=6e-4)


def test_every_unusable_file_is_named(root):
    save(formats.photo(), root / formats.GTA5)
    (root / formats.AACHEN).write_bytes(b"")
    cut = root / "cityscapes/leftImg8bit/val/bochum/bochum_000001_000019_leftImg8bit.png"
    cut.write_bytes(cut.read_bytes()[:1000])
    problems = check_data(SETTINGS, root).problems
    expected = [(root / formats.GTA5, "RGB"), (root / formats.AACHEN, "empty"), (cut, "truncated")]
    assert len(problems) == len(expected)
    for problem, words in zip(problems, expected):
        mentions(problem, *words)


def test_only_a_file_that_cannot_be_read_is_a_problem(tmp_path):
    """Whatever its name and its end: training reads the same files."""
    data = Data(
        classes=["a", "b"], **{split: Folder("img", "lbl") for split in ("source", "target", "validation", "test")}
    )
    for name in ("jpeg", "more", "whole"):
        save(formats.photo(), tmp_path / f"img/{name}.png")
        save(formats.ids(1), tmp_path / f"lbl/{name}.png")
    Image.fromarray(formats.photo()).save(tmp_path / "img/jpeg.png", "JPEG")
    for folder in ("img", "lbl"):
        with (tmp_path / folder / "more.png").open("ab") as file:
            file.write(b"added by a camera" * 3)
    report = check_data(Settings(data=data, labelled=2), tmp_path)
    assert report.problems == []
    assert "source: 3 images, 3 with a label file, 2 with complete file ends, 3 of them read" in report.text
    (tmp_path / "img/jpeg.png").write_bytes((tmp_path / "img/jpeg.png").read_bytes()[:-300])
    # However short the time, suspects are read first.
    for i in range(80):
        save(formats.photo(), tmp_path / f"img/{i}.png")
        save(formats.ids(1), tmp_path / f"lbl/{i}.png")
    report = check_data(Settings(data=data, labelled=2), tmp_path, seconds=0.0)
    assert "83 of them read" not in report.text
    assert report.problems
    for problem in report.problems:
        mentions(problem, tmp_path / "img/jpeg.png", "truncated")


def test_a_mask_on_its_side_is_not_scaled(tmp_path):
    """Only GTA5's labels are; a mask's orientation is applied before its size is compared."""
    data = Data(classes=["a", "b"], **{s: Folder("img", "lbl") for s in ("source", "target", "validation", "test")})
    save(formats.photo(), tmp_path / "img/a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "lbl").mkdir()
    Image.fromarray(np.ascontiguousarray(np.rot90(formats.ids(1)))).save(tmp_path / "lbl/a.png", exif=exif)
    report = check_data(Settings(data=data, labelled=1), tmp_path)
    assert report.problems == []
    assert "scaled" not in report.text


def test_classes_without_a_pixel_are_noted(root):
    for i in range(1, 5):
        formats.save_palette(np.full((40, 64), 7, np.uint8), root / f"gta5/labels/{i:05d}.png")
    data = dataclasses.replace(formats.DATA, classes=["road", "sky", "car"])
    notes = check_data(dataclasses.replace(SETTINGS, data=data), root).notes
    assert any(note.startswith("source") and "sky, car in the 4 images" in note for note in notes)


def test_some_images_are_read_however_short_the_time(root):
    report = check_data(SETTINGS, root, seconds=0.0)
    read = re.findall(r"(\d+) of them read", report.text)
    assert len(read) == 4
    assert all(int(n) > 0 for n in read)
    assert report.problems == []


def test_scenes():
    data = Data(size=(32, 32), scenes=SceneSettings(source=3, target=3, validation=2, test=2))
    text = check_data(Settings(labelled=2, data=data), None).text
    assert "source: 3 images, 3 of them read" in text
    assert "test: 2 images, 2 of them read" in text


def test_a_file_of_two_splits_is_one_problem(root):
    for file in (root / "cityscapes/gtFine/train").glob("*/*_gtFine_labelIds.png"):
        save(formats.photo(64, 128), file)
    problems = check_data(SETTINGS, root).problems
    assert len(problems) == len(set(problems)) == 6


def test_both_counts_of_a_partly_labelled_target(tmp_path):
    """And a labelled image whose mask is empty is refused, as `train` refuses it."""
    image, label = formats.photo(8, 8), np.zeros((8, 8), np.uint8)
    for name in "abcd":
        save(image, tmp_path / f"img/{name}.jpg")
    save(label, tmp_path / "lbl/a.png")
    save(label + 255, tmp_path / "lbl/b.png")
    folder = Folder("img", "lbl")
    settings = Settings(method="labelled-only", data=Data(classes=["x", "y"], target=folder))
    text, notes, problems = check_data(settings, tmp_path)
    assert "labelled: 2 images" in text
    assert "target: 4 images, 2 with a label file" in text
    assert "test: none" in text
    (problem,) = problems
    mentions(problem, "labelled image b", "none")
    (note,) = notes
    mentions(note, "labelled", "y", "colours")
