"""Sums by label and their adjoint on CUDA, against the definition: on a GPU where there is one, else interpreted."""

import math
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import semshift
from semshift import _pooling_ops as ops
from tests.kernels import (
    DEVICE,
    FLOATS,
    GPU,
    QUIET,
    cases,
    cut_small,
    definition,
    laid_out,
    mapped,
    near,
    needs_gpu,
    of_all_bits,
    runs_kernels,
)

pytest.importorskip("triton", reason="because the kernels need Triton")
from semshift import _pooling_triton as kernels

pytestmark = [*QUIET, pytest.mark.usefixtures("multiples_are_checked")]

NON_FINITE = (math.inf, -math.inf, math.nan)


@runs_kernels
@settings(max_examples=70)
@given(cases(), st.sampled_from([16, 1, 2]), st.sampled_from([256, 16]))
def test_sums_equal_the_definition(case, added, pixels):
    """Also with several spans for an image, and several heaps of their sums, which else need many pixels."""
    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch, added, pixels)
        pooled = kernels.add_up(*case)
    assert (pooled is None) == (case[0].shape[1] == 0)
    if pooled is None:
        return
    (sums, counts), (want, of_absolutes, want_counts) = pooled, definition(*case)
    assert torch.equal(counts.cpu(), want_counts)
    near(sums, want, of_absolutes, case[1].numel())


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "offset", "channels-of-more", "images-apart"])
@pytest.mark.parametrize("pixels", [127, 128, 129])
def test_planes_that_fill_a_span(pixels, layout, dtype):
    """From where a vector begins, a plane may need one more span than from its first pixel."""
    features = laid_out(torch.randn(3, 11, pixels).to(dtype).to(DEVICE), layout)
    labels = torch.randint(0, 2, (3, pixels), device=DEVICE)
    sums, counts = kernels.add_up(features, labels, 2, None, True)
    want, of_absolutes, want_counts = definition(features, labels, 2, None, True)
    assert torch.equal(counts.cpu(), want_counts)
    near(sums, want, of_absolutes, pixels)


@runs_kernels
@settings(max_examples=30)
@given(
    cases(num_classes=(19, 2, 65, 300)),
    st.lists(st.tuples(st.sampled_from(NON_FINITE), st.sampled_from([0.0, 1.0, 0.5])), min_size=1, max_size=4),
)
def test_a_non_finite_feature_reaches_its_own_class_alone(case, values):
    """At the ends of a plane, where other pixels are masked, and within it."""
    features, labels, *options = case
    assume(features.numel())
    generator = torch.Generator().manual_seed(len(values))
    for value, part in values:
        image, channel = (int(torch.randint(0, size, (), generator=generator)) for size in features.shape[:2])
        features[(image, channel, *(int(part * (size - 1)) for size in features.shape[2:]))] = value
    sums, _ = kernels.add_up(features, labels, *options)
    want, of_absolutes, _ = definition(features, labels, *options)
    finite = want.isfinite()
    torch.testing.assert_close(sums.double().cpu()[~finite], want[~finite], rtol=0, atol=0, equal_nan=True)
    near(sums.cpu()[finite], want[finite], of_absolutes[finite], labels.numel())


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [3, 300])
def test_values_that_are_not_finite_in_several_spans(dtype, num_classes):
    """Class 0 gets inf in one span and -inf in another, class 1 nan and inf in one; 2 stays finite."""
    features = torch.randn(1, 2, 1100).to(dtype).to(DEVICE)
    labels = (torch.arange(1100, device=DEVICE) % 3)[None]
    for pixel, value in ((0, math.inf), (1098, -math.inf), (4, math.nan), (7, math.inf)):
        features[0, 1, pixel] = value
    sums, counts = kernels.add_up(features, labels, num_classes, None, False)
    want, of_absolutes, want_counts = definition(features, labels, num_classes, None, False)
    assert sums[:2, 1].isnan().all()
    assert torch.equal(counts.cpu(), want_counts)
    finite = want.isfinite()
    assert finite.sum() == 2 * num_classes - 2
    near(sums.cpu()[finite], want[finite], of_absolutes[finite], 1100)
    features[0, 1, 1098] = features[0, 1, 4] = 1.0
    sums, _ = kernels.add_up(features, labels, num_classes, None, False)
    assert sums[:2, 1].tolist() == [math.inf, math.inf]


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_that_float32_does_not_hold_is_infinite_alone(dtype):
    """As is one of finite features whose pieces add up to more; half of that is still held."""
    features = torch.tensor([3e38, 1.0, 3e38, -3e38, 2e38, -3e38, 1e38, 2.0]).to(dtype).view(1, 1, 8).to(DEVICE)
    labels = torch.tensor([[0, 1, 0, 2, 3, 2, 3, 1]], device=DEVICE)
    sums, _ = kernels.add_up(features, labels, 4, None, False)
    assert sums.flatten()[:3].tolist() == [math.inf, 3.0, -math.inf]
    assert sums[3, 0] == features.float()[0, 0, 4] + features.float()[0, 0, 6]


