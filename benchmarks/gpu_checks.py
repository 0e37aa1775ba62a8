"""The cases and checks of `on_gpu.py`: pooling on a device, compared with float64 on the same device."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

import semshift

__all__ = [
    "GRIDS",
    "ODD_SHAPES",
    "RESAMPLES",
    "SHAPES",
    "SMOKE_SHAPES",
    "Case",
    "Grid",
    "cases",
    "checks",
    "label_map",
    "made",
    "noise",
    "once",
    "other_checks",
    "pooled",
]

# Images, channels, height, width, classes.
SHAPES = (
    (4, 2048, 128, 129, 19),
    (8, 256, 256, 256, 19),
    (8, 64, 512, 512, 19),
    (8, 19, 512, 1024, 19),
    (8, 256, 256, 256, 60),
    (8, 512, 129, 257, 150),
    (4, 256, 256, 256, 2000),
    (2, 2048, 65, 129, 19),
    (2, 256, 128, 256, 19),
    (2, 19, 512, 1024, 19),
    (2, 256, 128, 256, 60),
    (2, 512, 65, 129, 150),
    (1, 256, 128, 128, 2000),
)
ODD_SHAPES = (
    (1, 1, 1, 1, 1),
    (3, 17, 5, 7, 19),
    (2, 65, 33, 65, 33),
    (2, 19, 31, 33, 19),
    (2, 96, 31, 33, 150),
    (2, 40, 64, 64, 256),
    (1, 3, 129, 127, 300),
)
SMOKE_SHAPES = ((2, 65, 9, 11, 19), (1, 19, 8, 16, 19), (1, 8, 6, 10, 300))
# Fewer pixels than any shape in the table.
SMALL = 2**14
RESAMPLES = ("bilinear", "area", "nearest", "majority")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Check = tuple[str, Callable[[], str]]
Shape = tuple[int, int, int, int, int]
# Images, channels, height and width of the features, height and width of the labels.
Grid = tuple[int, int, int, int, int, int]
GRIDS: tuple[Grid, ...] = ((2, 2048, 65, 129, 512, 1024), (8, 256, 128, 128, 512, 512))


@dataclass(frozen=True)
class Case:
    """Features and labels of one kind."""

    shape: Shape
    dtype: torch.dtype
    channels_last: bool
    per_image: bool = False

    def __str__(self) -> str:
        layout = "channels-last" if self.channels_last else "NCHW"
        return f"{', '.join(map(str, self.shape))} | {str(self.dtype)[6:]} | {layout}" + " | per image" * self.per_image

    @property
    def num_classes(self) -> int:
        """The last number of the shape."""
        return self.shape[-1]

    @property
    def ignore_index(self) -> int | None:
        """255, or None if 255 is the id of a class."""
        return 255 if self.num_classes <= 255 else None


def cases(smoke: bool) -> list[Case]:
    """All cases that are compiled and checked; the large ones only in the dtypes of the table."""
    both = ((SMOKE_SHAPES, DTYPES),) if smoke else ((SHAPES, DTYPES[:2]), (ODD_SHAPES, DTYPES))
    return [Case(*of) for given in both for of in itertools.product(*given, (False, True), (False, True))]


def label_map(images: int, height: int, width: int, num_classes: int, device: str) -> Tensor:
    """Labels in segments of 8 x 8 pixels, int64; 2 % are 255 if 255 is not a class."""
    generator = torch.Generator().manual_seed(height * width + num_classes)
    labels = torch.randint(0, num_classes, (images, -(-height // 8), -(-width // 8)), generator=generator).to(device)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :height, :width].contiguous()
    if num_classes <= 255:
        ignored = torch.rand(labels.shape, generator=generator) < 0.02
        labels[ignored.to(device)] = 255
    return labels


def noise(size: Sequence[int], device: str, seed: int = 0) -> Tensor:
    """Normal random numbers in float32."""
    # It uses its own generator, since the default one fails after a failed capture.
    return torch.randn(*size, device=device, generator=torch.Generator(device).manual_seed(seed))


def made(case: Case, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features and labels of a case. Labels are int64, or uint8 for small maps whose classes fit."""
    images, _, height, width, num_classes = case.shape
    features = noise(case.shape[:-1], device, seed).to(case.dtype)
    if case.channels_last:
        features = features.to(memory_format=torch.channels_last)
    labels = label_map(images, height, width, num_classes, device)
    return features, labels.to(torch.uint8) if labels.numel() < SMALL and num_classes <= 255 else labels


def once(case: Case, device: str) -> None:
    """Run every kernel that a case needs once."""
    features, labels = made(case, device)
    leaf = features.detach().requires_grad_()
    sums = pooled(leaf, labels, case).sums
    torch.autograd.grad(sums, leaf, torch.ones_like(sums))
    features[0, 0, 0, 0] = math.inf
    pooled(features, labels, case)
    if labels.numel() < SMALL and case.num_classes <= 64:
        finer = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
        for resample in RESAMPLES:
            semshift.class_sums(features, finer, case.num_classes, resample=resample)
    if device == "cuda":
        torch.cuda.synchronize()


