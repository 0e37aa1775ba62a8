"""Product of features and one-hot labels or weights on CUDA, added up over the pixels: kernel and launcher.

A program reads a span of pixels once and multiplies it by at most 64 classes. The last program of a column to finish
adds the partial sums in a fixed order, so sums are bit-identical on every run.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from semshift._label_triton import class_of
from semshift._planes import Plane, plan

__all__ = ["find_class", "product"]


def product(
    features: Tensor, by: Tensor, plane: Plane, rows: tuple[int, ...], per_image: bool, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Sums `[*rows, C]`, and counts if `by` is labels; `by` is weights `[B, K, N]` if it is floating point."""
    soft, aligned, channels = by.is_floating_point(), features.data_ptr() % 16 == 0, features.shape[1]
    vector = 16 // features.element_size()
    grid, size, arrivals, sizes = plan(
        plane, channels, rows[-1], per_image, soft, vector if aligned else 1, features.dtype, features.device
    )
    partial = features.new_empty(size, dtype=torch.float32)
    sums = features.new_empty((*rows, channels), dtype=torch.float32)
    # Counts and arrivals share one tensor, which is filled once.
    counted = 0 if soft else math.prod(rows)
    tallies = torch.zeros(counted + arrivals, dtype=torch.int64, device=features.device)
    interpreted = not isinstance(_product_kernel, triton.JITFunction)
    places = features, by, partial, sums, tallies, counted
    _product_kernel[grid](*places, *plane[1:], channels, INTERPRETED=interpreted, **sizes, **options)
    return sums, tallies[:counted].view(rows if counted else (0,))


@triton.jit
def find_class(labels, at, inside, num_classes, ignored, MASKED: tl.constexpr):
    """Class of each pixel, -1 where it has none."""
    if MASKED:
        key = class_of(tl.load(labels + at, mask=inside, other=0), num_classes, ignored, -1)
        return tl.where(inside, key, -1)
    else:
        return class_of(tl.load(labels + at), num_classes, ignored, -1)


@triton.jit
def _split(x):
    """A finite float32 as a sum of three pieces of eight bits each; truncated, not rounded, so that none overflows."""
    high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    rest = x - high
    middle = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high, middle, rest - middle


@triton.jit
def _dot(x, by, sums, INTERPRETED: tl.constexpr):
    """The product of values that bfloat16 or float16 hold exactly, added up in float32."""
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        return tl.dot(x.to(tl.float32), by.to(tl.float32), sums)
    return tl.dot(_narrow(x), by.to(x.dtype if x.dtype == tl.float16 else tl.bfloat16), sums)


@triton.jit
def _narrow(x):
    """A piece of `_split` as bfloat16, which is exact; any other dtype is unchanged."""
    if x.dtype == tl.float32:
        return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x


