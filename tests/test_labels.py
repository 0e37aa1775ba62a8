"""Label maps: checks, remapping, resizing against exact fractions, class shares."""

import itertools
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semshift.labels import _shares, check_labels, class_shares, remap_labels, resize_labels

# Compiling on Python 3.13.0 itself, torch warns of its own slowness there.
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
    result = resize_labels(label[None], grid, mode="majority", num_classes=3, min_share=min_share)
    for (row, column), cell in votes(label, grid, (0, 1, 2, 255)).items():
        # Ties go to the lower id, and 255 comes last.
        winner = max(cell, key=lambda slot: (cell[slot], -slot))
        expected = winner if cell[winner] >= Fraction(min_share) else 255
        assert result[0, row, column] == expected


@given(sizes, sizes, st.integers(0, 2**32 - 1))
def test_area_shares_against_exact_overlap(size, grid, seed):
    label = torch.randint(0, 3, size, generator=torch.Generator().manual_seed(seed))
    label[label == 2] = 255
    shares = class_shares(label[None], grid, 2, mode="area")
    assert shares.dtype == torch.float32
    for (row, column), cell in votes(label, grid, (0, 1, 255)).items():
        for k in range(2):
            assert shares[0, k, row, column].item() == pytest.approx(float(cell[k]), rel=1e-6)


@pytest.mark.parametrize("align_corners", [False, True])
def test_bilinear_shares_add_up_to_label_pixels(align_corners):
    labels = torch.randint(0, 5, (2, 13, 7))
    labels[labels == 4] = 255
    shares = class_shares(labels, (4, 9), 4, mode="bilinear", align_corners=align_corners)
    counts = torch.stack([(labels == k).sum((1, 2)) for k in range(4)], 1)
    torch.testing.assert_close(shares.sum((2, 3)), counts.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["nearest", "majority"])
def test_resizing_keeps_the_dtype(dtype, mode):
    ignore_index = 100
    labels = torch.tensor([[[0, 1, 100], [2, 2, 100]]], dtype=dtype)
    result = resize_labels(labels, (2, 3), mode=mode, num_classes=3, ignore_index=ignore_index)
    assert result.dtype == dtype
    assert torch.equal(result, labels)


def test_majority_ties():
    labels = torch.tensor([[[1, 0], [255, 255]]])
    assert resize_labels(labels, (1, 1), mode="majority", num_classes=2).item() == 255
    labels = torch.tensor([[[1, 1], [255, 255]]])
    assert resize_labels(labels, (1, 1), mode="majority", num_classes=2).item() == 1
    labels = torch.tensor([[[1, 1], [0, 0]]])
    assert resize_labels(labels, (1, 1), mode="majority", num_classes=2).item() == 0
    assert resize_labels(labels, (1, 1), mode="majority", num_classes=2, ignore_index=None).item() == 0