def pooled(features: Tensor, labels: Tensor, case: Case) -> semshift.ClassSums:
    """Pool with semshift's `class_sums`."""
    options = {"ignore_index": case.ignore_index, "per_image": case.per_image}
    return semshift.class_sums(features, labels, case.num_classes, **options)


def checks(smoke: bool, device: str) -> Iterator[Check]:
    """Yield every check with its name. A check raises AssertionError, or returns a short note about its result."""
    for case in cases(smoke):
        yield str(case), lambda case=case: agrees(case, *made(case, device))
    yield from other_checks(smoke, device)


def other_checks(smoke: bool, device: str) -> Iterator[Check]:
    """Yield the checks that do more than pool each case once."""
    shape = (2, 65, 9, 11, 19) if smoke else (2, 256, 65, 129, 19)
    for dtype, channels_last in itertools.product(DTYPES, (False, True)):
        case = Case(shape, dtype, channels_last)
        yield f"not finite | {case}", lambda case=case: not_finite(case, device)
        for cropped in (case, Case(shape, dtype, channels_last, per_image=True)):
            yield f"a crop | {cropped}", lambda case=cropped: crop(case, device)
        for num_classes in (19, 150):
            repeated = Case((*shape[:-1], num_classes), dtype, channels_last)
            yield f"bit-identical in ten runs | {repeated}", lambda case=repeated: same_bits(case, device)
        if device == "cuda":
            yield f"in a CUDA graph | {case}", lambda case=case: in_a_graph(case)
    yield (
        "bit-identical in ten runs, 2000 classes, deterministic mode",
        lambda: same_bits(Case((*shape[:-1], 2000), torch.float32, False), device),
    )
    yield "a crop of three dimensions, per image", lambda: crop_of_three_dimensions(device)
    for rounded in (False, True):
        for grid in ((2, 32, 9, 17, 64, 128),) if smoke else ((2, 96, 65, 129, 512, 1024), (1, 32, 33, 20, 20, 33)):
            name = f"bilinear, TF32 {'on' if rounded else 'off'} | {', '.join(map(str, grid))}"
            yield name, lambda grid=grid, rounded=rounded: bilinear(grid, rounded, device)
    for resample in RESAMPLES:
        yield (
            f"labels on a different grid, {resample}, as on the CPU",
            lambda resample=resample: as_on_the_cpu(resample, smoke, device),
        )