@triton.jit
def _add(x, by, high, middle, low, SOFT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Adds x times one-hot labels or weights to three accumulators, whose sum is the result."""
    if SOFT and x.dtype == tl.bfloat16:
        by_high, by_middle, by_low = _split(by)
        high, middle = _dot(x, by_high, high, INTERPRETED), _dot(x, by_middle, middle, INTERPRETED)
        low = _dot(x, by_low, low, INTERPRETED)
    elif SOFT:
        by_high, by_middle, by_low = _split(by)
        a, b, c = _split(x.to(tl.float32))
        high = _dot(a, by_high, high, INTERPRETED)
        middle = _dot(b, by_high, _dot(a, by_middle, middle, INTERPRETED), INTERPRETED)
        low = _dot(b, by_middle, _dot(a, by_low, low, INTERPRETED), INTERPRETED)
        low = _dot(b, by_low, low, INTERPRETED)
        low = _dot(c, by_middle, _dot(c, by_high, low, INTERPRETED), INTERPRETED)
    elif x.dtype == tl.float32:
        # One accumulator for each piece: on sm_103, some releases of Triton compute chained products into one
        # accumulator wrongly.
        a, b, c = _split(x)
        high, middle = _dot(a, by, high, INTERPRETED), _dot(b, by, middle, INTERPRETED)
        low = _dot(c, by, low, INTERPRETED)
    else:
        high = _dot(x, by, high, INTERPRETED)
    return high, middle, low


@triton.jit
def _read(
    features, by, n, inside, k, c_inside, pixels, width, row_stride, pixel_stride, num_classes, ignored,
    SOFT: tl.constexpr, FLAT: tl.constexpr, BY_PLANE: tl.constexpr, VECTOR: tl.constexpr,
    EVEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Features `[BLOCK_C, len(n)]` of the pixels n, and their one-hot labels or weights `[len(n), WIDE_K]`."""
    if not FLAT:
        at = (n // width).to(tl.int64) * row_stride + (n % width).to(tl.int64) * pixel_stride
    elif BY_PLANE:
        at = n
    else:
        at = n.to(tl.int64) * (pixel_stride // VECTOR * VECTOR)
    if MASKED:
        x = tl.load(features + at[None, :], mask=c_inside[:, None] & inside[None, :], other=0.0)
    elif EVEN:
        x = tl.load(features + at[None, :])
    else:
        x = tl.load(features + at[None, :], mask=c_inside[:, None], other=0.0)
    if SOFT:
        at_by = k.to(tl.int64)[None, :] * pixels + n[:, None]
        return x, tl.load(by + at_by, mask=(k < num_classes)[None, :] & inside[:, None], other=0.0)
    else:
        key = find_class(by, n, inside, num_classes, ignored, MASKED)
        # With `where`, since converting from a bool is slower.
        return x, tl.where(key[:, None] == k[None, :], 1.0, 0.0)


@triton.jit
def _piece(x, turn):
    """Piece `turn` (0 to 2) of finite x; turns 3 to 5 mark the x that are inf, -inf or nan."""
    finite = tl.abs(x) < float("inf")
    high, middle, low = _split(tl.where(finite, x, 0.0))
    piece = tl.where(turn == 0, high, tl.where(turn == 1, middle, low))
    mark = tl.where(turn == 3, x == float("inf"), tl.where(turn == 4, x == float("-inf"), x != x))
    return tl.where(turn < 3, piece, mark.to(tl.float32))


@triton.jit
def _gather(partial, tile, apart, count):
    """The sum of `count` partial sums in order, read from the second-level cache, where other programs wrote them."""
    sums = tl.zeros(tile.shape, dtype=tl.float32)
    # Four at a time, so that loads do not wait for each other. Triton 3.0 does not allow two loops over one variable.
    for _four in range(0, count // 4):
        for _one in tl.static_range(4):
            sums += tl.load(partial + tile, cache_modifier=".cg")
            partial += apart
    for _left in range(0, count % 4):
        sums += tl.load(partial + tile, cache_modifier=".cg")
        partial += apart
    return sums


# One compiled kernel works for all sizes; the code below shows Triton how wide a load may be.
_SIZES = [
    *("counted", "pixels", "width", "image_stride", "row_stride", "pixel_stride"),
    *("spans", "span", "tiles", "total", "heap", "num_classes", "ignored"),
]


@triton.jit(do_not_specialize=_SIZES)
def _product_kernel(
    features, by, partial, sums, tallies, counted,
    pixels, width, image_stride, row_stride, pixel_stride, channel_stride, channels,
    spans, span, tiles, total, heap, num_classes, ignored,
    SOFT: tl.constexpr, GROUPS: tl.constexpr, FLAT: tl.constexpr, BY_PLANE: tl.constexpr,
    STEP: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr, WIDE_K: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0) // GROUPS
    group = tl.program_id(0) % GROUPS
    tile = tl.program_id(1)
    image = (program // spans).to(tl.int64)
    start = (program % spans) * span
    k = group * WIDE_K + tl.arange(0, WIDE_K)
    columns = tiles * GROUPS
    table = (program // total).to(tl.int64)
    if SOFT:
        by += image * num_classes * pixels
    else:
        by += image * pixels
        if tile == tiles:
            # These programs count pixels. An int32 has one byte for each of four classes, enough for 255 turns.
            fours = group * (WIDE_K // 4) + tl.arange(0, WIDE_K // 4)
            stop = tl.minimum(start + span, pixels)
            for first in range(start, stop, 255 * 4 * BLOCK_N):
                last = tl.minimum(first + 255 * 4 * BLOCK_N, stop)
                counts = tl.zeros((WIDE_K // 4, 4 * BLOCK_N), dtype=tl.int32)
                for turn in range(first, last, 4 * BLOCK_N):
                    n = turn + tl.arange(0, 4 * BLOCK_N)
                    key = find_class(by, n, n < last, num_classes, ignored, True)
                    one = tl.full((4 * BLOCK_N,), 1, dtype=tl.int32) << (key & 3) * 8
                    counts += tl.where((key >> 2)[None, :] == fours[:, None], one[None, :], 0)
                # The order does not change a sum of integers.
                for byte in tl.static_range(4):
                    count, k_of_byte = tl.sum(counts >> byte * 8 & 255, 1).to(tl.int64), fours * 4 + byte
                    to = tallies + table * num_classes + k_of_byte
                    tl.atomic_add(to, count, mask=k_of_byte < num_classes, sem="relaxed")
            return
    i = tile // STEP * BLOCK_C + tl.arange(0, BLOCK_C)
    c = tile % STEP + i * STEP
    # Dividing and multiplying changes nothing, but lets Triton see a multiple: here, in `offset` and in `_read`.
    c_inside = c < (channels if BY_PLANE else channels // VECTOR * VECTOR)
    offset = image * image_stride + (tile % STEP).to(tl.int64) * channel_stride
    rows = i.to(tl.int64) * STEP * channel_stride
    lead = 0
    if BY_PLANE and VECTOR > 1:
        # All channels of this program have the same alignment: begin at a vector's border.
        lead = (offset % VECTOR).to(tl.int32)
        rows = tl.multiple_of(rows, VECTOR)
        by -= lead
    offset = (offset - lead) // VECTOR * VECTOR
    features += offset + rows[:, None]
    stop = tl.maximum(tl.minimum(start + span, pixels + lead), start)
    # Whole blocks of whole vectors need no mask. At either end, less than a vector is left.
    first_whole, last_whole = start, stop
    if BY_PLANE and VECTOR > 1:
        first_whole = tl.multiple_of(tl.where(lead > start, VECTOR, start), VECTOR)
        last_whole = tl.multiple_of(tl.maximum(stop // VECTOR * VECTOR, first_whole), VECTOR)
    unmasked = first_whole
    high = tl.zeros((BLOCK_C, WIDE_K), dtype=tl.float32)
    middle = tl.zeros((BLOCK_C, WIDE_K), dtype=tl.float32)
    low = tl.zeros((BLOCK_C, WIDE_K), dtype=tl.float32)
    if FLAT:
        unmasked += (last_whole - first_whole) // BLOCK_N * BLOCK_N
        for first in range(first_whole, unmasked, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            x, hot = _read(
                features, by, n, n >= 0, k, c_inside, pixels, width, row_stride, pixel_stride, num_classes,
                ignored, SOFT, FLAT, BY_PLANE, VECTOR, EVEN, False,
            )  # fmt: skip
            high, middle, low = _add(x, hot, high, middle, low, SOFT, INTERPRETED)
    for first in tl.range(unmasked, last_whole, BLOCK_N, num_stages=1):
        n = first + tl.arange(0, BLOCK_N)
        x, hot = _read(
            features, by, n, n < last_whole, k, c_inside, pixels, width, row_stride, pixel_stride, num_classes,
            ignored, SOFT, FLAT, BY_PLANE, VECTOR, EVEN, True,
        )  # fmt: skip
        high, middle, low = _add(x, hot, high, middle, low, SOFT, INTERPRETED)
    if BY_PLANE and VECTOR > 1:
        j = tl.arange(0, 16)
        n = tl.where(j < 8, start + j, last_whole + j - 8)
        inside = (n >= lead) & (n < stop) & ((j < 8) == (n < first_whole))
        x, hot = _read(
            features, by, n, inside, k, c_inside, pixels, width, row_stride, pixel_stride, num_classes, ignored,
            SOFT, FLAT, BY_PLANE, VECTOR, EVEN, True,
        )  # fmt: skip
        high, middle, low = _add(x, hot, high, middle, low, SOFT, INTERPRETED)
    added = high + (middle + low)
    if not SOFT:  # noqa: SIM102 - only what is known at compile time may be joined
        if tl.max((tl.abs(added) < float("inf")).to(tl.int32) ^ 1) > 0:
            # In a product, 0 * inf makes every class nan. So add the three pieces again without such values, then find
            # the classes of inf, -inf and nan. Each takes its own turn, since few registers are left.
            added = tl.zeros((BLOCK_C, WIDE_K), dtype=tl.float32)
            for turn in tl.range(0, 6, num_stages=1):
                found = tl.zeros((BLOCK_C, WIDE_K), dtype=tl.float32)
                for first in tl.range(start, stop, 16, num_stages=1):
                    n = first + tl.arange(0, 16)
                    x, hot = _read(
                        features, by, n, (n >= lead) & (n < stop), k, c_inside, pixels, width, row_stride, pixel_stride,
                        num_classes, ignored, SOFT, FLAT, BY_PLANE, VECTOR, EVEN, True,
                    )  # fmt: skip
                    found = _dot(_piece(x.to(tl.float32), turn), hot, found, INTERPRETED)
                value = tl.where(turn == 3, float("inf"), tl.where(turn == 4, float("-inf"), float("nan")))
                added += tl.where(turn < 3, found, tl.where(found > 0, value, 0.0))
    # A tile of partial sums is complete and contiguous, so it needs no mask.
    dense = tl.arange(0, BLOCK_C)[:, None] + tl.arange(0, WIDE_K)[None, :] * BLOCK_C
    inside = c_inside[:, None] & (k < num_classes)[None, :]
    column = tile * GROUPS + group
    partial += column * (BLOCK_C * WIDE_K)
    apart = columns.to(tl.int64) * (BLOCK_C * WIDE_K)
    heaps = tl.cdiv(total, heap)
    mine = program % total // heap
    first_of_heap = program - program % total % heap
    members = tl.minimum(heap, total - mine * heap)
    arrivals = tallies + counted + (table * columns + column) * (heaps + 1)
    sums += table * num_classes * channels
    to = k[None, :] * channels + c[:, None]
    tl.store(partial + program * apart + dense, added)
    # All stores of this program come before its arrival, so the last program to arrive sees the stores of all.
    tl.debug_barrier()
    if tl.atomic_add(arrivals + mine, 1, sem="acq_rel", scope="gpu") == members - 1:
        added = _gather(partial + first_of_heap * apart, dense, apart, members)
        if heaps == 1:
            tl.store(sums + to, added, mask=inside)
        else:
            partial += (tl.num_programs(0) // GROUPS + table * heaps) * apart
            tl.store(partial + mine * apart + dense, added)
            tl.debug_barrier()
            if tl.atomic_add(arrivals + heaps, 1, sem="acq_rel", scope="gpu") == heaps - 1:
                tl.store(sums + to, _gather(partial, dense, apart, heaps), mask=inside)
