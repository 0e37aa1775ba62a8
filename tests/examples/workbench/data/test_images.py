"""The images of a run, from folders and from the built-in scenes."""

import dataclasses
import unicodedata

import numpy as np
import pytest

from examples.scenes import CLASSES
from examples.workbench.data.images import open_images
from examples.workbench.data_settings import Data, Folder, SceneSettings
from examples.workbench.errors import InputError
from examples.workbench.settings import Settings
from tests.errors import refuses
from tests.examples.workbench.data import formats

SCENES = Data(size=(32, 48), scenes=SceneSettings(source=5, target=4, validation=3, test=2))


def test_scenes():
    images = open_images(Settings(data=SCENES, seed=3), None)
    assert [len(samples) for samples in images] == [5, 4, 4, 3, 2]
    assert images.target[0].image.shape == (32, 48, 3)
    assert len({samples[0].image.tobytes() for samples in images._replace(labelled=images.source)}) == 4
    assert set(images.labelled.names) == set(images.target.names)


def test_folders(tmp_path):
    images = open_images(Settings(data=formats.DATA), formats.write_all(tmp_path))
    assert [len(samples) for samples in images] == [4, 6, 6, 2, 2]
    assert images.target.names[0] == "aachen_000000_000019"


@pytest.mark.parametrize(
    ("data", "labelled", "words"),
    [
        (SCENES, 5, ("labelled", 4, 5)),
        (dataclasses.replace(SCENES, classes=["a", "b"]), 2, ("data.classes", list(CLASSES), ["a", "b"])),
        (formats.DATA, 7, ("labelled", 6, 7)),
        (dataclasses.replace(formats.DATA, source=None), 2, ("method ass", "data.source")),
        (dataclasses.replace(formats.DATA, target=None), 2, ("method ass", "data.target")),
        (dataclasses.replace(formats.DATA, classes=["road", "unicorn"]), 2, ("unicorn",)),
    ],
)
def test_images_that_do_not_fit_the_settings(tmp_path, data, labelled, words):
    root = formats.write_all(tmp_path)
    with refuses(InputError, *words):
        open_images(Settings(data=data, labelled=labelled), root)


def test_the_data_root_is_needed_and_named(tmp_path):
    with refuses(InputError, "--data-root", "none"):
        open_images(Settings(data=formats.DATA), None)
    with refuses(InputError, tmp_path / "gta5/images"):
        open_images(Settings(data=formats.DATA), tmp_path)


LABELLED = ("b", "d", "Müll")  # composed


@pytest.fixture
def own(tmp_path):
    """Source images, five target images of which three have a mask, and two labelled images in separate folders."""
    image, label = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)
    for folder, images, labels in (("s", "x", "x"), ("t", "abcd", "bd"), ("few", "ef", "ef")):
        for name in images:
            formats.save(image, tmp_path / folder / "img" / f"{name}.jpg")
        for name in labels:
            formats.save(label, tmp_path / folder / "lbl" / f"{name}.png")
    for kind, array in (("img", image), ("lbl", label)):
        formats.save(array, tmp_path / "t" / kind / f"{unicodedata.normalize('NFC', 'Müll')}.png")
    return tmp_path


def folder(name):
    return Folder(f"{name}/img", f"{name}/lbl")


def open_own(root, asked=None, method="ass", **folders):
    data = Data(**{"classes": ["a", "b"], "source": folder("s"), "target": folder("t"), **folders})
    return open_images(Settings(method=method, labelled=asked, data=data), root)


def test_images_with_a_mask_are_labelled_and_all_are_target_images(own):
    images = open_own(own)
    assert sorted(images.target.names) == sorted([*"abcd", "Müll"])
    assert sorted(images.labelled.names) == sorted(LABELLED)
    labels = {name: set(images.target[i].label.flat) for i, name in enumerate(images.target.names)}
    assert labels == {"a": {255}, "c": {255}, "b": {0}, "d": {0}, "Müll": {0}}
    assert (images.validation, images.test) == (None, None)


def test_a_number_draws_nested_subsets_of_those_with_a_mask(own):
    chosen = [list(open_own(own, n).labelled.names) for n in (1, 2, 3)]
    assert chosen[0] == chosen[1][:1]
    assert chosen[1] == chosen[2][:2]
    assert sorted(chosen[2]) == sorted(LABELLED)
    with refuses(InputError, "labelled", 3, 4):
        open_own(own, 4)
    assert sorted(open_own(own, 1, "oracle").labelled.names) == sorted(LABELLED)


