"""The CUDA kernels against the definition: on a GPU where there is one, else on the CPU by Triton's interpreter."""

import math
import mmap
import sys

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import semshift
from semshift._pooling_ops import _add_up

pytest.importorskip("triton", reason="because the kernels need Triton")
import triton

from semshift import _pooling_triton as kernels

# The interpreter computes in NumPy, which warns of the arithmetic that non-finite features ask for.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning"),
    # Of NumPy 1, to the interpreter of Triton 3.0 and 3.1.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALF = (torch.float16, torch.bfloat16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
LAYOUTS = ("contiguous", "channels-last", "crop", "every-second", "channels-of-more", "transposed")
# Compiled against NumPy 1, those interpreters read the sizes of NumPy 2's dtypes wrongly, and with them other memory.
MISREADS = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 2) and int(numpy.__version__.split(".")[0]) > 1
runs_kernels = pytest.mark.skipif(
    not GPU and MISREADS, reason="because Triton's interpreter before 3.2 needs NumPy 1 (pip install 'numpy<2')"
)
needs_gpu = pytest.mark.skipif(not GPU, reason="because it needs a CUDA device")


def laid_out(features: Tensor, layout: str) -> Tensor:
    """The same values with other strides; what lies between them is NaN, so that reading it shows."""
    sizes = list(features.shape)
    if layout == "contiguous":
        return features
    if layout == "channels-last":
        return features.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return features.movedim(0, -1).contiguous().movedim(-1, 0)
    wider = {"crop": [0, 0, *[3] * (len(sizes) - 2)], "every-second": [*[0] * (len(sizes) - 1), sizes[-1]]}
    more = wider.get(layout, [0, 5, *[0] * (len(sizes) - 2)])
    around = features.new_full([a + b for a, b in zip(sizes, more)], math.nan)
    view = around[..., ::2] if layout == "every-second" else around[tuple(slice(0, n) for n in sizes)]
    view.copy_(features)
    return view