@runs_kernels
@settings(max_examples=70)
@given(cases(), st.booleans())
def test_spread_gives_each_pixel_the_row_of_its_class(case, channels_last):
    features, labels, num_classes, ignore_index, per_image = case
    images, channels = features.shape[:2]
    shape = (images, num_classes, channels) if per_image else (num_classes, channels)
    rows = torch.arange(math.prod(shape)).view(shape).remainder(97).add(1).to(features.dtype).to(DEVICE)
    got = kernels.spread(rows, labels, num_classes, ignore_index, per_image, channels_last)
    want = torch.zeros(labels.shape[0], channels, *labels.shape[1:], dtype=features.dtype)
    for image in range(images):
        for n, label in enumerate(labels[image].flatten().tolist()):
            if 0 <= label < num_classes and label != ignore_index:
                mine = rows[image, label] if per_image else rows[label]
                want[image].unsqueeze(-1).flatten(1)[:, n] = mine.cpu()
    assert torch.equal(got.cpu(), want)
    # The strides that the op's fake promises.
    lies = torch.empty(*labels.shape, channels).movedim(-1, 1) if channels_last else torch.empty(want.shape)
    assert got.stride() == lies.stride()


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pixels", [3, 1027, 2048, 2104])
def test_spread_over_several_blocks(dtype, pixels):
    """A plane of several programs, of which some write whole blocks without a mask, eight channels at a time."""
    labels = torch.randint(-1, 4, (2, pixels), device=DEVICE)
    rows = torch.randn(2, 3, 83).to(dtype).to(DEVICE)
    padded = torch.cat([rows, rows.new_zeros(2, 1, 83)], 1)
    for channels_last in (False, True):
        got = kernels.spread(rows, labels, 3, 1, True, channels_last)
        slots = labels.masked_fill((labels < 0) | (labels == 1), 3)
        assert torch.equal(got, torch.stack([table[slot].T for table, slot in zip(padded, slots)]))


@runs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("num_classes", [3, 300])
def test_several_spans_of_several_blocks(dtype, num_classes):
    """Long enough that a program sums over blocks and that images are cut into spans, the last one short."""
    features = torch.randn(2, 3, 4397).to(dtype).to(DEVICE)
    labels = torch.randint(0, num_classes, (2, 4397), device=DEVICE)
    for per_image in (False, True):
        options = (num_classes, 1, per_image)
        sums, counts = kernels.add_up(features, labels, *options)
        want, of_absolutes, want_counts = definition(features, labels, *options)
        assert torch.equal(counts.cpu(), want_counts)
        near(sums, want, of_absolutes, labels.numel())


@runs_kernels
@pytest.mark.parametrize(("image_stride", "pixel_stride"), [(16 * 70 + 3, 16), (18 * 70, 18), (24 * 70, 24)])
def test_channels_last_with_gaps(image_stride, pixel_stride):
    """Vectors of channels begin at a multiple of their length only where both strides are one."""
    around = torch.full((2 * image_stride,), math.nan, device=DEVICE)
    features = around.as_strided((2, 16, 70), (image_stride, 1, pixel_stride))
    features.copy_(torch.randn(2, 16, 70))
    labels = torch.randint(0, 3, (2, 70), device=DEVICE)
    for per_image in (False, True):
        sums, _ = kernels.add_up(features, labels, 3, None, per_image)
        want, of_absolutes, _ = definition(features, labels, 3, None, per_image)
        near(sums, want, of_absolutes, labels.numel())