@pytest.mark.parametrize("absolute", [True, False])
def test_a_file_of_names(own, absolute):
    """With or without the endings, in any order and Unicode form, with a byte order mark and empty lines."""
    names = own / "names.txt"
    names.write_text(f"\ufeffb\r\n\n  {unicodedata.normalize('NFD', 'Müll')}.png\n", encoding="utf-8")
    images = open_own(own, str(names) if absolute else "names.txt")
    assert list(images.labelled.names) == sorted(["b", "Müll"], key=images.target.names.index)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("b\nnowhere.jpg\n", ("nowhere.jpg", "not a target image")),
        ("b\na\n", ("a", "no label file")),
        ("b\nb.jpg\n", ("b", "twice")),
        ("\n", ("empty",)),
        (b"\xff\xfe", ("UTF-8",)),
    ],
)
def test_files_of_names_that_do_not_fit(own, text, words):
    (own / "names.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with refuses(InputError, own / "names.txt", *words):
        open_own(own, "names.txt")


def test_a_name_that_is_no_file(own):
    with refuses(InputError, "labelled", "four", own):
        open_own(own, "four")


@pytest.fixture
def crops(tmp_path):
    """Frames a (two crops), b (one) and c (one, without an ending that counts), each with a mask."""
    for name in ("a_l", "a_r", "b_l", "c"):
        formats.save(np.zeros((8, 8, 3), np.uint8), tmp_path / f"t/img/{name}.png")
        formats.save(np.zeros((8, 8), np.uint8), tmp_path / f"t/lbl/{name}.png")
    return tmp_path


def open_crops(root, asked, method="labelled-only"):
    return open_own(root, asked, method, classes=["x", "y"], source=None, crop_endings=["_l", "_r"]).labelled.names


@pytest.mark.parametrize(("asked", "frames"), [(1, 1), (2, 2), (3, 3), (None, 3)])
def test_crops_of_one_frame_are_labelled_together(crops, asked, frames):
    names = open_crops(crops, asked)
    assert len({name.split("_")[0] for name in names}) == frames
    assert ("a_l" in names) == ("a_r" in names)
    with refuses(InputError, "labelled", "frames", 3, 4):
        open_crops(crops, 4)


def test_crops_by_names_and_for_the_oracle(crops):
    """A file lists images, crop by crop, and the oracle has all of them."""
    (crops / "names.txt").write_text("a_r\nc\n")
    assert list(open_crops(crops, "names.txt")) == ["a_r", "c"]
    assert sorted(open_crops(crops, 1, "oracle")) == ["a_l", "a_r", "b_l", "c"]


def test_an_ending_that_no_crop_has(crops):
    """Else a misspelt one would label the crops of a frame one by one."""
    (crops / "t/img/a_r.png").unlink()
    (crops / "t/lbl/a_r.png").unlink()
    with refuses(InputError, "data.crop_endings", "_r"):
        open_crops(crops, 2)


def test_labelled_images_in_folders_of_their_own(own):
    images = open_own(own, target=Folder("t/img"), labelled=folder("few"))
    assert sorted(images.labelled.names) == ["e", "f"]
    assert sorted(images.target.names) == sorted([*"abcdef", "Müll"])
    assert all((sample.label == 0).all() for sample in images.labelled)
    # Labels of the target's own folder are withheld then.
    assert sorted(open_own(own, labelled=folder("few")).labelled.names) == ["e", "f"]


def test_what_a_method_needs(own):
    bare = {"target": Folder("t/img")}
    for method in ("joint", "labelled-only", "oracle"):
        with refuses(InputError, f"method {method}", 5):
            open_own(own, method=method, **bare)
    assert list(open_own(own, method="source-only", **bare).labelled.names) == []
    images = open_own(own, method="labelled-only", source=None)
    assert images.source is None
    with refuses(InputError, own / "s/img/x.jpg"):
        open_own(own, source=Folder("s/img"))


def test_a_mask_in_another_format_is_not_passed_over(own):
    formats.save(np.zeros((8, 8, 3), np.uint8), own / "t/lbl/b.jpg")
    assert sorted(open_own(own).labelled.names) == sorted(LABELLED)
    formats.save(np.zeros((8, 8, 3), np.uint8), own / "t/lbl/c.jpg")
    with refuses(InputError, ".png", own / "t/lbl/c.jpg"):
        open_own(own)
