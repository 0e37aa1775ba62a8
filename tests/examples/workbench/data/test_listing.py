"""Files of a folder by name."""

import os
import sys
import unicodedata

import pytest

from examples.workbench.data.listing import list_files
from examples.workbench.errors import InputError
from tests.errors import refuses

IMAGES = (".jpg", ".png")


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_names_that_begin_with_a_dot_are_passed_over(tmp_path):
    touch(tmp_path / "i", "a.png", "._a.png", ".DS_Store", ".hidden.jpg", "Thumbs.db", "aachen/b.png", ".cache/c.png")
    assert list_files(tmp_path, "i", "*", IMAGES) == {"a": tmp_path / "i/a.png"}
    assert list_files(tmp_path, "i", "*/*", IMAGES) == {"b": tmp_path / "i/aachen/b.png"}
    # Not those of the folder itself.
    touch(tmp_path / ".data", "a.png")
    assert list(list_files(tmp_path, ".data", "*", IMAGES)) == ["a"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_composed(tmp_path, form):
    name = "Müll-é-ガ"
    touch(tmp_path / "i", unicodedata.normalize(form, f"{name}_máscara.png"))
    for ending in ("NFC", "NFD"):
        files = list_files(tmp_path, "i", "*", [unicodedata.normalize(ending, "_MÁscara.png")])
        assert list(files) == [unicodedata.normalize("NFC", name)]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep no such names")
def test_two_forms_of_one_name(tmp_path):
    touch(tmp_path / "i", *(unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")))
    with refuses(InputError, "only one file", "é", tmp_path / "i"):
        list_files(tmp_path, "i", "*", IMAGES)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep no such names")
def test_names_that_are_no_text(tmp_path):
    touch(tmp_path / "i", "a.png", os.fsdecode(b"notes-\xfc.txt"), os.fsdecode(b"._\xfc.png"))
    assert list(list_files(tmp_path, "i", "*", IMAGES)) == ["a"]
    touch(tmp_path / "i", os.fsdecode(b"M\xfcll.png"))
    with refuses(InputError, f"{tmp_path}/i/M\\xfcll.png", "UTF-8"):
        list_files(tmp_path, "i", "*", IMAGES)
    touch(tmp_path / "c", os.fsdecode(b"K\xf6ln/a.png"))
    with refuses(InputError, f"{tmp_path}/c/K\\xf6ln/a.png"):
        list_files(tmp_path, "c", "*/*", IMAGES)


def test_endings_that_are_passed_over(tmp_path):
    touch(tmp_path / "i", "a.png", "a_mask.png", "b_MASK.PNG")
    assert list(list_files(tmp_path, "i", "*", IMAGES, ("_mask.png",))) == ["a"]
    with refuses(InputError, tmp_path / "i", ".jpg, .png", "not in .png"):
        list_files(tmp_path, "i", "*", IMAGES, (".png",))
