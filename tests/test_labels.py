"""Label maps: checks, remapping, resizing against exact fractions, class shares."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import semshift
from semshift import _label_ops
from tests.errors import refuses

# While compiling on Python 3.13.0, torch warns that it is slow there.
pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")

DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def overlap(pixel, pixels, cell, cells):
    """Length that a pixel and a cell of a unit interval share, exactly."""
    left = max(Fraction(pixel, pixels), Fraction(cell, cells))
    right = min(Fraction(pixel + 1, pixels), Fraction(cell + 1, cells))
    return max(right - left, Fraction(0))


def votes(label, size, slots):
    """Exact share of each cell that each id covers: {(row, column): {id: share}}."""
    height, width = label.shape
    result = {}
    for row, column in itertools.product(range(size[0]), range(size[1])):
        cell = dict.fromkeys(slots, Fraction(0))
        for y, x in itertools.product(range(height), range(width)):
            area = overlap(y, height, row, size[0]) * overlap(x, width, column, size[1])
            cell[int(label[y, x])] += area * size[0] * size[1]
        result[row, column] = cell
    return result


sizes = st.tuples(st.integers(1, 6), st.integers(1, 6))


@given(sizes, sizes, st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 0.875]))
def test_majority_against_exact_votes(size, grid, seed, min_share):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 4, size, generator=generator)
    label[label == 3] = 255
    result = semshift.resize_labels(label[None], grid, 3, resample="majority", min_share=min_share)
    for (row, column), cell in votes(label, grid, (0, 1, 2, 255)).items():
        # Ties go to the lower id, and 255 comes last.
        winner = max(cell, key=lambda slot: (cell[slot], -slot))
        expected = winner if cell[winner] >= Fraction(min_share) else 255
        assert result[0, row, column] == expected


@given(sizes, sizes, st.integers(0, 2**32 - 1))
def test_area_shares_against_exact_overlap(size, grid, seed):
    label = torch.randint(0, 3, size, generator=torch.Generator().manual_seed(seed))
    label[label == 2] = 255
    shares = semshift.class_shares(label[None], grid, 2, resample="area")
    assert shares.dtype == torch.float32
    for (row, column), cell in votes(label, grid, (0, 1, 255)).items():
        for k in range(2):
            assert shares[0, k, row, column].item() == pytest.approx(float(cell[k]), rel=1e-6)


@pytest.mark.parametrize("align_corners", [False, True])
def test_bilinear_shares_add_up_to_label_pixels(align_corners):
    labels = torch.randint(0, 5, (2, 13, 7))
    labels[labels == 4] = 255
    shares = semshift.class_shares(labels, (4, 9), 4, resample="bilinear", align_corners=align_corners)
    counts = torch.stack([(labels == k).sum((1, 2)) for k in range(4)], 1)
    torch.testing.assert_close(shares.sum((2, 3)), counts.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("resample", ["nearest", "majority"])
def test_resizing_keeps_the_dtype(dtype, resample):
    ignore_index = 100
    labels = torch.tensor([[[0, 1, 100], [2, 2, 100]]], dtype=dtype)
    result = semshift.resize_labels(labels, (2, 3), 3, resample=resample, ignore_index=ignore_index)
    assert result.dtype == dtype
    assert torch.equal(result, labels)


def test_majority_ties():
    labels = torch.tensor([[[1, 0], [255, 255]]])
    assert semshift.resize_labels(labels, (1, 1), 2, resample="majority").item() == 255
    labels = torch.tensor([[[1, 1], [255, 255]]])
    assert semshift.resize_labels(labels, (1, 1), 2, resample="majority").item() == 1
    labels = torch.tensor([[[1, 1], [0, 0]]])
    assert semshift.resize_labels(labels, (1, 1), 2, resample="majority").item() == 0
    assert semshift.resize_labels(labels, (1, 1), 2, resample="majority", ignore_index=None).item() == 0


def test_nearest_takes_the_centre_not_the_corner():
    labels = torch.arange(8).view(1, 1, 8)
    assert semshift.resize_labels(labels, (1, 2), 8, resample="nearest").tolist() == [[[2, 6]]]
    assert semshift.resize_labels(labels[..., :2], (1, 6), 8, resample="nearest").tolist() == [[[0, 0, 0, 1, 1, 1]]]


@given(sizes, sizes, st.sampled_from(DTYPES))
def test_nearest_takes_the_pixel_under_the_centre(size, grid, dtype):
    labels = torch.arange(2 * size[0] * size[1], dtype=dtype).view(2, *size)
    rows, columns = (
        [int((cell + Fraction(1, 2)) * pixels / cells) for cell in range(cells)] for pixels, cells in zip(size, grid)
    )
    want = torch.stack([torch.stack([label[row, columns] for row in rows]) for label in labels])
    assert torch.equal(semshift.resize_labels(labels, grid, 72, resample="nearest"), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_check_labels_accepts_what_is_right(dtype):
    semshift.check_labels(torch.tensor([0, 18, 127], dtype=dtype), 19, ignore_index=127)
    semshift.check_labels(torch.tensor([], dtype=dtype), 19)
    semshift.check_labels(torch.tensor([0, 1], dtype=dtype), 300, ignore_index=None)


def test_remap_keeps_shape_and_dtype():
    labels = torch.tensor([[7, 8], [0, 33]], dtype=torch.int16)
    want = torch.tensor([[0, 1], [255, 18]], dtype=torch.int16)
    assert torch.equal(semshift.remap_labels(labels, {33: 18, 0: 255, 8: 1, 7: 0}), want)
    assert semshift.remap_labels(torch.zeros(0, 3, dtype=torch.uint8), {1: 2}).shape == (0, 3)
    assert semshift.remap_labels(torch.tensor([-1]), {-1: 255}).item() == 255


@given(
    st.dictionaries(st.integers(-9, 99), st.integers(0, 99), min_size=1, max_size=5),
    st.lists(st.integers(-9, 99), max_size=12),
    st.integers(-99, 127),
    st.sampled_from([torch.int8, torch.int16, torch.int64]),
)
def test_remap_gives_the_default_to_labels_that_the_table_lacks(table, ids, default, dtype):
    labels = torch.tensor(ids, dtype=dtype)
    found = semshift.remap_labels(labels, table, default=default)
    assert found.dtype == dtype
    assert found.tolist() == [table.get(value, default) for value in ids]
    # Whatever kinds of ints, and however mixed.
    of_numpy = {np.int8(old): np.uint8(new) for old, new in table.items()}
    assert torch.equal(semshift.remap_labels(labels, of_numpy, default=np.int16(default)), found)


def test_a_table_may_be_a_tensor():
    table = torch.tensor([3, 255, 0], dtype=torch.uint8)
    labels = torch.tensor([[2, 0, 1]])
    assert semshift.remap_labels(labels, table).tolist() == [[0, 3, 255]]
    assert semshift.remap_labels(torch.tensor([2, 3, -1]), table, default=-7).tolist() == [0, -7, -7]
    with refuses(ValueError, "labels", "table", "3 (1 pixel)"):
        semshift.remap_labels(torch.tensor([2, 3]), table)


@pytest.mark.parametrize("resample", ["area", "bilinear"])
def test_shares_op(resample):
    labels = torch.randint(0, 3, (2, 5, 4), dtype=torch.uint8)
    result = torch.library.opcheck(torch.ops.semshift.label_shares.default, (labels, 3, 6, 3, resample, False, 255))
    assert set(result.values()) == {"SUCCESS"}


def test_empty_batch_and_empty_grid():
    nothing = torch.zeros(0, 4, 4, dtype=torch.uint8)
    assert semshift.class_shares(nothing, (2, 2), 3, resample="area").shape == (0, 3, 2, 2)
    assert semshift.resize_labels(nothing, (2, 2), 3, resample="majority").shape == (0, 2, 2)
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    assert semshift.class_shares(labels, (0, 2), 3, resample="bilinear").shape == (1, 3, 0, 2)
    assert semshift.class_shares(torch.zeros(1, 0, 4, dtype=torch.uint8), (0, 2), 3, resample="area").shape == (
        1,
        3,
        0,
        2,
    )


MAP = torch.zeros(1, 4, 4, dtype=torch.int64)


def resize(labels=MAP, size=(2, 2), num_classes=3, **changes):
    return semshift.resize_labels(labels, size, num_classes, **({"resample": "majority"} | changes))


def shares(labels=MAP, **changes):
    return semshift.class_shares(labels, (2, 2), 3, **({"resample": "area"} | changes))


DTYPE_NAMES = ("labels", "uint8", "int8", "int16", "int32", "int64")


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: semshift.check_labels([0], 3), TypeError, ("labels", "list")),
        (lambda: semshift.check_labels(torch.zeros(2), 3), TypeError, (*DTYPE_NAMES, torch.float32)),
        (lambda: semshift.check_labels(MAP > 0, 3), TypeError, (*DTYPE_NAMES, torch.bool)),
        (lambda: semshift.check_labels(MAP, 0), ValueError, ("num_classes", 1, 0)),
        (lambda: semshift.check_labels(MAP, 3.0), TypeError, ("num_classes", 3.0)),
        (lambda: semshift.check_labels(MAP, True), TypeError, ("num_classes", True)),
        (lambda: semshift.check_labels(MAP, 3, ignore_index="x"), TypeError, ("ignore_index", "'x'")),
        (lambda: semshift.check_labels(MAP, 256), ValueError, ("ignore_index", None, 255, "num_classes", 256)),
        # The ops hold it in an int64.
        (lambda: resize(ignore_index=2**63), ValueError, ("ignore_index", "int64", 2**63)),
        (
            lambda: semshift.check_labels(torch.tensor([-1, 3, 3]), 3),
            ValueError,
            ("labels", "[0, 3)", "ignore_index", 255, "-1 (1 pixel)", "3 (2 pixels)"),
        ),
        # The same where none is too large.
        (lambda: semshift.check_labels(torch.tensor([[0, -1, 2]]), 3), ValueError, ("labels", "-1 (1 pixel)")),
        # In uint8 a comparison with -1 would match 255.
        (
            lambda: semshift.check_labels(torch.tensor([255], dtype=torch.uint8), 3, ignore_index=-1),
            ValueError,
            ("labels", "[0, 3)", "ignore_index", -1, "255 (1 pixel)"),
        ),
        (
            lambda: semshift.check_labels(torch.arange(3, 10), 3, ignore_index=None),
            ValueError,
            ("labels", "[0, 3)", *(f"{value} (1 pixel)" for value in range(3, 8)), 2),
        ),
        (lambda: semshift.remap_labels(MAP, [0]), TypeError, ("table", "list")),
        (lambda: semshift.remap_labels(MAP, torch.zeros(3)), TypeError, ("table", torch.float32)),
        (lambda: semshift.remap_labels(MAP, torch.zeros(3, 1).long()), ValueError, ("table", "[3, 1]")),
        (lambda: semshift.remap_labels(MAP, {}), ValueError, ("table", "empty")),
        (lambda: semshift.remap_labels(MAP, {}, default=3), ValueError, ("table", "empty")),
        (lambda: semshift.remap_labels(MAP, {0.5: 1}), TypeError, ("table", 0.5)),
        (lambda: semshift.remap_labels(MAP, {0: True}), TypeError, ("table", True)),
        (lambda: semshift.remap_labels(MAP, {0: torch.tensor(1)}), TypeError, ("table", "tensor(1)")),
        (lambda: semshift.remap_labels(MAP, {2**63: 1}), ValueError, ("table", "int64", 2**63)),
        (lambda: semshift.remap_labels(MAP.byte(), {0: 256}), ValueError, ("table", torch.uint8, 256)),
        (lambda: semshift.remap_labels(MAP, {1: 0}), ValueError, ("labels", "table", "default", "0 (16 pixels)")),
        (
            lambda: semshift.remap_labels(torch.tensor([1, 9]), {0: 0, 1: 1}),
            ValueError,
            ("labels", "table", "default", "9 (1 pixel)"),
        ),
        (
            lambda: semshift.remap_labels(torch.arange(7), {9: 0}),
            ValueError,
            ("labels", "table", "0, 1, 2, 3, 4", 2, "7 pixels"),
        ),
        (lambda: semshift.remap_labels(MAP, {0: 0}, default="255"), TypeError, ("default", "'255'")),
        (lambda: semshift.remap_labels(MAP, {0: 0}, default=False), TypeError, ("default", False)),
        # Also where no label needs it.
        (lambda: semshift.remap_labels(MAP.byte(), {0: 0}, default=-1), ValueError, ("default", torch.uint8, -1)),
        (lambda: semshift.remap_labels(MAP, {0: 0}, default=2**63), ValueError, ("default", torch.int64, 2**63)),
        (lambda: resize(MAP[0]), ValueError, ("labels", "[4, 4]")),
        (lambda: resize(size=(2,)), ValueError, ("size", "(2,)")),
        (lambda: resize(size=2), ValueError, ("size", 2)),
        (lambda: resize(size=(2.0, 2)), TypeError, ("size", 2.0)),
        (lambda: resize(size=(-1, 2)), ValueError, ("size", 0, "(-1, 2)")),
        (lambda: resize(MAP[:, :0]), ValueError, ("labels", "(2, 2)", "[1, 0, 4]")),
        (lambda: resize(resample="mean"), ValueError, ("resample", "'nearest'", "'majority'", "'mean'")),
        (lambda: resize(resample=None), ValueError, ("resample", "'nearest'", "'majority'", None)),
        (lambda: resize(min_share="0.5"), TypeError, ("min_share", "'0.5'")),
        (lambda: resize(min_share=True), TypeError, ("min_share", True)),
        (lambda: resize(min_share=1.5), ValueError, ("min_share", "[0, 1]", 1.5)),
        (
            lambda: resize(resample="nearest", min_share=0.5),
            ValueError,
            ("min_share", "'majority'", "'nearest'", "ignore_index", 255),
        ),
        (lambda: resize(ignore_index=None, min_share=0.5), ValueError, ("min_share", "ignore_index", None)),
        (lambda: resize(MAP.to(torch.int8), min_share=0.5), ValueError, ("ignore_index", torch.int8, 255)),
        (lambda: resize(MAP + 3), ValueError, ("labels", "[0, 3)", "3 (16 pixels)")),
        (lambda: shares(resample="nearest"), ValueError, ("resample", "'area'", "'bilinear'", "'nearest'")),
        (lambda: shares(align_corners=True), ValueError, ("align_corners", "'bilinear'", "'area'")),
        (lambda: shares(resample="bilinear", align_corners=1), TypeError, ("align_corners", 1)),
        (lambda: shares(MAP + 3), ValueError, ("labels", "[0, 3)", "3 (16 pixels)")),
    ],
)
def test_errors(call, error, says):
    with refuses(error, *says):
        call()


def test_more_classes_than_the_dtype_of_the_labels_holds():
    labels = torch.tensor([[[0, 100], [127, -1]]], dtype=torch.int8)
    shares = semshift.class_shares(labels, (1, 1), 200, resample="area", ignore_index=-1)
    assert shares.flatten().nonzero().flatten().tolist() == [0, 100, 127]


@pytest.mark.parametrize("resample", ["nearest", "majority"])
@pytest.mark.parametrize("size", [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("grid", [(3, 0), (0, 3), (0, 0)])
def test_no_pixels_to_a_grid_without_cells(resample, size, grid):
    labels = torch.zeros(2, *size, dtype=torch.uint8)
    assert semshift.resize_labels(labels, grid, 3, resample=resample).shape == (2, *grid)


@pytest.mark.parametrize("resample", ["area", "bilinear"])
def test_shares_do_not_depend_on_how_many_images_go_together(resample, monkeypatch):
    labels = torch.tensor([0, 1, 2, 255])[torch.randint(0, 4, (3, 7, 9))]
    together = semshift.class_shares(labels, (4, 5), 3, resample=resample)
    for images in (0, 2):
        monkeypatch.setattr("semshift._label_ops._HELD", images * 7 * 4 * 5)
        assert torch.equal(semshift.class_shares(labels, (4, 5), 3, resample=resample), together)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(7, 9), (3, 2)])
def test_no_step_off_the_cpu_waits_for_values(size, dtype):
    """Tensors without values refuse every step whose result, or its size, depends on them."""
    labels = torch.empty(2, *size, dtype=dtype, device="meta")
    for resample, ignore_index in itertools.product(("nearest", "majority"), (None, 100)):
        options = (4, 5, resample, 3, ignore_index, 0.5)
        assert _label_ops._resize(labels, *options).shape == (2, 4, 5)
    for resample, align_corners in (("area", False), ("bilinear", False), ("bilinear", True)):
        options = (4, 5, 3, resample, align_corners, 100)
        assert _label_ops._share_out(labels, *options).shape == (2, 4, 4, 5)
