"""Folders in every layout: the images and labels read, and the files that are refused."""

import contextlib
import shutil
import zlib
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from examples.workbench.data.folders import FolderPair
from examples.workbench.data.layouts import LAYOUTS
from examples.workbench.data_settings import Folder, LayoutName
from examples.workbench.errors import InputError
from tests.errors import refuses
from tests.examples.workbench.data import formats
from tests.examples.workbench.data.formats import (
    AACHEN,
    CLASSES,
    FOLDERS,
    GTA5,
    SYNTHIA,
    ids,
    photo,
    random_sample,
    save,
)


@pytest.fixture
def index(tmp_path):
    """Three images and their index masks."""
    for i, ending in enumerate(("png", "jpg", "JPEG")):
        sample = random_sample(seed=i)
        save(sample.image, tmp_path / "img" / f"{i}.{ending}")
        save(sample.label, tmp_path / "lbl" / f"{i}.png")
    (tmp_path / "img" / "notes.txt").touch()
    return tmp_path


@pytest.fixture
def published(tmp_path):
    return formats.write_all(tmp_path)


def pair(root, layout=None, count=3, **folders):
    if layout is not None:
        return FolderPair(root, FOLDERS[layout], classes=CLASSES[count])
    return FolderPair(root, Folder(**({"images": "img", "labels": "lbl"} | folders)), classes=["a", "b", "c"])


def test_the_settings_know_the_layouts():
    assert set(get_args(LayoutName)) == LAYOUTS.keys()


def test_reads_pairs_in_name_order(index):
    (index / "img" / "0.png").rename(index / "elsewhere.png")
    (index / "img" / "0.png").symlink_to(index / "elsewhere.png")
    save(random_sample(seed=2).label.astype(np.uint16), index / "lbl" / "2.png")
    samples = pair(index)
    assert len(samples) == 3
    assert samples.names == ["0", "1", "2"]
    assert np.array_equal(samples[0].image, random_sample(seed=0).image)
    assert np.array_equal(samples[2].label, random_sample(seed=2).label)
    assert samples[1].image.shape == (20, 30, 3)
    assert samples[1].name == "1"


def truncate(file, length):
    file.write_bytes(file.read_bytes()[:length])


def break_header(file):
    content = bytearray(file.read_bytes())
    content[8:12] = (5).to_bytes(4, "big")
    content[21:25] = zlib.crc32(content[12:21]).to_bytes(4, "big")
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: shutil.rmtree(root / "lbl"), ("{root}/lbl",)),
        (lambda root: [file.unlink() for file in (root / "img").iterdir()], ("{root}/img", ".jpg", ".jpeg", ".png")),
        (lambda root: (root / "lbl/1.png").unlink(), ("label file", "{root}/lbl", "{root}/img/1.jpg")),
        (lambda root: (root / "img/1.jpg").unlink(), ("image", "{root}/img", "{root}/lbl/1.png")),
        (lambda root: [(root / f"lbl/{i}.png").unlink() for i in (0, 2)], ("label file", "{root}/img/0.png", "1 more")),
        (lambda root: save(photo(), root / "img/1.png"), ("{root}/img/1.jpg", "1.png")),
    ],
)
def test_folders_that_are_no_pair(index, damage, words):
    damage(index)
    with refuses(InputError, *(word.format(root=index) for word in words)):
        pair(index)


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("lbl/0.png", lambda f: save(random_sample(20, 31).label, f), ("30 x 20", "31 x 20")),
        ("lbl/0.png", lambda f: save(photo(20, 30), f), ("RGB",)),
        (
            "lbl/0.png",
            lambda f: save(random_sample().label + 1, f),
            ("labels", "[0, 3)", "ignore_index 255", "got 3 ("),
        ),
        ("lbl/0.png", lambda f: save(np.full((20, 30), 300, np.uint16), f), ("labels", "[0, 3)", 300, 600)),
        ("img/0.png", lambda f: save(np.zeros((20, 30), np.uint16), f), ("8 bits", 16)),
        ("img/0.png", lambda f: formats.save_deep(np.zeros((20, 30, 3)), f), ("8 bits", 16)),
        ("img/0.png", lambda f: Image.fromarray(np.zeros((20, 30), np.float32)).save(f, "TIFF"), ("8 bits", 32)),
        # A header whose length is wrong: Pillow's decoder raises a bare ValueError.
        ("img/0.png", break_header, ("whole",)),
        ("img/0.png", lambda f: f.write_text("not an image"), ("whole",)),
    ],
)
def test_unusable_files(index, file, damage, words):
    damage(index / file)
    with refuses(InputError, index / file, *words):
        pair(index)[0]


