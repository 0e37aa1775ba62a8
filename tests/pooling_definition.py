"""Pooling by its definition, in fractions and float64, and the cases that hypothesis draws for it."""

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

import semshift

HARD = (None, "nearest", "majority")
SOFT = ("area", "bilinear")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
NON_FINITE = (math.inf, -math.inf, math.nan)


class Case(NamedTuple):
    features: Tensor
    labels: Tensor
    num_classes: int
    options: dict[str, Any]

    def pool(self, features: Tensor | None = None, labels: Tensor | None = None, **more: Any) -> semshift.ClassSums:
        features = self.features if features is None else features
        labels = self.labels if labels is None else labels
        return semshift.class_sums(features, labels, self.num_classes, **{**self.options, **more})


def look_transposed(grid: Sequence[int], size: Sequence[int]) -> bool:
    """Aspect ratios that differ by more than two times, of grids with at least four cells a side."""
    ratio = Fraction(size[0], size[1]) / Fraction(grid[0], grid[1])
    return min(grid) >= 4 and max(ratio, 1 / ratio) > 2


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels-last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.repeat_interleave(2, -1)[..., ::2] if layout == "strided" else x


@st.composite
def cases(draw, modes=HARD + SOFT, per_image=None):
    """Features in eighths, of which every sum is exact in float64; sizes 0 and 1, any strides, any integer dtype."""
    mode = draw(st.sampled_from(modes))
    images, channels, num_classes = draw(st.integers(0, 3)), draw(st.integers(0, 3)), draw(st.integers(1, 4))
    extents = st.integers(1, 7) if mode else st.integers(0, 5)
    grid = draw(st.lists(extents, min_size=2 if mode else 0, max_size=2 if mode else 3))
    size = draw(st.lists(extents, min_size=2, max_size=2)) if mode else grid
    assume(not (mode and look_transposed(grid, size)))
    ignore_index = draw(st.sampled_from([255, -1, 0, 300, None]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    features = torch.randint(-99, 100, (images, channels, *grid), generator=generator).double() / 8
    labels = torch.randint(0, num_classes + (ignore_index is not None), (images, *size), generator=generator)
    labels[labels == num_classes] = ignore_index or 0
    fitting = [d for d in INTEGERS if torch.equal(labels.to(d).long(), labels)]
    labels = labels.to(draw(st.sampled_from(fitting)))
    if draw(st.booleans()):
        labels = labels.repeat_interleave(2, 0)[::2]
    options = {"ignore_index": ignore_index, "resample": mode}
    if mode == "bilinear":
        options["align_corners"] = draw(st.booleans())
    options["per_image"] = draw(st.booleans()) if per_image is None else per_image
    layout = draw(st.sampled_from(["contiguous", "channels-last", "strided"]))
    return Case(laid_out(features, layout), labels, num_classes, options)


def slots(case: Case) -> list[list[int]]:
    """Class of each label pixel, `num_classes` for none, image by image."""
    ignore_index = case.options["ignore_index"]
    rows = [image.flatten().tolist() for image in case.labels]
    return [[case.num_classes if v == ignore_index else v for v in row] for row in rows]


def axis(pixels: int, cells: int, mode: str, align_corners: bool = False) -> list[tuple[int, int, Fraction]]:
    """Every pixel and cell that meet along one axis, and the weight with which they do."""
    if mode == "nearest":
        return [(math.floor(Fraction((2 * j + 1) * pixels, 2 * cells)), j, Fraction(1)) for j in range(cells)]
    pairs = []
    for i in range(pixels):
        if mode == "bilinear":
            at = max(Fraction((2 * i + 1) * cells, 2 * pixels) - Fraction(1, 2), Fraction(0))
            at = Fraction(i * (cells - 1), max(pixels - 1, 1)) if align_corners else at
            at = min(at, Fraction(cells - 1))
            low = math.floor(at)
            pairs += [(i, low, 1 - (at - low)), (i, min(low + 1, cells - 1), at - low)]
            continue
        for j in range(cells):
            right = min(Fraction(i + 1, pixels), Fraction(j + 1, cells))
            pairs.append((i, j, cells * (right - max(Fraction(i, pixels), Fraction(j, cells)))))
    return [(i, j, w) for i, j, w in pairs if w > 0]


def shares(case: Case) -> list[dict[tuple[int, int], Fraction]]:
    """Image by image, the weight of each (class, cell), from the definition of each mode."""
    mode, nobody = case.options["resample"], case.num_classes
    if mode is None:
        return [{(k, cell): Fraction(1) for cell, k in enumerate(row)} for row in slots(case)]
    (height, width), (h, w) = case.labels.shape[1:], case.features.shape[2:]
    rows = axis(height, h, mode, case.options.get("align_corners", False))
    columns = axis(width, w, mode, case.options.get("align_corners", False))
    result = []
    for row in slots(case):
        weights: Counter = Counter()
        for y, i, a in rows:
            for x, j, b in columns:
                weights[row[y * width + x], i * w + j] += a * b
        if mode == "majority":
            # Ties go to the lower id, and to a class before ignoring, which is the last.
            winners = [max(range(nobody + 1), key=lambda k: (weights[k, cell], -k)) for cell in range(h * w)]
            weights = Counter({(k, cell): Fraction(1) for cell, k in enumerate(winners)})
        result.append(weights)
    return result


def definition(case: Case) -> tuple[Tensor, Tensor]:
    """Sums and mass per image, exact up to the last rounding."""
    images, channels = case.features.shape[:2]
    sums = torch.zeros(images, case.num_classes, channels, dtype=torch.float64)
    mass = torch.zeros(images, case.num_classes, dtype=torch.float64)
    for image, weights in enumerate(shares(case)):
        fields = [[Fraction(v) for v in channel.flatten().tolist()] for channel in case.features[image]]
        for k in range(case.num_classes):
            mine = [(cell, w) for (slot, cell), w in weights.items() if slot == k]
            mass[image, k] = float(sum(w for _, w in mine))
            for c, field in enumerate(fields):
                sums[image, k, c] = float(sum(w * field[cell] for cell, w in mine))
    return (sums, mass) if case.options["per_image"] else (sums.sum(0), mass.sum(0))


def bound(case: Case, scale: float | None = None) -> float:
    """0 where sums are exact; else n * eps * sum|w x|, each weight being some 8 roundings of cells away."""
    if case.options["resample"] not in SOFT:
        return 0.0
    cells, pixels = case.features[:, :1].numel(), case.labels.numel()
    most = case.features.abs().max().item() if scale is None and case.features.numel() else (scale or 0.0)
    return 8 * (cells + pixels) * torch.finfo(torch.float64).eps * max(cells, pixels) * most


def near(got: Tensor, want: Tensor, error: float) -> None:
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0, atol=error, equal_nan=True)
