"""The CUDA kernel under `class_shares`, on a GPU if there is one, otherwise on the CPU in Triton's interpreter."""

import itertools
import math
import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import semshift
from semshift import _label_ops as ops
from tests.kernels import DEVICE, GPU, INTEGERS, mapped, needs_gpu, of_all_bits, runs_kernels

pytest.importorskip("triton", reason="because the kernels need Triton")
from semshift import _label_triton as kernels

# Of NumPy 1, to the interpreter of Triton 3.0 and 3.1.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
MODES = [("area", False), ("bilinear", False), ("bilinear", True)]


def pairs(pixels: int, cells: int, resample: str, align_corners: bool):
    """Along one axis, every pixel and cell that meet, and their exact weight; area in units of 1 / cells pixels."""
    for pixel, cell in itertools.product(range(pixels), range(cells)):
        if resample == "area":
            left, right = max(pixel * cells, cell * pixels), min((pixel + 1) * cells, (cell + 1) * pixels)
            weight = Fraction(right - left)
        else:
            at = (pixel + Fraction(1, 2)) * cells / pixels - Fraction(1, 2)
            if align_corners:
                at = Fraction(pixel * (cells - 1), max(pixels - 1, 1))
            weight = 1 - abs(min(max(at, Fraction(0)), Fraction(cells - 1)) - cell)
        if weight > 0:
            yield pixel, cell, weight


def definition(labels: Tensor, height: int, width: int, num_classes: int, resample: str, align_corners: bool, ignored):
    """Exact shares, each then rounded once."""
    shares = [Fraction(0)] * (len(labels) * (num_classes + 1) * height * width)
    rows = list(pairs(labels.shape[1], height, resample, align_corners))
    columns = list(pairs(labels.shape[2], width, resample, align_corners))
    for image, label in enumerate(labels.tolist()):
        for (y, row, by_row), (x, column, by_column) in itertools.product(rows, columns):
            k = label[y][x]
            k = k if 0 <= k < num_classes and k != ignored else num_classes
            shares[((image * (num_classes + 1) + k) * height + row) * width + column] += by_row * by_column
    shape = (len(labels), num_classes + 1, height, width)
    return torch.tensor([float(share) for share in shares], dtype=torch.float64).view(shape)


def laid_out(labels: Tensor, layout: str) -> Tensor:
    """The same values with other strides; class 0 lies between them."""
    if layout == "transposed":
        return labels.mT.contiguous().mT
    if layout == "every-second":
        return torch.stack([labels, torch.zeros_like(labels)], -1).flatten(2)[..., ::2]
    if layout == "crop":
        return torch.nn.functional.pad(labels, (2, 1, 1, 2))[:, 1:-2, 2:-1]
    return labels


