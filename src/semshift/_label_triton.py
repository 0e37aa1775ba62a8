"""Class shares of cells on CUDA: the kernel, and a launcher with the signature of the default body.

A program computes neighbouring cells of one row for up to 32 classes, from the pixels that overlap these cells. Weights
are integers, so sums are exact in any order. On each axis the integer `unit` stands for a weight of 1.
"""

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from semshift._planes import next_power

__all__ = ["class_of", "ignored_class", "share_out", "takes"]

# Up to this size, a product of a position and a scale fits in 32 bits, and so does the sum of a line's weights.
_LARGEST = 32_000
_MOST_CLASSES = 2**20
# The lanes of a warp: they compute several cells, and several lanes share each cell.
_LANES = 32


def ignored_class(num_classes: int, ignore_index: Optional[int]) -> int:
    """The class that is ignored, or -1 if no class is. An id that is not a class is out of range anyway."""
    return ignore_index if ignore_index is not None and 0 <= ignore_index < num_classes else -1


def takes(labels: Tensor, height: int, width: int, num_classes: int) -> bool:
    """Whether the kernel supports these sizes; the default body supports all sizes."""
    return max(*labels.shape[1:], height, width) <= _LARGEST and num_classes <= _MOST_CLASSES


def share_out(
    labels: Tensor,
    height: int,
    width: int,
    num_classes: int,
    resample: str,
    align_corners: bool,
    ignore_index: Optional[int],
) -> Optional[Tensor]:
    """Weights `[B, K + 1, h, w]` in float64, as from the default body; None for unsupported sizes."""
    if not takes(labels, height, width, num_classes):
        return None
    images, lines, pixels = labels.shape
    shape = (images, num_classes + 1, height, width)
    if labels.numel() == 0:
        return labels.new_zeros(shape, dtype=torch.float64)
    shares = labels.new_empty(shape, dtype=torch.float64)
    if shares.numel() == 0:
        return shares
    area = resample == "area"
    # A lane reads about four pixels of a line; neighbouring lanes read the pixels between these.
    reached = -(-(pixels if area else 2 * pixels) // width)
    parts = min(_LANES, next_power(-(-reached // 4)))
    blocks = -(-width // (_LANES // parts))
    wide_k = min(32, next_power(num_classes + 1))
    _shares_kernel[(images * height * blocks, -(-(num_classes + 1) // wide_k))](
        labels,
        shares,
        *labels.stride(),
        lines,
        pixels,
        height,
        width,
        blocks,
        num_classes,
        ignored_class(num_classes, ignore_index),
        *_axis(lines, height, area, align_corners),
        *_axis(pixels, width, area, align_corners),
        AREA=area,
        WIDE_K=wide_k,
        CELLS=_LANES // parts,
        PARTS=parts,
        num_warps=1,
        enable_fp_fusion=True,
    )
    return shares


def _axis(pixels: int, cells: int, area: bool, align_corners: bool) -> tuple[int, int, int]:
    """`(scale, shift, unit)`: pixel x lies at `scale * x + shift`, and cell i at `unit * i`."""
    if area:
        # Positions are those of the left edges.
        return cells, 0, pixels
    if align_corners and cells > 1:
        return cells - 1, 0, max(pixels - 1, 1)
    # A single cell takes all pixels, with align_corners or without.
    return 2 * cells, cells - pixels, 2 * pixels


@triton.jit
def _reach(cell, pixels, scale, shift, unit, AREA: tl.constexpr):
    """The first pixel that may overlap a cell, and the end: one after the last."""
    # Quotients are rounded towards 0, so `maximum` also corrects negative quotients.
    first = cell * unit // scale if AREA else tl.maximum(((cell - 1) * unit - shift + scale) // scale, 0)
    return first, tl.minimum(((cell + 1) * unit - shift + scale - 1) // scale, pixels)


@triton.jit
def _weight(pixel, cell, cells, scale, shift, unit, AREA: tl.constexpr):
    if AREA:
        left = tl.maximum(pixel * scale, cell * unit)
        return tl.maximum(tl.minimum(pixel * scale + scale, cell * unit + unit) - left, 0)
    at = tl.minimum(tl.maximum(pixel * scale + shift, 0), (cells - 1) * unit)
    return tl.maximum(unit - tl.abs(at - cell * unit), 0)


@triton.jit
def class_of(label, num_classes, ignored, nowhere):
    """The class of each label; `nowhere` if it is ignored or out of range. Negative labels are large if unsigned."""
    narrow = label.to(tl.int32)
    known = label.to(tl.uint64) < num_classes if label.dtype == tl.int64 else narrow.to(tl.uint32) < num_classes
    return tl.where(known & (narrow != ignored), narrow, nowhere)


# One compiled kernel works for all sizes.
_SIZES = [
    *("image_stride", "line_stride", "lines", "pixels", "height", "width", "blocks", "num_classes", "ignored"),
    *("scale_y", "shift_y", "unit_y", "scale_x", "shift_x", "unit_x"),
]


@triton.jit(do_not_specialize=_SIZES)
def _shares_kernel(
    labels,
    shares,
    image_stride,
    line_stride,
    pixel_stride,
    lines,
    pixels,
    height,
    width,
    blocks,
    num_classes,
    ignored,
    scale_y,
    shift_y,
    unit_y,
    scale_x,
    shift_x,
    unit_x,
    AREA: tl.constexpr,
    WIDE_K: tl.constexpr,
    CELLS: tl.constexpr,
    PARTS: tl.constexpr,
):
    program = tl.program_id(0)
    block = program % blocks
    row = program // blocks % height
    image = (program // blocks // height).to(tl.int64)
    lane = tl.arange(0, CELLS * PARTS)
    cell = block * CELLS + lane // PARTS
    k = tl.program_id(1) * WIDE_K + tl.arange(0, WIDE_K)
    first, stop = _reach(cell, pixels, scale_x, shift_x, unit_x, AREA)
    most = tl.max(stop - first, 0)
    top, bottom = _reach(row, lines, scale_y, shift_y, unit_y, AREA)
    total = tl.zeros((WIDE_K, CELLS * PARTS), dtype=tl.int64)
    for step in range(0, most, PARTS):
        x = first + lane % PARTS + step
        from_ = labels + image * image_stride + x.to(tl.int64) * pixel_stride
        sums = tl.zeros((WIDE_K, CELLS * PARTS), dtype=tl.int32)
        for y in range(top, bottom):
            label = tl.load(from_ + y * line_stride.to(tl.int64), mask=x < stop, other=0)
            weight = _weight(y, row, height, scale_y, shift_y, unit_y, AREA)
            sums += tl.where(k[:, None] == class_of(label, num_classes, ignored, num_classes)[None, :], weight, 0)
        weight = tl.where(x < stop, _weight(x, cell, width, scale_x, shift_x, unit_x, AREA), 0)
        # No sum is negative. As unsigned, one instruction multiplies and adds.
        total += sums.to(tl.uint32).to(tl.int64) * weight[None, :]
    total = tl.sum(tl.reshape(total, (WIDE_K, CELLS, PARTS)), 2)
    share = total.to(tl.float64)
    if not AREA:
        share = share / (unit_y.to(tl.int64) * unit_x)
    column = block * CELLS + tl.arange(0, CELLS)
    to = shares + ((image * (num_classes + 1) + k.to(tl.int64)[:, None]) * height + row) * width + column[None, :]
    tl.store(to, share, mask=(k <= num_classes)[:, None] & (column < width)[None, :])
