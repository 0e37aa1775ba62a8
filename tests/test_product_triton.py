"""Weighted sums on CUDA against a float64 product, on a GPU where there is one, else interpreted; extra memory."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import semshift
from semshift import _soft_ops as ops
from tests.kernels import DEVICE, FLOATS, GPU, LAYOUTS, QUIET, cut_small, laid_out, near, needs_gpu, runs_kernels

pytest.importorskip("triton", reason="because the kernels need Triton")
from semshift import _pooling_triton as kernels
from semshift import _product_triton as product

pytestmark = [*QUIET, pytest.mark.usefixtures("multiples_are_checked")]

CLASSES = (19, 1, 33, 2, 150)


@st.composite
def cases(draw, num_classes=CLASSES):
    """Features `[B, C, N]` and weights `[B, K, N]`, four pixels at least for each class."""
    images, classes = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from(num_classes))
    # The interpreter takes long for many of all.
    channels = draw(st.sampled_from([20, 3, 17, 1, 64, 65, 140] if classes < 150 else [3, 20]))
    lines = [n for n in (131, 128, 7, 65, 63, 4) if n >= 4 * classes]
    pixels = draw(st.sampled_from(lines or [601, 608]))
    dtype, of_weights = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(FLOATS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    features = torch.randn(images, channels, pixels, generator=generator).to(dtype).to(DEVICE)
    weights = torch.randn(images, classes, pixels, generator=generator).to(of_weights).to(DEVICE)
    weights[torch.rand(weights.shape, generator=generator) < 0.3] = 0
    features = laid_out(features, draw(st.sampled_from(LAYOUTS)))
    return features, laid_out(weights, draw(st.sampled_from(["contiguous", "channels-last", "offset"])))


def definition(features: Tensor, weights: Tensor):
    """Sums `[B, K, C]` and sums of absolutes, in float64, class by class."""
    x, by = features.double().cpu(), weights.double().cpu()
    sums = torch.zeros(2, len(x), by.shape[1], x.shape[1], dtype=torch.float64)
    for k in range(by.shape[1]):
        weighted = x * by[:, k, None]
        sums[:, :, k] = torch.stack([weighted.sum(2), weighted.abs().sum(2)])
    return sums.unbind()


@runs_kernels
@settings(max_examples=24)
@given(cases(), st.sampled_from([16, 1, 2]), st.sampled_from([256, 16]))
def test_weighted_sums_equal_the_definition(case, added, pixels):
    """The bound is that of any order of summation, n * eps * sum|x * w|, n being 4 at least.

    A product of two float32 in three pieces of eight bits lacks the last of its nine parts, below 2^-30 of it, and
    every part is exact. The first accumulator adds n parts; what the other two add is below 2^-6 of sum|x * w|, and
    so rounded by so much less. With the two additions that join them, that is less than n * eps, where eps is twice
    what an addition rounds by.
    """
    features, weights = case
    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch, added, pixels)
        sums = kernels.multiply(features, weights)
    near(sums, *definition(features, weights), features.shape[2])


@runs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
def test_weighted_sums_of_several_spans_and_heaps(dtype):
    features, weights = torch.randn(2, 3, 4397).to(dtype).to(DEVICE), torch.rand(2, 2, 4397).to(DEVICE)
    near(kernels.multiply(features, weights), *definition(features, weights), 4397)


@runs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_piece_of_both_factors_comes_through(dtype):
    """Of factors whose first eight bits are ones, or the second eight, or these and the third eight."""
    ones = 1 + torch.tensor([1 - 2**-7, 2**-7 - 2**-15, 2**-7 - 2**-23])
    features, weights = torch.zeros(1, 3, 12), torch.zeros(1, 3, 12)
    features[0, :, 0] = weights[0, :, 0] = ones
    features, weights = features.to(dtype).to(DEVICE), weights.to(DEVICE)
    want, _ = definition(features, weights)
    # Little more than one rounding of 2^-24; the smallest product of pieces that counts is 2^-22 here.
    torch.testing.assert_close(kernels.multiply(features, weights).double().cpu(), want, rtol=2**-23, atol=0)


@runs_kernels
@pytest.mark.parametrize(
    ("features", "weights"),
    [
        (torch.randn(2, 3, 80).double(), torch.randn(2, 19, 80)),
        (torch.randn(2, 3, 80), torch.randn(2, 19, 80).double()),
        (torch.randn(2, 3, 75), torch.randn(2, 19, 75)),
        (torch.randn(1, 3, 1028), torch.randn(1, 257, 1028)),
        (torch.randn(2, 3, 80), torch.randn(2, 0, 80)),
        (torch.randn(2, 0, 80), torch.randn(2, 19, 80)),
        (torch.randn(0, 3, 80), torch.randn(0, 19, 80)),
        (torch.randn(2, 3, 0), torch.randn(2, 19, 0)),
    ],
    ids=[
        *("float64", "float64 weights", "few pixels", "many classes"),
        *("no classes", "no channels", "no images", "no pixels"),
    ],
)
def test_what_the_kernel_does_not_serve_is_left_to_the_default_body(features, weights):
    features, weights = features.to(DEVICE), weights.to(DEVICE)
    assert kernels.multiply(features, weights) is None
    near(ops._add_up_on_cuda(features, weights).float(), *definition(features, weights), features.shape[2])


class OnCuda(Tensor):
    is_cuda = True


@runs_kernels
@pytest.mark.parametrize(("capability", "served"), [((9, 0), True), ((10, 0), False), ((12, 1), False)])
def test_weights_are_left_to_the_default_body_on_later_devices(monkeypatch, capability, served):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(kernels, "product", lambda *_: ("served", None))
    features = torch.randn(1, 3, 80).as_subclass(OnCuda)
    assert (kernels.multiply(features, torch.randn(1, 19, 80)) == "served") == served


@runs_kernels
def test_the_op_uses_the_kernel_on_cuda(monkeypatch):
    features, weights = torch.randn(2, 3, 80, device=DEVICE), torch.rand(2, 19, 80, device=DEVICE)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("semshift::soft_class_sums", "CUDA")
    monkeypatch.setattr(ops, "_add_up", None)
    assert torch.equal(ops._add_up_on_cuda(features, weights), kernels.multiply(features, weights))


class Recorder:
    """Stands for the kernel: keeps the arguments of a launch, and runs `kernel` if there is one."""

    def __init__(self, kernel=None):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.arguments = arguments
            if self.kernel:
                self.kernel[grid](*arguments, **options)

        return launch


@runs_kernels
@pytest.mark.skipif(GPU, reason="because memory of a GPU is not filled with NaN")
@pytest.mark.parametrize("num_classes", [3, 150])
@pytest.mark.parametrize("per_image", [False, True])
def test_every_partial_sum_lies_in_the_memory_that_is_theirs(num_classes, per_image, monkeypatch):
    """With several heaps all of it is written to: one that was stored behind it would leave NaN within."""
    recorder = Recorder(product._product_kernel)
    monkeypatch.setattr(product, "_product_kernel", recorder)
    cut_small(monkeypatch, 2, 16)
    labels = torch.randint(0, num_classes, (3, 300))
    kernels.add_up(torch.randn(3, 20, 300), labels, num_classes, None, per_image)
    assert recorder.arguments[2].isfinite().all()


@runs_kernels
def test_one_program_counts_more_pixels_than_its_bytes_hold(monkeypatch):
    cut_small(monkeypatch, 16, 2**20)
    labels = torch.zeros(1, 66_001, dtype=torch.uint8, device=DEVICE)
    labels[:, -1] = 3
    sums, counts = kernels.add_up(labels[:, None] + 1.0, labels, 5, None, False)
    assert counts.tolist() == [66_000, 0, 0, 1, 0]
    assert sums.flatten().tolist() == [66_000, 0, 0, 4, 0]


# Those of docs/benchmarks.md of 16 MB and more.
SHAPES = [
    *((4, 2048, 128, 129), (8, 256, 256, 256), (8, 64, 512, 512), (8, 19, 512, 1024), (8, 512, 129, 257)),
    *((2, 2048, 65, 129), (2, 256, 128, 256), (2, 19, 512, 1024), (2, 512, 65, 129)),
]


def extra(shape, dtype, layout, num_classes, per_image, monkeypatch):
    """Bytes of a call beside its results, and those of the features, none of which are made."""
    recorder = Recorder()
    monkeypatch.setattr(product, "_product_kernel", recorder)
    features = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=layout)
    labels = torch.empty((shape[0], *shape[2:]), dtype=torch.int64, device="meta")
    kernels.add_up(features, labels, num_classes, 255, per_image)
    _, _, partial, _, tallies = recorder.arguments[:5]
    return partial.nbytes + tallies.nbytes, features.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_up_to_32_classes_need_a_sixteenth_of_the_features(shape, layout, dtype, monkeypatch):
    """Or 3 MiB, if that is more: a tile of partial sums for each program that the device runs at once."""
    for num_classes, per_image in itertools.product((1, 19, 32), (False, True)):
        nbytes, of_features = extra(shape, dtype, layout, num_classes, per_image, monkeypatch)
        assert nbytes <= max(of_features / 16, 3 * 2**20)


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
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= sums.nbytes + features.nbytes / 16
