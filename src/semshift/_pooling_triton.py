"""Pooling on CUDA: kernels, and launchers with the signatures of the default bodies.

Features are read once and not copied. With up to 256 classes, a program multiplies a span of pixels by the one-hot
labels of at most 64 classes. The last program of a column adds the partial sums in a fixed order, so sums are
bit-identical on every run. With more classes, the time must not grow with their number, so the kernel adds by atomics.
"""

import math
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from semshift._label_triton import ignored_class
from semshift._planes import FEW, MOST_PIXELS, multiprocessors, next_power, plane_of
from semshift._product_triton import find_class, product

__all__ = ["add_up", "multiply", "spread"]


def add_up(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: Optional[int], per_image: bool
) -> Optional[tuple[Tensor, Tensor]]:
    """Sums `[(B,) K, C]` float32 and counts `[(B,) K]` int64; None for an unsupported dtype or strides."""
    plane, channels = plane_of(features, per_image), features.shape[1]
    if plane is None or channels == 0 or features.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return None
    rows = (len(features), num_classes) if per_image else (num_classes,)
    if plane.images * plane.pixels == 0:
        return features.new_zeros((*rows, channels), dtype=torch.float32), labels.new_zeros(rows, dtype=torch.int64)
    labels = labels.contiguous()
    labelling = {"num_classes": num_classes, "ignored": ignored_class(num_classes, ignore_index)}
    if num_classes > FEW:
        sums = features.new_zeros((*rows, channels), dtype=torch.float32)
        counts = labels.new_zeros(rows, dtype=torch.int64)
        # Where pixels are contiguous, a tile is transposed in registers, and a larger tile would take too many.
        block_c, block_n = min(64, next_power(channels)), 64 if plane.channel_stride == 1 else 32
        blocks = -(-plane.pixels // block_n)
        _scatter_kernel[(plane.images * blocks, -(-channels // block_c))](
            features,
            labels,
            sums,
            counts,
            *plane[1:],
            channels,
            blocks,
            num_classes if per_image else 0,
            **labelling,
            FLAT=plane.flat,
            BLOCK_C=block_c,
            BLOCK_N=block_n,
            enable_fp_fusion=True,
        )
        return sums, counts
    return product(features, labels, plane, rows, per_image, labelling)


def multiply(features: Tensor, weights: Tensor) -> Optional[Tensor]:
    """The product of `[B, C, N]` and `[B, K, N]`, summed over N: `[B, K, C]` float32; None to use the default body."""
    num_classes, pixels = weights.shape[1:]
    narrow = features.dtype in (torch.float16, torch.bfloat16, torch.float32) and weights.dtype != torch.float64
    plane = plane_of(features, True)
    # The backward of the op calls this function too, with few pixels and many classes. The default body computes that
    # as an ordinary matrix product.
    if not narrow or plane is None or not 0 < num_classes <= min(FEW, pixels // 4) or features.numel() == 0:
        return None
    # Each accumulator takes several products, which some releases of Triton compute wrongly on newer devices.
    if features.is_cuda and torch.cuda.get_device_capability(features.device) >= (10, 0):
        return None
    rows = (len(features), num_classes)
    labelling = {"num_classes": num_classes, "ignored": -1}
    sums, _ = product(features, weights.float().contiguous(), plane, rows, True, labelling)
    return sums


def spread(
    rows: Tensor, labels: Tensor, num_classes: int, ignore_index: Optional[int], per_image: bool, channels_last: bool
) -> Optional[Tensor]:
    """The row of each pixel's class, 0 where it has none; `[B, C, *S]`. None for an unsupported dtype or size."""
    if rows.dtype == torch.float64 or labels.numel() >= MOST_PIXELS:
        return None
    images, channels = labels.shape[0], rows.shape[-1]
    if channels_last:
        result = rows.new_empty((*labels.shape, channels)).movedim(-1, 1)
    else:
        result = rows.new_empty((images, channels, *labels.shape[1:]))
    if result.numel() == 0:
        return result
    pixels = result[0, 0].numel()
    labelling = {"num_classes": num_classes, "ignored": ignored_class(num_classes, ignore_index)}
    if channels_last:
        if not per_image:
            images, pixels = 1, images * pixels
        block_c, block_n = min(64, next_power(channels)), 64
        blocks = -(-pixels // block_n)
        _spread_rows_kernel[(images * blocks, -(-channels // block_c))](
            rows.contiguous(),
            labels.contiguous(),
            result,
            pixels,
            channels,
            blocks,
            **labelling,
            BLOCK_C=block_c,
            BLOCK_N=block_n,
            enable_fp_fusion=True,
        )
        return result
    # A row of the table has all classes of a channel, and 0 for pixels without a class.
    table = rows.new_zeros((*rows.shape[:-2], channels, next_power(num_classes + 1)))
    table[..., :num_classes] = rows.mT
    vector = 16 // rows.element_size()
    step = vector // math.gcd(pixels, vector)
    block_n = 128 * vector
    blocks = -(-(pixels + (vector if step > 1 else 0)) // block_n)
    # Channels of one program, which reads its labels once: few enough that the programs fill the device.
    a_program = max(16, min(64, next_power(channels * images * blocks // (16 * multiprocessors(rows.device)) + 1)))
    _spread_planes_kernel[(images * blocks, step * -(-channels // (step * a_program)))](
        table,
        labels.contiguous(),
        result,
        pixels,
        channels,
        blocks,
        table[0].numel() if per_image else 0,
        a_program,
        **labelling,
        NOWHERE=table.shape[-1] - 1,
        STEP=step,
        VECTOR=vector,
        BLOCK_N=block_n,
        enable_fp_fusion=True,
    )
    return result


# One compiled kernel works for all sizes except those that decide how wide a load may be.
_SIZES = ["blocks", "num_classes", "ignored"]


@triton.jit(do_not_specialize=[*_SIZES, "width", "row_stride", "rows_apart"])
def _scatter_kernel(
    features, labels, sums, counts,
    pixels, width, image_stride, row_stride, pixel_stride, channel_stride, channels,
    blocks, rows_apart, num_classes, ignored,
    FLAT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    n = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if FLAT:
        at = n.to(tl.int64) * pixel_stride
    else:
        at = (n // width).to(tl.int64) * row_stride + (n % width).to(tl.int64) * pixel_stride
    key = find_class(labels + image * pixels, n, n < pixels, num_classes, ignored, True)
    row = image * rows_apart + key
    from_ = features + image * image_stride + c.to(tl.int64)[:, None] * channel_stride + at[None, :]
    x = tl.load(from_, mask=(c < channels)[:, None] & (n < pixels)[None, :], other=0.0).to(tl.float32)
    # A row of sums is contiguous, so a warp adds the channels of a pixel in one transaction.
    to = sums + row[None, :] * channels + c[:, None]
    tl.atomic_add(to, x, mask=(c < channels)[:, None] & (key >= 0)[None, :], sem="relaxed")
    if tl.program_id(1) == 0:
        tl.atomic_add(counts + row, tl.full((BLOCK_N,), 1, dtype=tl.int64), mask=key >= 0, sem="relaxed")


@triton.jit(do_not_specialize=[*_SIZES, "pixels"])
def _spread_rows_kernel(
    rows, labels, result, pixels, channels, blocks, num_classes, ignored,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    n = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    key = find_class(labels + image * pixels, n, n < pixels, num_classes, ignored, True)
    inside = (c < channels)[None, :] & (n < pixels)[:, None]
    from_ = rows + (image * num_classes + key)[:, None] * channels + c[None, :]
    x = tl.load(from_, mask=inside & (key >= 0)[:, None], other=0.0)
    tl.store(result + (image * pixels + n)[:, None] * channels + c[None, :], x, mask=inside)


@triton.jit(do_not_specialize=[*_SIZES, "pixels", "channels", "table_apart", "a_program"])
def _spread_planes_kernel(
    table, labels, result, pixels, channels, blocks, table_apart, a_program, num_classes, ignored,
    NOWHERE: tl.constexpr, STEP: tl.constexpr, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`table` is `[(B,) C, NOWHERE + 1]`; its last column is for pixels without a class."""
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    # All channels of this program have the same alignment: begin at a vector's border.
    residue, part = tl.program_id(1) % STEP, tl.program_id(1) // STEP
    offset = image * channels * pixels + residue.to(tl.int64) * pixels
    lead = (offset % VECTOR).to(tl.int32)
    offset = tl.multiple_of(offset - lead, VECTOR)
    # Dividing and multiplying changes nothing, but lets Triton see a multiple.
    apart = pixels.to(tl.int64) * STEP // VECTOR * VECTOR
    labels += image * pixels - lead
    stop = pixels + lead
    n = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    key = find_class(labels, n, (n >= lead) & (n < stop), num_classes, ignored, True)
    key = tl.where(key < 0, NOWHERE, key)
    first = part * a_program
    count = tl.minimum(a_program, tl.cdiv(channels - residue, STEP) - first)
    # No address per pixel: Triton moves keys to the threads that store them before the loop, but moves addresses inside
    # the loop.
    from_ = table + image * table_apart + (residue + first.to(tl.int64) * STEP) * (NOWHERE + 1)
    to = result + offset + first * apart
    # Whole vectors: the pixels of each share a mask.
    whole = (n // VECTOR >= tl.cdiv(lead, VECTOR)) & (n // VECTOR < stop // VECTOR)
    line = to + n
    for i in range(0, count // 8 * 8, 8):
        for j in tl.static_range(8):
            tl.store(line, tl.load(from_ + (i + j) * STEP * (NOWHERE + 1) + key), mask=whole)
            line += apart
    for i in range(count // 8 * 8, count):
        tl.store(line, tl.load(from_ + i * STEP * (NOWHERE + 1) + key), mask=whole)
        line += apart
    if (program % blocks == blocks - 1) & ((lead > 0) | (stop % VECTOR > 0)):
        # At either end, less than a vector is left.
        side = tl.arange(0, 2 * VECTOR)
        m = tl.where(side < VECTOR, side, stop // VECTOR * VECTOR + side - VECTOR)
        left = (m >= lead) & (m < stop) & ((side < VECTOR) == (m < tl.cdiv(lead, VECTOR) * VECTOR))
        its_key = find_class(labels, m, left, num_classes, ignored, True)
        its_key = tl.where(its_key < 0, NOWHERE, its_key)
        for i in range(0, count, 16):
            row = (i + tl.arange(0, 16))[:, None]
            inside = (row < count) & left[None, :]
            x = tl.load(from_ + row * STEP * (NOWHERE + 1) + its_key[None, :], mask=inside, other=0.0)
            tl.store(to + row * apart + m[None, :], x, mask=inside)