def test_nearest_takes_the_centre_not_the_corner():
    labels = torch.arange(8).view(1, 1, 8)
    assert resize_labels(labels, (1, 2), mode="nearest", num_classes=8).tolist() == [[[2, 6]]]
    assert resize_labels(labels[..., :2], (1, 6), mode="nearest", num_classes=8).tolist() == [[[0, 0, 0, 1, 1, 1]]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_check_labels_accepts_what_is_right(dtype):
    check_labels(torch.tensor([0, 18, 127], dtype=dtype), 19, ignore_index=127)
    check_labels(torch.tensor([], dtype=dtype), 19)
    check_labels(torch.tensor([0, 1], dtype=dtype), 300, ignore_index=None)


def test_remap_keeps_shape_and_dtype():
    labels = torch.tensor([[7, 8], [0, 33]], dtype=torch.int16)
    assert torch.equal(
        remap_labels(labels, {33: 18, 0: 255, 8: 1, 7: 0}), torch.tensor([[0, 1], [255, 18]], dtype=torch.int16)
    )
    assert remap_labels(torch.zeros(0, 3, dtype=torch.uint8), {1: 2}).shape == (0, 3)
    assert remap_labels(torch.tensor([-1]), {-1: 255}).item() == 255


@pytest.mark.parametrize("mode", ["area", "bilinear"])
def test_shares_op(mode):
    labels = torch.randint(0, 3, (2, 5, 4), dtype=torch.uint8)
    result = torch.library.opcheck(_shares, (labels, 3, 6, 3, mode, False, 255))
    assert set(result.values()) == {"SUCCESS"}


def test_empty_batch_and_empty_grid():
    nothing = torch.zeros(0, 4, 4, dtype=torch.uint8)
    assert class_shares(nothing, (2, 2), 3, mode="area").shape == (0, 3, 2, 2)
    assert resize_labels(nothing, (2, 2), mode="majority", num_classes=3).shape == (0, 2, 2)
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    assert class_shares(labels, (0, 2), 3, mode="bilinear").shape == (1, 3, 0, 2)
    assert class_shares(torch.zeros(1, 0, 4, dtype=torch.uint8), (0, 2), 3, mode="area").shape == (1, 3, 0, 2)


MAP = torch.zeros(1, 4, 4, dtype=torch.int64)


def resize(labels=MAP, size=(2, 2), **changes):
    return resize_labels(labels, size, **({"mode": "majority", "num_classes": 3} | changes))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check_labels([0], 3), TypeError, "expected labels to be a tensor, got list"),
        (
            lambda: check_labels(torch.zeros(2), 3),
            TypeError,
            "expected labels of dtype uint8, int8, int16, int32 or int64, got torch.float32",
        ),
        (lambda: check_labels(MAP, 0), ValueError, "expected num_classes to be at least 1, got 0"),
        (lambda: check_labels(MAP, 3.0), TypeError, "expected num_classes to be an int, got 3.0"),
        (lambda: check_labels(MAP, True), TypeError, "expected num_classes to be an int, got True"),
        (lambda: check_labels(MAP, 3, ignore_index="x"), TypeError, "expected ignore_index to be an int, got 'x'"),
        (
            lambda: check_labels(MAP, 256),
            ValueError,
            "expected an explicit ignore_index (None, or an id that is no class) with more than 255 classes, "
            "got 255 with num_classes 256",
        ),
        (
            lambda: resize_labels(MAP, (1, 1), mode="majority", num_classes=3, min_share="0.5"),
            TypeError,
            "expected min_share to be a number, got '0.5'",
        ),
        (
            # The ops hold it in an int64.
            lambda: resize_labels(MAP, (1, 1), mode="nearest", num_classes=3, ignore_index=2**63),
            ValueError,
            "expected ignore_index to fit int64, got 9223372036854775808",
        ),
        (
            lambda: check_labels(torch.tensor([-1, 3, 3]), 3),
            ValueError,
            "expected labels in [0, 3) or ignore_index 255, got -1 (1 pixel), 3 (2 pixels)",
        ),
        (
            # In uint8 a comparison with -1 would match 255.
            lambda: check_labels(torch.tensor([255], dtype=torch.uint8), 3, ignore_index=-1),
            ValueError,
            "expected labels in [0, 3) or ignore_index -1, got 255 (1 pixel)",
        ),
        (
            lambda: check_labels(torch.arange(3, 10), 3, ignore_index=None),
            ValueError,
            "expected labels in [0, 3), got 3 (1 pixel), 4 (1 pixel), 5 (1 pixel), 6 (1 pixel), 7 (1 pixel) "
            "and 2 more values",
        ),
        (lambda: remap_labels(MAP, {}), ValueError, "expected table to map at least one id, got an empty one"),
        (lambda: remap_labels(MAP, {0.5: 1}), TypeError, "expected the ids of table to be ints, got 0.5"),
        (
            lambda: remap_labels(MAP.byte(), {0: 256}),
            ValueError,
            "expected table to hold new ids that torch.uint8 can hold, got 256",
        ),
        (lambda: remap_labels(MAP, {1: 0}), ValueError, "expected labels to be ids of table, got 0 (16 pixels)"),
        (
            lambda: remap_labels(torch.arange(7), {9: 0}),
            ValueError,
            "expected labels to be ids of table, got 0, 1, 2, 3, 4 and 2 more (7 pixels)",
        ),
        (lambda: resize(MAP[0]), ValueError, "expected labels [B, H, W], got [4, 4]"),
        (lambda: resize(size=(2,)), ValueError, "expected size (h, w), got (2,)"),
        (lambda: resize(size=(2.0, 2)), TypeError, "expected size to be an int, got 2.0"),
        (lambda: resize(size=(-1, 2)), ValueError, "expected size (h, w) of at least 0 each way, got (-1, 2)"),
        (
            lambda: resize(MAP[:, :0]),
            ValueError,
            "expected labels with pixels for a grid of (2, 2), got [1, 0, 4]",
        ),
        (lambda: resize(mode="mean"), ValueError, "expected mode to be 'nearest' or 'majority', got 'mean'"),
        (lambda: resize(min_share=1.5), ValueError, "expected min_share in [0, 1], got 1.5"),
        (
            lambda: resize(mode="nearest", min_share=0.5),
            ValueError,
            "expected min_share only with mode 'majority' and an ignore_index, got 'nearest' and 255",
        ),
        (
            lambda: resize(MAP.to(torch.int8), min_share=0.5),
            ValueError,
            "expected an ignore_index that torch.int8 can hold, got 255",
        ),
        (lambda: resize(MAP + 3), ValueError, "expected labels in [0, 3) or ignore_index 255, got 3 (16 pixels)"),
        (
            lambda: class_shares(MAP, (2, 2), 3, mode="nearest"),
            ValueError,
            "expected mode to be 'area' or 'bilinear', got 'nearest'",
        ),
        (
            lambda: class_shares(MAP, (2, 2), 3, mode="area", align_corners=True),
            ValueError,
            "expected align_corners only with mode 'bilinear', got 'area'",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        call()


def test_negative_labels_are_refused_where_none_is_too_large():
    with pytest.raises(ValueError, match=r"^expected labels in \[0, 3\) or ignore_index 255, got -1 \(1 pixel\)$"):
        check_labels(torch.tensor([[0, -1, 2]]), 3)


def test_more_classes_than_the_dtype_of_the_labels_holds():
    labels = torch.tensor([[[0, 100], [127, -1]]], dtype=torch.int8)
    shares = class_shares(labels, (1, 1), 200, mode="area", ignore_index=-1)
    assert shares.flatten().nonzero().flatten().tolist() == [0, 100, 127]


def test_a_label_beyond_the_table_is_told():
    with pytest.raises(ValueError, match=r"^expected labels to be ids of table, got 9 \(1 pixel\)$"):
        remap_labels(torch.tensor([1, 9]), {0: 0, 1: 1})


@pytest.mark.parametrize("mode", ["nearest", "majority"])
@pytest.mark.parametrize("size", [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("grid", [(3, 0), (0, 3), (0, 0)])
def test_no_pixels_to_a_grid_without_cells(mode, size, grid):
    labels = torch.zeros(2, *size, dtype=torch.uint8)
    assert resize_labels(labels, grid, mode=mode, num_classes=3).shape == (2, *grid)


@pytest.mark.parametrize("mode", ["area", "bilinear"])
def test_shares_do_not_depend_on_how_many_images_go_together(mode, monkeypatch):
    labels = torch.tensor([0, 1, 2, 255])[torch.randint(0, 4, (3, 7, 9))]
    together = class_shares(labels, (4, 5), 3, mode=mode)
    for images in (0, 2):
        monkeypatch.setattr("semshift.labels._HELD", images * 7 * 4 * 5)
        assert torch.equal(class_shares(labels, (4, 5), 3, mode=mode), together)