@st.composite
def cases(draw, num_classes=(1, 2, 19, 33, 150)):
    """Labels of all sizes and any value, and a grid for them: finer, coarser and equal."""
    extents = st.sampled_from([1, 2, 3, 5, 7, 12])
    size = (draw(st.integers(0, 2)), draw(extents), draw(extents))
    grid = (draw(st.sampled_from([0, 1, 2, 3, 5, 8])), draw(st.sampled_from([0, 1, 2, 3, 5, 8, 35])))
    classes, dtype = draw(st.sampled_from(num_classes)), draw(st.sampled_from(INTEGERS))
    ignore_index = draw(st.sampled_from([None, 0, 255, -1]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    labels = torch.randint(-2, classes + 3, size, generator=generator)
    labels[torch.rand(size, generator=generator) < 0.2] = ignore_index or 0
    layout = draw(st.sampled_from(["contiguous", "transposed", "every-second", "crop"]))
    labels = laid_out(labels.to(dtype).to(DEVICE), layout)
    return labels, *grid, classes, *draw(st.sampled_from(MODES)), ignore_index


@runs_kernels
@settings(max_examples=80)
@given(cases())
def test_shares_are_the_exact_ones_rounded_once(case):
    labels, height, width, num_classes, *_ = case
    assert kernels.takes(labels, height, width, num_classes)
    shares = kernels.share_out(*case)
    assert torch.equal(shares.cpu(), definition(*case))
    assert shares.is_contiguous()


@runs_kernels
@pytest.mark.parametrize(("resample", "align_corners"), MODES)
@pytest.mark.parametrize(
    ("size", "grid"),
    [((9, 150), (3, 11)), ((3, 301), (2, 2)), ((130, 5), (3, 40)), ((7, 40), (15, 97)), ((4, 270), (4, 1))],
)
def test_shares_equal_the_default_body(size, grid, resample, align_corners):
    """Several programs for a row, several lanes for a cell, up to all of them."""
    labels = torch.randint(0, 20, (2, *size), device=DEVICE)
    options = (labels, *grid, 19, resample, align_corners, 19)
    shares, want = kernels.share_out(*options), ops._share_out(*options)
    # The definition's places are rounded thrice to parts of the grid's extent, its sums once for each pixel.
    eps = torch.finfo(torch.float64).eps
    bound = 0 if resample == "area" else math.prod(size) * eps * (6 * max(grid) + want.max())
    assert ((shares - want).abs() <= bound).all()


@runs_kernels
@pytest.mark.parametrize(("resample", "align_corners"), MODES)
def test_all_pixels_are_shared_out(resample, align_corners):
    size, grid = (13, 37), (5, 9)
    shares = kernels.share_out(torch.randint(0, 6, (1, *size), device=DEVICE), *grid, 4, resample, align_corners, None)
    whole = 1 if resample == "area" else 4 * math.prod(size)
    if align_corners:
        whole = (size[0] - 1) * (size[1] - 1)
    pixels = math.prod(size) * (math.prod(grid) if resample == "area" else 1)
    assert (shares * whole).round().sum() == pixels * whole


@runs_kernels
@of_all_bits
@pytest.mark.parametrize("num_classes", [19, 300])
@pytest.mark.parametrize("ignore_index", [None, 1, 255, -1, 2**32 + 1, -(2**63)])
def test_labels_are_compared_in_all_their_bits(dtype, values, num_classes, ignore_index):
    labels = torch.tensor([[values]], dtype=dtype, device=DEVICE)
    options = (1, 1, num_classes, "area", False, ignore_index)
    assert torch.equal(kernels.share_out(labels, *options).cpu(), definition(labels, *options))


@runs_kernels
@pytest.mark.parametrize(("resample", "align_corners"), MODES)
def test_no_pixels_and_no_cells(resample, align_corners):
    options = (3, resample, align_corners, 255)
    for size, grid in (((0, 4, 4), (2, 2)), ((2, 0, 4), (2, 2)), ((2, 4, 0), (2, 2)), ((2, 4, 4), (0, 2))):
        shares = kernels.share_out(torch.zeros(size, dtype=torch.uint8, device=DEVICE), *grid, *options)
        assert shares.shape == (size[0], 4, *grid)
        assert not shares.any()


@pytest.mark.slow
@runs_kernels
@pytest.mark.parametrize("cells", [2, 32_000])
def test_the_largest_sizes_stay_within_32_bits(cells):
    """With `align_corners` and for areas the products are smaller."""
    labels = torch.zeros(1, 1, kernels._LARGEST, dtype=torch.uint8, device=DEVICE)
    options = (labels, 1, cells, 1, "bilinear", False, None)
    assert kernels.takes(*options[:4])
    shares, want = kernels.share_out(*options), ops._share_out(*options)
    assert ((shares - want).abs() <= 1e-9 * want.abs().max()).all()


@pytest.mark.parametrize(("resample", "align_corners"), MODES)
@pytest.mark.parametrize("cells", [1, 2, 31_999, 32_000])
@pytest.mark.parametrize("pixels", [1, 2, 31_999, 32_000])
def test_no_product_needs_more_than_32_bits(pixels, cells, resample, align_corners):
    scale, shift, unit = kernels._axis(pixels, cells, resample == "area", align_corners)
    # Lanes may stand for cells up to 31 beyond the last, and look at the pixels that would reach those.
    beyond = pixels + 34 * (pixels // cells + 1)
    places = [(cells + 32) * unit + abs(shift) + scale, beyond * scale + abs(shift)]
    # The weights of all lines, where one cell takes them.
    assert max(*places, pixels * unit if cells == 1 else 0) < 2**31


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("resample", "align_corners"), MODES)
def test_one_cell_takes_all_lines(resample, align_corners):
    """This many steps are only for a GPU, since the interpreter needs minutes."""
    labels = torch.zeros(1, kernels._LARGEST, 3, dtype=torch.uint8, device=DEVICE)
    shares = kernels.share_out(labels, 1, 1, 1, resample, align_corners, None)
    assert shares.flatten().tolist() == [3 * kernels._LARGEST, 0]


def test_larger_sizes_are_left_to_the_default_body():
    labels = torch.zeros(1, dtype=torch.uint8).expand(2, 32_001, 5)
    assert not kernels.takes(labels, 4, 4, 3)
    assert not kernels.takes(labels.mT, 4, 4, 3)
    assert kernels.takes(labels[:, 1:], 4, 4, 3)
    assert not kernels.takes(labels[:, 1:], 32_001, 4, 3)
    assert not kernels.takes(labels[:, 1:], 4, 32_001, 3)
    assert not kernels.takes(labels[:, 1:], 4, 4, 2**21)


@runs_kernels
def test_the_op_uses_the_kernel_on_cuda_where_that_serves(monkeypatch):
    labels = torch.randint(0, 3, (2, 7, 9), device=DEVICE)
    options = (3, 4, 3, "bilinear", False, 255)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("semshift::label_shares", "CUDA")
    want = kernels.share_out(labels, *options)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "_share_out", None)
        assert torch.equal(ops._share_out_on_cuda(labels, *options), want)
    monkeypatch.setattr(kernels, "_shares_kernel", None)
    for name in ("_LARGEST", "_MOST_CLASSES"):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, name, 2)
            torch.testing.assert_close(ops._share_out_on_cuda(labels, *options), want)
    monkeypatch.setattr("semshift._kernels._kernels", lambda *_: None)
    torch.testing.assert_close(ops._share_out_on_cuda(labels, *options), want)