def definition(features: Tensor, labels: Tensor, case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The float64 sums, sums of absolute values and counts of each class, and each pixel's row in a table.

    The table has one more row than there are classes, for ignored pixels.
    """
    groups, rows = (len(labels) if case.per_image else 1), case.num_classes + 1
    slots = torch.where(labels == case.ignore_index, case.num_classes, labels) if case.ignore_index else labels
    slots = slots.long()
    if case.per_image:
        slots = slots + rows * torch.arange(len(labels), device=labels.device).view(-1, *[1] * (labels.dim() - 1))
    pixels = features.detach().movedim(1, -1).flatten(0, -2).double()
    found = []
    for of in (pixels, pixels.abs()):
        found.append(pixels.new_zeros(groups * rows, pixels.shape[1]).index_add_(0, slots.flatten(), of))
    found.append(torch.bincount(slots.flatten(), minlength=groups * rows))
    sums, absolutes, counts = (of.unflatten(0, (groups, rows))[:, : case.num_classes] for of in found)
    return (sums, absolutes, counts, slots) if case.per_image else (sums[0], absolutes[0], counts[0], slots)


def agrees(case: Case, features: Tensor, labels: Tensor) -> str:
    """Check that counts are equal, sums are within n * eps * sum |x|, and the backward copies rows bit-identically.

    For large n that bound is loose. Therefore it is at most 1e-5 of sum |x|, which still reveals rounded features.
    """
    want, absolutes, counts, slots = definition(features, labels, case)
    leaf = features.detach().requires_grad_()
    # Deterministic mode fills new memory with NaN. With more classes it would also choose a different algorithm.
    torch.use_deterministic_algorithms(case.num_classes <= 256, warn_only=True)
    try:
        got = pooled(leaf, labels, case)
        rows = noise(want.shape, str(want.device), seed=1)
        (gradient,) = torch.autograd.grad(got.sums, leaf, rows.to(got.sums.dtype))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(got.mass, counts), "wrong counts"
    error = (got.sums.double() - want).abs()
    bound = (counts * torch.finfo(torch.float32).eps).clamp(max=1e-5)[..., None] * absolutes
    finite = want.isfinite()
    worst = (error - bound)[finite].max().item() if finite.any() else 0.0
    assert worst <= 0, f"off by {worst:.3g} more than the bound"
    strange = torch.where(finite, 0, got.sums.double()), torch.where(finite, 0, want)
    assert torch.allclose(*strange, rtol=0, atol=0, equal_nan=True), "wrong infinities or NaN"
    table = pad(rows.to(case.dtype), (0, 0, 0, 1)).flatten(0, -2)
    assert torch.equal(gradient, table[slots].movedim(-1, 1)), "a wrong gradient"
    share = (error / absolutes.clamp(min=1e-300))[finite]
    return f"{share.max().item() if share.numel() else 0:.1e} of sum |x|"


def not_finite(case: Case, device: str) -> str:
    """Check that infinity, minus infinity and NaN reach only their own classes and channels."""
    features, labels = made(case, device)
    for channel, value in enumerate((math.inf, -math.inf, math.nan)):
        features[-1, channel, channel, -1 - channel] = value
    return agrees(case, features, labels)


def crop(case: Case, device: str) -> str:
    """Check features that are cropped from larger ones, with NaN around the crop."""
    features, labels = made(case, device)
    around = pad(features, (3, 2, 1, 1), value=math.nan)
    if case.channels_last:
        around = around.to(memory_format=torch.channels_last)
    return agrees(case, around[..., 1:-1, 3:-2], labels)


def crop_of_three_dimensions(device: str) -> str:
    """Check features [B, C, D, H, W] in channels-last memory, cropped in two dimensions."""
    around = noise((2, 4, 9, 9, 3), device).permute(0, 4, 1, 2, 3)
    labels = torch.randint(0, 5, (2, 4, 5, 7), device=device)
    return agrees(Case((2, 3, 4, 5, 5), torch.float32, True, per_image=True), around[..., 1:6, 1:8], labels)


def same_bits(case: Case, device: str) -> str:
    """Check that ten runs give bit-identical sums; with more than 256 classes only in deterministic mode."""
    features, labels = made(case, device)
    torch.use_deterministic_algorithms(case.num_classes > 256, warn_only=True)
    try:
        first = pooled(features, labels, case).sums
        assert all(torch.equal(pooled(features, labels, case).sums, first) for _ in range(9)), "not bit-identical"
    finally:
        torch.use_deterministic_algorithms(False)
    return ""


def in_a_graph(case: Case) -> str:
    """Capture a forward and backward, and a bilinear forward, and replay them on other features."""
    features, labels = made(case, "cuda")
    finer = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)

    def run() -> list[Tensor]:
        rows = pooled(features, labels, case).sums.to(case.dtype)
        options = case.num_classes, case.ignore_index, False, case.channels_last
        spread = torch.ops.semshift.spread_rows(rows, labels, *options)
        return [rows, spread, semshift.class_sums(features, finer, case.num_classes).sums]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    features.copy_(made(case, "cuda", seed=1)[0])
    for _ in range(2):
        graph.replay()
    *exact, resampled = zip(captured, run())
    assert all(torch.equal(*of) for of in exact), "a replay gives different sums"
    most = 1e-5 * resampled[1].abs().max().item()
    assert torch.allclose(*resampled, rtol=0, atol=most), "a replay gives different bilinear sums"
    return ""


def bilinear(grid: Grid, rounded: bool, device: str) -> str:
    """Check pooling at the labels' size against float64 features that are resized to it.

    TF32 rounds 1 + 2^-12 to 1. The bound for arbitrary float32 features would not notice, so features of this value are
    pooled too.
    """
    images, _, height, width, *size = grid
    num_classes = 19
    features = noise(grid[:4], device)
    labels = label_map(images, *size, num_classes, device)
    large = interpolate(features.double(), tuple(size), mode="bilinear")
    want, _, counts, _ = definition(large, labels, Case((*large.shape, num_classes), torch.float64, False))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = rounded
    try:
        got = semshift.class_sums(features, labels, num_classes)
        fine = semshift.class_sums(torch.full_like(features, 1 + 2**-12), labels, num_classes)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert torch.equal(got.mass, counts), "wrong counts"
    # Roundings: adding n terms, float32 positions of up to h and w, and a product of weights for each cell.
    roundings = counts + 4 * (height + width) + height * width
    bound = (torch.finfo(torch.float32).eps * features.abs().max() * counts * roundings)[:, None]
    error = (got.sums - want).abs()
    assert (error <= bound).all(), f"off by {(error - bound).max().item():.3g} more than float32 explains"
    assert ((fine.means - (1 + 2**-12)).abs() <= 5e-5)[fine.present].all(), "features or weights were rounded"
    return f"{(error.max() / want.abs().max()).item():.1e} of the largest sum"


def as_on_the_cpu(resample: str, smoke: bool, device: str) -> str:
    """Compare label maps and class shares on grids of unrelated sizes with those of the CPU."""
    here = label_map(2, *((64, 128) if smoke else (512, 1024)), 19, "cpu")
    there = here.to(device)
    for size in ((9, 17), (65, 129), (100, 50)):
        if resample in ("nearest", "majority"):
            want, got = (semshift.resize_labels(of, size, 19, resample=resample) for of in (here, there))
            assert torch.equal(got.cpu(), want), f"{size}: different labels"
        else:
            want, got = (semshift.class_shares(of, size, 19, resample=resample) for of in (here, there))
            # The sums add exact weights in a different order, and are rounded once.
            torch.testing.assert_close(got.cpu(), want, rtol=4e-7, atol=1e-12)
    return ""
