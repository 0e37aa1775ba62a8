"""Shared parts of the kernel tests: the device, features in every layout, labels of any value, the definition."""

import importlib.metadata
import importlib.util
import math
import mmap

import numpy
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from semshift import _planes

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
LAYOUTS = (
    *("contiguous", "channels-last", "crop", "every-second", "transposed", "offset"),
    *("channels-of-more", "images-apart"),
)
# Compiled against NumPy 1, those interpreters read the sizes of NumPy 2's dtypes wrongly, and with them other memory.
# Not imported, since these tests are collected without it too.
TRITON = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "99"
MISREADS = [int(number) for number in TRITON.split(".")[:2]] < [3, 2] and int(numpy.__version__.split(".")[0]) > 1
runs_kernels = pytest.mark.skipif(
    not GPU and MISREADS, reason="because Triton's interpreter before 3.2 needs NumPy 1 (pip install 'numpy<2')"
)
# Labels at the ends of each dtype; the lower halves of the last ones are classes.
of_all_bits = pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (torch.uint8, [0, 128, 254, 255]),
        (torch.int8, [0, 127, -128, -1]),
        (torch.int16, [1, 2**15 - 1, -(2**15), -1, 257]),
        (torch.int32, [1, 2**31 - 1, -(2**31), -1, 2**16 + 1]),
        (torch.int64, [1, 2**63 - 1, -(2**63), -1, 2**32 + 1, -(2**32) + 1, 2**40]),
    ],
)
needs_gpu = pytest.mark.skipif(not GPU, reason="because it needs a CUDA device")
# The interpreter computes in NumPy, which warns of the arithmetic that non-finite features ask for.
QUIET = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    # Of NumPy 1, to the interpreter of Triton 3.0 and 3.1.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]


def laid_out(features: Tensor, layout: str) -> Tensor:
    """The same values with other strides; what lies between them is NaN, so that reading it shows."""
    sizes = list(features.shape)
    if layout == "channels-last":
        return features.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return features.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout in ("offset", "images-apart"):
        # They begin one element behind a border of 16 bytes, or each image lies one element further from it.
        apart = math.prod(sizes[1:]) + (layout == "images-apart")
        around = features.new_full((1 + sizes[0] * apart,), math.nan)
        start = int(layout == "offset")
        view = around.as_strided(sizes, (apart, *features[:1].contiguous().stride()[1:]), start)
    elif layout == "every-second":
        view = features.new_full([*sizes[:-1], 2 * sizes[-1]], math.nan)[..., ::2]
    elif layout in ("crop", "channels-of-more"):
        more = [0, 0, *[3] * (len(sizes) - 2)] if layout == "crop" else [0, 5, *[0] * (len(sizes) - 2)]
        around = features.new_full([a + b for a, b in zip(sizes, more)], math.nan)
        view = around[tuple(slice(0, n) for n in sizes)]
    else:
        return features
    view.copy_(features)
    return view


@st.composite
def shapes(draw):
    """`(B, C, *S)`: sizes of 0 and 1, odd ones, and more than a tile of pixels or channels."""
    images = draw(st.sampled_from([1, 2, 3, 0]))
    if draw(st.booleans()):
        size = draw(st.lists(st.sampled_from([5, 13, 2, 1, 0]), max_size=2))
        return images, draw(st.sampled_from([3, 17, 1, 16, 65, 0])), *size
    # In lines of which every 1, 2, 4 or 8 channels lie alike to the borders of vectors, or too few channels do.
    return images, draw(st.sampled_from([20, 9, 64, 140, 3])), draw(st.sampled_from([65, 63, 131, 7, 68, 128, 62, 300]))


@st.composite
def cases(draw, dtypes=FLOATS, num_classes=(19, 1, 2, 33, 64, 65, 150, 256, 257, 300)):
    """Features and labels, the arguments of `add_up`."""
    images, channels, *size = draw(shapes())
    classes, dtype = draw(st.sampled_from(num_classes)), draw(st.sampled_from(dtypes))
    integers = draw(st.sampled_from(INTEGERS))
    ignore_index = draw(st.sampled_from([None, 0, classes - 1, 255, -1, -100]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    features = torch.randn(images, channels, *size, generator=generator).to(dtype)
    labels = torch.randint(-2, classes + 3, (images, *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = ignore_index or 0
    features = laid_out(features.to(DEVICE), draw(st.sampled_from(LAYOUTS)) if size else "contiguous")
    labels = labels.to(integers).to(DEVICE)
    if draw(st.booleans()):
        labels = labels.repeat_interleave(2, 0)[::2]
    return features, labels, classes, ignore_index, draw(st.booleans())


def definition(features: Tensor, labels: Tensor, num_classes: int, ignore_index: int | None, per_image: bool):
    """Sums, sums of absolutes (float64) and counts, class by class."""
    images, channels = features.shape[:2]
    sums = torch.zeros(2, images if per_image else 1, num_classes, channels, dtype=torch.float64)
    counts = torch.zeros(sums.shape[1:3], dtype=torch.int64)
    for image in range(images):
        x, marks = (
            features[image].double().cpu().reshape(channels, labels[image].numel()),
            labels[image].flatten().cpu(),
        )
        for label in set(marks.tolist()) & set(range(num_classes)) - {ignore_index}:
            group, mine = image if per_image else 0, x[:, marks == label]
            sums[:, group, label] += torch.stack([mine.sum(1), mine.abs().sum(1)])
            counts[group, label] += mine.shape[1]
    return (*sums, counts) if per_image else (*sums[:, 0], counts[0])


def near(sums: Tensor, want: Tensor, of_absolutes: Tensor, terms: int) -> None:
    """Assert that float32 sums are within what any order of summation may round; a product with 0 or 1 is exact."""
    assert sums.dtype == torch.float32
    assert sums.shape == want.shape
    bound = terms * torch.finfo(torch.float32).eps * of_absolutes
    # Also false of NaN.
    assert ((sums.double().cpu() - want).abs() <= bound).all()


def cut_small(patch: pytest.MonkeyPatch, added: int, pixels: int) -> None:
    """Let so few partial sums be a heap, and so few pixels a span; else it takes many pixels to have several."""
    patch.setattr(_planes, "_ADDED", added)
    patch.setattr(_planes, "_PIXELS", pixels)
    # Without its cache.
    patch.setattr("semshift._product_triton.plan", _planes.plan.__wrapped__)


def mapped(nbytes: int) -> mmap.mmap:
    """Zeros, of which only the touched pages take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return mmap.mmap(-1, nbytes, flags=flags)