@pytest.fixture(scope="module")
def vast():
    """Eight GiB of zeros, of which only the touched pages take memory."""
    return torch.frombuffer(mapped(2**33), dtype=torch.uint8)


@runs_kernels
@pytest.mark.skipif(GPU or sys.platform == "win32", reason="because it reads the memory of the CPU")
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_beyond_32_bits(vast, axis):
    """Each axis in turn lies so far apart that an offset in 32 bits wraps round, into zeros before the labels."""
    sizes, strides = [2, 2, 2], [1, 1, 1]
    sizes[axis], strides[axis] = 3, 2**31 - 9
    labels = vast.as_strided(sizes, strides, 2**32 - 2**30)
    labels.movedim(axis, 0)[2] = 1
    options = (1, 1, 2, "area", False, None)
    assert torch.equal(kernels.share_out(labels, *options), definition(labels, *options))
    labels.fill_(0)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("resample", ["bilinear", "area", "nearest", "majority"])
def test_resampling_is_captured_in_a_cuda_graph(resample):
    """A step that forces a device sync would end the capture."""
    features = torch.randn(2, 8, 9, 17, device="cuda")
    labels = torch.randint(0, 20, (2, 64, 128), device="cuda")

    def pool():
        pooled = semshift.class_sums(features, labels, 19, resample=resample)
        return pooled.sums, pooled.mass

    want = pool()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = pool()
    graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip(got, want):
        assert torch.equal(ours, theirs)