@st.composite
def cases(draw, dtypes=(*HALF, torch.float32), num_classes=(1, 2, 19, 33, 256, 257, 300)):
    """Features and labels of all sizes, also 0, 1 and more than a block; labels of any value."""
    images, channels = draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 3, 16, 17, 65]))
    extents = st.sampled_from([0, 1, 2, 5, 13])
    size = draw(st.lists(extents, max_size=2)) if draw(st.booleans()) else [draw(st.sampled_from([63, 64, 65, 131]))]
    classes, dtype = draw(st.sampled_from(num_classes)), draw(st.sampled_from(dtypes))
    integers = draw(st.sampled_from(INTEGERS))
    ignore_index = draw(st.sampled_from([None, 0, 255, -1, -100]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    features = torch.randn(images, channels, *size, generator=generator).to(dtype)
    labels = torch.randint(-2, classes + 3, (images, *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = ignore_index or 0
    layout = draw(st.sampled_from(LAYOUTS)) if size else "contiguous"
    features = laid_out(features.to(DEVICE), layout)
    labels = labels.to(integers).to(DEVICE)
    if draw(st.booleans()):
        labels = labels.repeat_interleave(2, 0)[::2]
    return features, labels, classes, ignore_index, draw(st.booleans())


def definition(features: Tensor, labels: Tensor, num_classes: int, ignore_index: int | None, per_image: bool):
    """Sums, sums of absolutes (float64) and counts, pixel by pixel."""
    images, channels = features.shape[:2]
    groups = images if per_image else 1
    sums = torch.zeros(2, groups, num_classes, channels, dtype=torch.float64)
    counts = torch.zeros(groups, num_classes, dtype=torch.int64)
    for image in range(images):
        x = features[image].double().cpu().unsqueeze(-1).flatten(1)
        for n, label in enumerate(labels[image].flatten().tolist()):
            if 0 <= label < num_classes and label != ignore_index:
                group = image if per_image else 0
                sums[:, group, label] += torch.stack([x[:, n], x[:, n].abs()])
                counts[group, label] += 1
    return (*sums, counts) if per_image else (*sums[:, 0], counts[0])


@runs_kernels
@settings(max_examples=60)
@given(cases())
def test_sums_equal_the_definition(case):
    features, labels, *_ = case
    if not kernels.takes(features):
        return
    sums, counts = kernels.add_up(*case)
    want, of_absolutes, want_counts = definition(*case)
    assert sums.dtype == torch.float32
    assert torch.equal(counts.cpu(), want_counts)
    # Any order of summation stays within this; a product with 0 or 1 rounds nothing.
    bound = labels.numel() * torch.finfo(torch.float32).eps * of_absolutes
    assert ((sums.double().cpu() - want).abs() <= bound).all()


@runs_kernels
@settings(max_examples=60)
@given(cases(dtypes=(torch.float32, torch.bfloat16)), st.lists(st.sampled_from([math.inf, -math.inf, math.nan])))
def test_a_non_finite_feature_reaches_its_own_class_alone(case, values):
    features, labels, *options = case
    if not kernels.takes(features):
        return
    generator = torch.Generator().manual_seed(len(values))
    for value in values if features.numel() else ():
        place = tuple(int(torch.randint(0, size, (), generator=generator)) for size in features.shape)
        features[place] = value
    sums, _ = kernels.add_up(features, labels, *options)
    want, of_absolutes, _ = definition(features, labels, *options)
    finite = want.isfinite()
    torch.testing.assert_close(sums.double().cpu()[~finite], want[~finite], rtol=0, atol=0, equal_nan=True)
    bound = labels.numel() * torch.finfo(torch.float32).eps * of_absolutes
    assert ((sums.double().cpu() - want).abs() <= bound)[finite].all()


@runs_kernels
@settings(max_examples=60)
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
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("num_classes", [3, 300])
def test_several_spans_of_several_blocks(dtype, num_classes):
    """Long enough that a program sums over blocks and that images are cut into spans, the last one short."""
    features = torch.randn(2, 3, 4133, dtype=torch.float64).to(dtype).to(DEVICE)
    labels = torch.randint(0, num_classes, (2, 4133), device=DEVICE)
    for per_image in (False, True):
        options = (num_classes, 1, per_image)
        sums, counts = kernels.add_up(features, labels, *options)
        # Some terms of the default body's are summed in float32 too, so both bounds count.
        want, want_counts = _add_up(features.double(), labels, *options)
        of_absolutes, _ = _add_up(features.double().abs(), labels, *options)
        assert torch.equal(counts, want_counts)
        assert ((sums - want).abs() <= 8266 * torch.finfo(torch.float32).eps * of_absolutes).all()


@runs_kernels
def test_float32_is_not_rounded_to_fewer_bits():
    """A product of TF32 keeps 11 bits, one of bfloat16 eight: all 24 are to come through."""
    features = (1 + torch.arange(64) * 2.0**-23).view(1, 1, 64).to(DEVICE)
    labels = torch.arange(64, device=DEVICE).view(1, 64)
    sums, _ = kernels.add_up(features, labels, 64, None, False)
    assert torch.equal(sums.flatten(), features.flatten())


@pytest.fixture(scope="module")
def vast():
    """Eight GiB of zeros in float16, of which only the touched pages take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, 2**33 + 2**20, flags=flags), dtype=torch.float16)


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


def test_more_than_two_strides_of_pixels_are_left_to_the_default_body():
    features = torch.zeros(2, 3, 4, 5, 6)[:, :, ::2, ::2, ::2]
    assert not kernels.takes(features)
    assert kernels.takes(features.contiguous())
    assert not kernels.takes(features.contiguous().double())


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_the_op_uses_them_with_the_same_bits_in_ten_runs(dtype, layout):
    features = laid_out(torch.randn(2, 256, 65, 129, device="cuda").to(dtype), layout).requires_grad_()
    labels = torch.randint(0, 20, (2, 65, 129), device="cuda")
    first = semshift.class_sums(features, labels, 19)
    want, of_absolutes, counts = definition(features.detach(), labels, 19, 255, False)
    assert torch.equal(first.mass.cpu(), counts)
    bound = labels.numel() * torch.finfo(torch.float32).eps * of_absolutes
    assert ((first.sums.double().cpu() - want).abs() <= bound).all()
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


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extra_memory_is_the_output_and_a_sixteenth_of_the_features(dtype):
    features = torch.randn(2, 2048, 65, 129, device="cuda").to(dtype)
    labels = torch.randint(0, 19, (2, 65, 129), device="cuda")
    semshift.class_sums(features, labels, 19)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sums = semshift.class_sums(features, labels, 19).sums
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= sums.nbytes + features.nbytes / 16