@pytest.mark.parametrize("file", ["img/0.png", "img/1.jpg", "lbl/0.png"])
def test_a_truncated_file_is_refused_or_complete(index, file):
    file = index / file
    content, whole = file.read_bytes(), pair(index)[int(file.stem)]
    for length in range(0, len(content), max(1, len(content) // 100)):
        file.write_bytes(content[:length])
        # The last 20 bytes of a PNG hold no pixel: two checksums and the chunk that ends the file.
        if len(content) - length > 20:
            with refuses(InputError, file, "whole"):
                pair(index)[int(file.stem)]
            continue
        with contextlib.suppress(InputError):
            read = pair(index)[int(file.stem)]
            assert np.array_equal(read.image, whole.image)
            assert np.array_equal(read.label, whole.label)


@pytest.mark.parametrize("outside", ["../img", "/etc", "img/../../img"])
def test_folders_stay_below_the_root(index, outside):
    with refuses(InputError, index, outside):
        pair(index, images=outside)


def test_gta5(published):
    samples = pair(published, "gta5", 19)
    assert samples.names == ["00001", "00002", "00003", "00004"]
    assert np.array_equal(samples[0].image, photo(seed=1))
    assert np.array_equal(samples[0].label, formats.by_table(ids(34, seed=1), formats.CITYSCAPES_TO_19))
    # The last label is scaled to its image's size.
    rows, columns = ((np.arange(n) + 0.5) * m // n for n, m in ((40, 38), (64, 60)))
    scaled = ids(34, 38, 60, seed=4)[rows.astype(int)][:, columns.astype(int)]
    assert np.array_equal(samples[3].label, formats.by_table(scaled, formats.CITYSCAPES_TO_19))


@pytest.mark.parametrize("index", [0, 1], ids=["two channels", "three channels"])
def test_synthia(published, index):
    sample = pair(published, "synthia", 16)[index]
    assert sample.name == f"{index:07d}"
    assert np.array_equal(sample.label, formats.by_table(ids(22, seed=index), formats.SYNTHIA_TO_16))


def test_cityscapes(published):
    samples = pair(published, "cityscapes", 19)
    numbers = ("aachen_000000", "aachen_000002", "aachen_000004", "bochum_000001", "bochum_000003", "bochum_000005")
    assert samples.names == [f"{number}_000019" for number in numbers]
    assert np.array_equal(samples[0].label, formats.by_table(ids(33, 64, 128, seed=0), formats.CITYSCAPES_TO_19))
    # The licence plate has no class.
    save(np.full((64, 128), 255, np.uint8), published / AACHEN)
    assert (samples[0].label == 255).all()


def test_fewer_classes_are_renumbered(published):
    names = {old: CLASSES[19][new] for old, new in formats.CITYSCAPES_TO_19.items()}
    table = {old: CLASSES[13].index(name) for old, name in names.items() if name in CLASSES[13]}
    assert len(table) == 13
    expected = formats.by_table(ids(33, 64, 128, seed=2), table)
    assert np.array_equal(pair(published, "cityscapes", 13)[1].label, expected)


def train_ids(last, height, width):
    return formats.by_table(ids(last, height, width), formats.CITYSCAPES_TO_19)


@pytest.mark.parametrize(
    ("layout", "file", "damage", "words"),
    [
        ("gta5", GTA5, lambda f: save(ids(40), f), ("ids", "table")),
        ("gta5", GTA5, lambda f: formats.save_palette(train_ids(34, 40, 64), f), ("ids", "table", 255)),
        (
            "cityscapes",
            AACHEN,
            lambda f: save(ids(33, 64, 128) + np.uint8(100), f),
            ("ids", "table", "100, 101, 102, 103, 104", "29 more"),
        ),
        ("cityscapes", AACHEN, lambda f: save(train_ids(33, 64, 128), f), ("gtFine_labelIds.png", 255, "train ids")),
        ("cityscapes", AACHEN, lambda f: save(ids(33, 32, 64), f), ("128 x 64", "64 x 32")),
        ("synthia", SYNTHIA, lambda f: save(ids(22), f), ("16 bits", "mode L", "8 bits")),
        ("synthia", SYNTHIA, lambda f: save(ids(22).astype(np.uint16), f), ("several", "mode I;16", "16 bits")),
        ("synthia", SYNTHIA, lambda f: formats.save_deep(np.full((40, 64, 2), 300), f), ("ids", "table", 300, 2560)),
        ("synthia", SYNTHIA, lambda f: truncate(f, -3000), ("whole",)),
    ],
)
def test_label_files_that_are_not_of_the_layout(published, layout, file, damage, words):
    damage(published / file)
    with refuses(InputError, published / file, *words):
        pair(published, layout, 16)[0]


def test_a_class_that_the_layout_lacks(published):
    with refuses(InputError, "gta5", "road", "got unicorn"):
        FolderPair(published, FOLDERS["gta5"], classes=["road", "unicorn"])


@pytest.mark.parametrize(("layout", "image"), [("gta5", GTA5), ("synthia", SYNTHIA)])
def test_train_ids_beside_the_labels_are_passed_over(published, layout, image):
    names = pair(published, layout, 16).names
    shutil.copy(published / image, (published / image).with_name(f"{names[0]}_labelTrainIds.png"))
    assert pair(published, layout, 16).names == names


def in_one_folder(root, image_end, label_end):
    for i in range(2):
        save(photo(seed=i), root / f"img/a.rf.{i}{image_end}")
        save(ids(2, seed=i), root / f"img/a.rf.{i}{label_end}")


@pytest.mark.parametrize(
    ("image_end", "label_end"), [(".png", "_mask.png"), (".jpg", "_mask.png"), (".jpg", ".png"), (".PNG", "_L.tif")]
)
@pytest.mark.parametrize("labels", ["img", "img/"])
def test_images_and_labels_in_one_folder(tmp_path, image_end, label_end, labels):
    in_one_folder(tmp_path, image_end, label_end)
    samples = pair(tmp_path, labels=labels, label_ending=None if label_end == ".png" else label_end)
    assert samples.names == ["a.rf.0", "a.rf.1"]
    assert np.array_equal(samples[1].label, ids(2, seed=1))
    (tmp_path / f"img/a.rf.0{image_end}").unlink()
    with refuses(InputError, "image", f"{tmp_path}/img/a.rf.0{label_end}"):
        pair(tmp_path, labels=labels, label_ending=None if label_end == ".png" else label_end)


@pytest.mark.parametrize("ending", ["bmp", "tif", "TIFF", "webp"])
def test_endings_of_images(tmp_path, ending):
    save(photo(), tmp_path / f"img/a.{ending}")
    save(ids(2), tmp_path / "lbl/a.png")
    assert pair(tmp_path)[0].image.shape == (40, 64, 3)


@pytest.mark.parametrize("palette", [False, True])
def test_masks_of_colours(tmp_path, palette):
    save(photo(), tmp_path / "img/a.png")
    mask = Image.fromarray(ids(3))
    mask.putpalette([0, 0, 0, 60, 60, 60, 250, 50, 83, 1, 1, 1])
    (tmp_path / "lbl").mkdir()
    (mask if palette else mask.convert("RGB")).save(tmp_path / "lbl/a.png")
    colours = {"c": (60, 60, 60), "a": (250, 50, 83), "b": (1, 1, 1), "background": (0, 0, 0)}
    expected = np.array([255, 2, 0, 1])[ids(3)]
    assert np.array_equal(pair(tmp_path, colours=colours)[0].label, expected)
    (tmp_path / "labelmap.txt").write_text("".join(f"{n}:{r},{g},{b}::\n" for n, (r, g, b) in colours.items()))
    assert np.array_equal(pair(tmp_path, colours="labelmap.txt")[0].label, expected)
    del colours["background"]
    with refuses(InputError, tmp_path / "lbl/a.png", "[0, 0, 0]", f"{(ids(3) == 0).sum()} pixels"):
        pair(tmp_path, colours=colours)[0]


def test_names_in_two_forms_of_unicode(tmp_path):
    save(photo(), tmp_path / "img" / "Mu\u0308ll.png")
    save(ids(2), tmp_path / "lbl" / "M\u00fcll.png")
    assert pair(tmp_path)[0].name == "M\u00fcll"


@pytest.mark.parametrize("number", [-1, 2**31 - 1])
def test_numbers_of_32_bits(tmp_path, number):
    save(photo(), tmp_path / "img/a.png")
    (tmp_path / "lbl").mkdir()
    Image.fromarray(np.full((40, 64), number, np.int32)).save(tmp_path / "lbl/a.tif")
    with refuses(InputError, tmp_path / "lbl/a.tif", number, 40 * 64):
        pair(tmp_path, label_ending=".tif")[0]