@runs_kernels
@pytest.mark.parametrize("num_classes", [3, 300])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_crops_in_both_dimensions(dtype, channels_last, num_classes):
    around = torch.full((2, 17, 9, 12), math.nan, dtype=dtype, device=DEVICE)
    if channels_last:
        around = around.contiguous(memory_format=torch.channels_last)
    features = around[:, :, 1:7, 2:11]
    features.copy_(torch.randn(2, 17, 6, 9))
    labels = torch.randint(0, 3, (2, 6, 9), device=DEVICE)
    for per_image in (False, True):
        sums, counts = kernels.add_up(features, labels, num_classes, None, per_image)
        want, of_absolutes, want_counts = definition(features, labels, num_classes, None, per_image)
        assert torch.equal(counts.cpu(), want_counts)
        near(sums, want, of_absolutes, labels.numel())


@runs_kernels
def test_float32_is_not_rounded_to_fewer_bits():
    """A TF32 product keeps 11 bits and a bfloat16 product eight, but all 24 bits must be kept."""
    features = (1 + 2.0**-7 - torch.arange(1, 65) * 2.0**-23).view(1, 1, 64).to(DEVICE)
    labels = torch.arange(64, device=DEVICE).view(1, 64)
    sums, _ = kernels.add_up(features, labels, 64, None, False)
    assert torch.equal(sums.flatten(), features.flatten())


@runs_kernels
@of_all_bits
@pytest.mark.parametrize("num_classes", [19, 300])
@pytest.mark.parametrize("ignore_index", [None, 1, 255, -1, 2**32 + 1, -(2**63)])
def test_labels_are_compared_in_all_their_bits(dtype, values, num_classes, ignore_index):
    labels = torch.tensor([values], dtype=dtype, device=DEVICE)
    features = torch.arange(1.0, 1 + len(values), device=DEVICE).view(1, 1, -1)
    options = (num_classes, ignore_index, False)
    sums, counts = kernels.add_up(features, labels, *options)
    want, _, want_counts = definition(features, labels, *options)
    assert torch.equal(sums.cpu(), want.float())
    assert torch.equal(counts.cpu(), want_counts)
    rows = torch.ones(num_classes, 1, device=DEVICE)
    for channels_last in (False, True):
        assert kernels.spread(rows, labels, *options, channels_last).sum() == want_counts.sum()


@pytest.fixture(scope="module")
def vast():
    """Eight GiB of zeros in float16, of which only the touched pages take memory."""
    return torch.frombuffer(mapped(2**33 + 2**20), dtype=torch.float16)


@runs_kernels
@pytest.mark.skipif(GPU or sys.platform == "win32", reason="because it reads the memory of the CPU")
@pytest.mark.parametrize("num_classes", [3, 300])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_beyond_32_bits(vast, axis, num_classes):
    """Each axis in turn lies so far apart that an offset in 32 bits wraps round, into zeros before the features."""
    strides = [1, 1, 1]
    strides[axis] = 2**30 + 7
    sizes = [2, 2, 2]
    sizes[axis] = 3
    features = vast.as_strided(sizes, strides, 2**31)
    features.fill_(0)
    features.movedim(axis, 0)[2] = 5.0
    labels = torch.zeros(sizes[0], sizes[2], dtype=torch.uint8)
    sums, counts = kernels.add_up(features, labels, num_classes, None, False)
    want = features.float().sum((0, 2))
    assert want.any()
    assert torch.equal(sums[0], want)
    assert counts[0] == labels.numel()
    features.fill_(0)


def cropped_voxels():
    """Images of three dimensions with channels last, cropped in two of them."""
    return torch.randn(2, 4, 8, 6, 3).movedim(-1, 1)[..., 1:6, 2:5].to(DEVICE)


@runs_kernels
@pytest.mark.parametrize(
    ("features", "num_classes", "per_image"),
    [
        (cropped_voxels(), 3, True),
        (cropped_voxels()[:, :, :3], 3, False),
        (torch.randn(2, 3, 9).double().to(DEVICE), 3, True),
        (torch.randn(2, 0, 9).to(DEVICE), 3, True),
    ],
    ids=["cropped, per image", "cropped in all", "float64", "no channels"],
)
def test_what_the_kernels_do_not_serve_is_left_to_the_default_body(features, num_classes, per_image):
    labels = torch.randint(0, num_classes, (2, *features.shape[2:]), device=DEVICE)
    options = (num_classes, None, per_image)
    assert kernels.add_up(features, labels, *options) is None
    sums, counts = ops._add_up_on_cuda(features, labels, *options)
    want, of_absolutes, want_counts = definition(features, labels, *options)
    assert torch.equal(counts.cpu(), want_counts)
    near(sums.float(), want, of_absolutes, labels.numel())
    assert sums.dtype == (torch.float64 if features.dtype == torch.float64 else torch.float32)
    rows = sums.double()
    spread = ops._spread_on_cuda(rows, labels, *options, False)
    assert torch.equal(spread, ops._spread(rows, labels, *options, False))


