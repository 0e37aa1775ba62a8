"""Masks whose colours mean classes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from examples.workbench.data.colours import ids_of_colours, open_table
from examples.workbench.errors import InputError
from tests.errors import refuses

HEADER = "# label:color_rgb:parts:actions\n"
TABLE = {(0, 0, 0): 255, (60, 60, 60): 0, (250, 50, 83): 1, (255, 255, 255): 254}


def labelmap(root, text):
    (root / "labelmap.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return "labelmap.txt"


@given(arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 7)), elements=st.integers(0, 3)))
def test_ids_of_colours(rows):
    colours = np.array(list(TABLE), np.uint8)[rows]
    expected = [[TABLE[tuple(map(int, pixel))] for pixel in row] for row in colours]
    ids = ids_of_colours(Image.fromarray(colours), TABLE)
    assert ids.dtype == np.uint8
    assert ids.tolist() == expected


def test_colours_that_the_table_lacks():
    mask = np.zeros((4, 5, 3), np.uint8)
    mask[1, 1:4], mask[0, 0], mask[3, 3], mask[2, 2] = (60, 61, 60), (1, 2, 3), (4, 5, 6), (7, 8, 9)
    with refuses(ValueError, "[60, 61, 60] (3 pixels)", "[1, 2, 3] (1 pixels)", "1 more"):
        ids_of_colours(Image.fromarray(mask), TABLE)


@pytest.mark.parametrize(
    "encode", [str.encode, lambda text: text.encode("utf-8-sig"), lambda t: t.replace("\n", "\r\n").encode()]
)
def test_a_labelmap_of_cvat(tmp_path, encode):
    file = labelmap(
        tmp_path, encode(f"{HEADER}background:0,0,0::\n\nconveyor belt:60,60,60::\n  box : 250, 50, 83 ::lid,tape\n")
    )
    table, _ = open_table(file, tmp_path, ["box", "conveyor belt"], 255)
    assert table == {(0, 0, 0): 255, (60, 60, 60): 1, (250, 50, 83): 0}


def test_names_match_in_any_form_of_unicode(tmp_path):
    file = labelmap(tmp_path, "Fo\u0308rderband:1,2,3::\nb:0,0,0::\n")
    assert open_table(file, tmp_path, ["b", "F\u00f6rderband"], 255) == ({(1, 2, 3): 1, (0, 0, 0): 0}, [])


def test_every_class_needs_a_colour(tmp_path):
    with refuses(InputError, "colours", "belt, Box", "without box"):
        open_table({"belt": (1, 2, 3), "Box": (0, 0, 0)}, tmp_path, ["belt", "box"], 255)
    with refuses(InputError, tmp_path / "labelmap.txt", "without box"):
        open_table(labelmap(tmp_path, "belt:1,2,3::"), tmp_path, ["belt", "box"], 255)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("belt", ("line 2", "'belt'")),
        ("belt:1,2::", ("line 2", "'belt:1,2::'")),
        ("belt:::", ("line 2", "'belt:::'")),
        (":1,2,3::", ("line 2", "':1,2,3::'")),
        ("belt:1,2,256::", ("line 2", "0 to 255", 256)),
        ("belt:1,2,-3::", ("line 2", -3)),
        ("belt:1,2,x::", ("line 2", "x")),
        ("a:1,2,3::\nb:1,2,3::", ("line 3", "'b:1,2,3::'")),
        ("a:1,2,3::\na:3,2,1::", ("line 3", "'a:3,2,1::'")),
        (b"a\xfc:1,2,3::", ("UTF-8",)),
    ],
)
def test_lines_that_are_none_of_a_labelmap(tmp_path, text, words):
    file = labelmap(tmp_path, HEADER.encode() + (text if isinstance(text, bytes) else text.encode()))
    with refuses(InputError, tmp_path / file, *words):
        open_table(file, tmp_path, ["a"], 255)


@pytest.mark.parametrize("file", ["none.txt", ".", "../labelmap.txt", "/labelmap.txt"])
def test_a_labelmap_that_is_not_there(tmp_path, file):
    with refuses(InputError, tmp_path, "data root"):
        open_table(file, tmp_path, ["a"], 255)