@runs_kernels
def test_rows_that_spread_does_not_serve(monkeypatch):
    labels, rows = torch.zeros(1, 6, dtype=torch.int64, device=DEVICE), torch.ones(2, 3, device=DEVICE)
    options = (labels, 2, None, False, False)
    assert kernels.spread(rows.double(), *options) is None
    assert kernels.spread(rows, *options) is not None
    # As many pixels as 32 bits do not count.
    monkeypatch.setattr(kernels, "MOST_PIXELS", 6)
    assert kernels.spread(rows, *options) is None


def test_features_of_three_dimensions_are_served_where_they_lie_dense():
    features = cropped_voxels().contiguous()
    labels = torch.randint(0, 3, (2, *features.shape[2:]), device=DEVICE)
    sums, _ = kernels.add_up(features, labels, 3, None, True)
    want, of_absolutes, _ = definition(features, labels, 3, None, True)
    near(sums, want, of_absolutes, labels.numel())


@runs_kernels
def test_the_ops_use_the_kernels_on_cuda(monkeypatch):
    """The kernels' ops on CUDA call neither default body."""
    features, labels = torch.randn(2, 3, 9, device=DEVICE), torch.randint(0, 3, (2, 9), device=DEVICE)
    for name in ("class_sums", "spread_rows"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"semshift::{name}", "CUDA")
    monkeypatch.setattr(ops, "_add_up", None)
    monkeypatch.setattr(ops, "_spread", None)
    sums, _ = ops._add_up_on_cuda(features, labels, 3, None, False)
    assert torch.equal(sums, kernels.add_up(features, labels, 3, None, False)[0])
    spread = ops._spread_on_cuda(sums, labels, 3, None, False, False)
    assert torch.equal(spread, kernels.spread(sums, labels, 3, None, False, False))


@runs_kernels
def test_under_deterministic_algorithms_many_classes_are_left_to_the_default_body(monkeypatch):
    features, labels = torch.randn(2, 3, 9, device=DEVICE), torch.randint(0, 300, (2, 9), device=DEVICE)
    want = ops._add_up(features, labels, 300, None, False)
    monkeypatch.setattr(ops, "_add_up", lambda *_: want)
    assert ops._add_up_on_cuda(features, labels, 300, None, False)[0] is want[0]
    torch.use_deterministic_algorithms(False)
    sums, counts = ops._add_up_on_cuda(features, labels, 300, None, False)
    assert sums is not want[0]
    assert torch.equal(counts, want[1])


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_the_op_uses_them_with_the_same_bits_in_ten_runs(dtype, layout):
    features = laid_out(torch.randn(2, 256, 65, 129, device="cuda").to(dtype), layout).requires_grad_()
    labels = torch.randint(0, 20, (2, 65, 129), device="cuda")
    first = semshift.class_sums(features, labels, 19)
    want, of_absolutes, counts = definition(features.detach(), labels, 19, 255, False)
    assert torch.equal(first.mass.cpu(), counts)
    near(first.sums.detach(), want, of_absolutes, labels.numel())
    for _ in range(9):
        assert torch.equal(semshift.class_sums(features, labels, 19).sums, first.sums)
    (grad,) = torch.autograd.grad(first.sums, features, torch.ones_like(first.sums))
    assert torch.equal(grad, (labels < 19)[:, None].expand_as(grad).to(dtype))


@needs_gpu
@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    features = torch.zeros(3, 2**10, 2**20, dtype=torch.float16, device="cuda")
    features[2, -1, -1] = 3.0
    labels = torch.zeros(3, 2**20, dtype=torch.uint8, device="cuda")
    sums, counts = kernels.add_up(features, labels, 2, None, False)
    assert sums.sum() == sums[0, -1] == 3.0
    assert counts.tolist() == [3 * 2**20, 0]
    spread = kernels.spread(sums.half(), labels, 2, None, False, False)
    assert spread[2, -1, -1] == 3.0
    assert spread[2, -2].sum() == 0
