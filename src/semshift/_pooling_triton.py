"""Pooling on CUDA: launchers with the signatures of the default bodies in `pooling`, and their kernels.

Features are read once, from where they lie. With up to 256 classes a program adds up a span of pixels by a product
with their one-hot labels and writes its partial sums, which are added in a fixed order: the same bits on every run.
With more classes the time must not grow with them, so sums are scattered by atomics.
"""

from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_up", "spread", "takes"]

# Partial sums are at most this share of what is read.
_SHARE = 64
_PROGRAMS = 1024
_FEW = 256


def takes(features: Tensor) -> bool:
    """Whether these kernels serve such features; the default body serves all others."""
    return features.dtype in (torch.float16, torch.bfloat16, torch.float32) and _planes(features, False) is not None


def add_up(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    ignore_index: Optional[int],
    per_image: bool,
) -> tuple[Tensor, Tensor]:
    """Sums `[(B,) K, C]` float32 and counts `[(B,) K]` int64."""
    channels = features.shape[1]
    rows = (features.shape[0], num_classes) if per_image else (num_classes,)
    planes = _planes(features, per_image)
    assert planes is not None, "the default body serves features of these strides"
    images, pixels = planes["images"], planes["pixels"]
    if images * pixels == 0:
        return features.new_zeros((*rows, channels), dtype=torch.float32), labels.new_zeros(rows, dtype=torch.int64)
    block_c = min(64, max(16, triton.next_power_of_2(channels)))
    options = {
        **planes,
        "channels": channels,
        "num_classes": num_classes,
        "ignore_index": -1 if ignore_index is None else ignore_index,
        "BLOCK_C": block_c,
    }
    blocks_c = max(1, triton.cdiv(channels, block_c))
    labels = labels.contiguous()
    if num_classes > _FEW:
        # The accumulator lies as the features do.
        by_pixel = features.stride(1) == 1
        sums = features.new_zeros((*rows, channels) if by_pixel else (channels, *rows), dtype=torch.float32)
        counts = labels.new_zeros(rows, dtype=torch.int64)
        block_n = 64
        spans = triton.cdiv(pixels, block_n)
        _scatter_kernel[(images * spans, blocks_c)](
            features,
            labels,
            sums,
            counts,
            spans=spans,
            rows_apart=num_classes if per_image else 0,
            row_stride=channels if by_pixel else 1,
            channel_stride=1 if by_pixel else counts.numel(),
            BLOCK_N=block_n,
            **options,
        )
        return (sums if by_pixel else sums.movedim(0, -1).contiguous()), counts
    wide_k = max(16, triton.next_power_of_2(num_classes))
    block_n = 64 if wide_k <= 64 else 32
    # Enough programs to fill a device, but spans so long that the partial sums stay small beside the features.
    least = triton.cdiv(_SHARE * num_classes * 4, features.element_size())
    spans = min(triton.cdiv(_PROGRAMS, images * blocks_c), triton.cdiv(pixels, max(block_n, least)))
    span = triton.cdiv(triton.cdiv(pixels, spans), block_n) * block_n
    spans = triton.cdiv(pixels, span)
    partial = features.new_empty((images, spans, num_classes, channels), dtype=torch.float32)
    counts = labels.new_empty((images, spans, num_classes), dtype=torch.int64)
    _product_kernel[(images * spans, blocks_c)](
        features,
        labels,
        partial,
        counts,
        spans=spans,
        span=span,
        INTERPRETED=not isinstance(_product_kernel, triton.JITFunction),
        WIDE_K=wide_k,
        BLOCK_N=block_n,
        **options,
    )
    if per_image:
        return partial.sum(1), counts.sum(1)
    return partial.flatten(0, 1).sum(0), counts.flatten(0, 1).sum(0)


def spread(
    rows: Tensor, labels: Tensor, num_classes: int, ignore_index: Optional[int], per_image: bool, channels_last: bool
) -> Tensor:
    """The row of each pixel's class, 0 where it has none; `[B, C, *S]`."""
    channels = rows.shape[-1]
    if channels_last:
        result = rows.new_empty((*labels.shape, channels)).movedim(-1, 1)
        table, row_stride, channel_stride = rows.contiguous(), channels, 1
    else:
        result = rows.new_empty((labels.shape[0], channels, *labels.shape[1:]))
        # For one channel, the rows of neighbouring pixels lie side by side.
        table = rows.movedim(-1, 0).contiguous()
        row_stride, channel_stride = 1, table[0].numel() if channels else 0
    if result.numel() == 0:
        return result
    planes = _planes(result, per_image)
    assert planes is not None, "a new tensor is not strided"
    block_c, block_n = (64, 64) if channels_last else (16, 256)
    block_c = min(block_c, triton.next_power_of_2(channels))
    spans = triton.cdiv(planes["pixels"], block_n)
    _spread_kernel[(planes["images"] * spans, triton.cdiv(channels, block_c))](
        table,
        labels.contiguous(),
        result,
        **planes,
        channels=channels,
        num_classes=num_classes,
        ignore_index=-1 if ignore_index is None else ignore_index,
        spans=spans,
        rows_apart=num_classes if per_image else 0,
        row_stride=row_stride,
        channel_stride=channel_stride,
        BLOCK_C=block_c,
        BLOCK_N=block_n,
    )
    return result


def _planes(features: Tensor, per_image: bool) -> Optional[dict[str, Any]]:
    """Features `[B, C, *S]` as images of one or two dimensions, as few as the strides allow; None if it takes more."""
    sizes, strides = [features.shape[0], *features.shape[2:]], [features.stride(0), *features.stride()[2:]]
    first = 1 if per_image else 0
    merged: list[tuple[int, int]] = []
    for size, stride in zip(sizes[first:], strides[first:]):
        if size == 1:
            continue
        if merged and merged[-1][1] == stride * size:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    images = [(sizes[0], strides[0])] if per_image else [(1, 0)]
    if not per_image and len(merged) > 1:
        images, merged = [merged[0]], merged[1:]
    if len(merged) > 2:
        return None
    merged = [(1, 0)] * (2 - len(merged)) + merged
    (height, row), (width, column) = merged
    return {
        "images": images[0][0],
        "pixels": height * width,
        "width": width,
        "image_stride": images[0][1],
        "row_pixels_stride": row,
        "pixel_stride": column,
        "feature_stride": features.stride(1),
        "FLAT": height == 1,
    }


@triton.jit
def _pixels_at(n, width, row_pixels_stride, pixel_stride, FLAT: tl.constexpr):
    n = n.to(tl.int64)
    if FLAT:
        return n * pixel_stride
    return (n // width) * row_pixels_stride + (n % width) * pixel_stride


@triton.jit
def _keys(labels, image, pixels, n, num_classes, ignore_index):
    """Class of each pixel, -1 where it has none; compared in int64, in which -1 is no class either."""
    label = tl.load(labels + image * pixels + n, mask=n < pixels, other=0).to(tl.int64)
    taking_part = (n < pixels) & (label >= 0) & (label < num_classes) & (label != ignore_index)
    return tl.where(taking_part, label, -1).to(tl.int32)


@triton.jit
def _product(x, hot, sums, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        return tl.dot(x.to(tl.float32), hot.to(tl.float32), sums)
    return tl.dot(x, hot.to(x.dtype), sums)


@triton.jit
def _product_kernel(
    features,
    labels,
    partial,
    counts,
    images,
    pixels,
    width,
    image_stride,
    row_pixels_stride,
    pixel_stride,
    feature_stride,
    channels,
    num_classes,
    ignore_index,
    spans,
    span,
    FLAT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    WIDE_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    image = program // spans
    start = (program % spans) * span
    # A span is whole blocks, so only the last pixel needs a mask: one that the compiler sees to be aligned, if it is.
    stop = tl.minimum(start + span, pixels)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, WIDE_K)
    base = features + image * image_stride + c.to(tl.int64)[:, None] * feature_stride
    sums = tl.zeros((BLOCK_C, WIDE_K), dtype=tl.float32)
    count = tl.zeros((WIDE_K,), dtype=tl.int64)
    for first in range(start, stop, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        at = _pixels_at(n, width, row_pixels_stride, pixel_stride, FLAT)
        x = tl.load(base + at[None, :], mask=(c < channels)[:, None] & (n < pixels)[None, :], other=0.0)
        hot = _keys(labels, image, pixels, n, num_classes, ignore_index)[:, None] == k[None, :]
        count += tl.sum(hot.to(tl.int64), 0)
        if x.dtype == tl.float32:
            # Three pieces of eight bits restore a float32, and a product with 0 or 1 rounds none of them.
            high = x.to(tl.bfloat16)
            rest = x - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            sums = _product(low, hot, sums, INTERPRETED)
            sums = _product(middle, hot, sums, INTERPRETED)
            sums = _product(high, hot, sums, INTERPRETED)
        else:
            sums = _product(x, hot, sums, INTERPRETED)
    finite = (tl.abs(sums) < float("inf")).to(tl.int32)
    if tl.min(tl.min(finite, 1), 0) == 0:
        # In a product, 0 * inf reaches every class: add again, class by class.
        sums = tl.zeros((BLOCK_C, WIDE_K), dtype=tl.float32)
        for first in range(start, stop, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            at = _pixels_at(n, width, row_pixels_stride, pixel_stride, FLAT)
            x = tl.load(base + at[None, :], mask=(c < channels)[:, None] & (n < pixels)[None, :], other=0.0)
            key = _keys(labels, image, pixels, n, num_classes, ignore_index)
            for one in range(0, num_classes):
                mine = tl.sum(tl.where((key == one)[None, :], x.to(tl.float32), 0.0), 1)
                sums += tl.where((k == one)[None, :], mine[:, None], 0.0)
    to = partial + (program * num_classes + k.to(tl.int64)[None, :]) * channels + c[:, None]
    tl.store(to, sums, mask=(c < channels)[:, None] & (k < num_classes)[None, :])
    if tl.program_id(1) == 0:
        tl.store(counts + program * num_classes + k, count, mask=k < num_classes)


@triton.jit
def _scatter_kernel(
    features,
    labels,
    sums,
    counts,
    images,
    pixels,
    width,
    image_stride,
    row_pixels_stride,
    pixel_stride,
    feature_stride,
    channels,
    num_classes,
    ignore_index,
    spans,
    rows_apart,
    row_stride,
    channel_stride,
    FLAT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    image = program // spans
    n = (program % spans) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = _pixels_at(n, width, row_pixels_stride, pixel_stride, FLAT)
    key = _keys(labels, image, pixels, n, num_classes, ignore_index)
    row = image * rows_apart + key
    from_ = features + image * image_stride + c.to(tl.int64)[:, None] * feature_stride + at[None, :]
    x = tl.load(from_, mask=(c < channels)[:, None] & (n < pixels)[None, :], other=0.0).to(tl.float32)
    to = sums + row[None, :] * row_stride + c.to(tl.int64)[:, None] * channel_stride
    tl.atomic_add(to, x, mask=(c < channels)[:, None] & (key >= 0)[None, :], sem="relaxed")
    if tl.program_id(1) == 0:
        ones = tl.full((BLOCK_N,), 1, dtype=tl.int64)
        tl.atomic_add(counts + row, ones, mask=key >= 0, sem="relaxed")


@triton.jit
def _spread_kernel(
    rows,
    labels,
    result,
    images,
    pixels,
    width,
    image_stride,
    row_pixels_stride,
    pixel_stride,
    feature_stride,
    channels,
    num_classes,
    ignore_index,
    spans,
    rows_apart,
    row_stride,
    channel_stride,
    FLAT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    image = program // spans
    n = (program % spans) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    key = _keys(labels, image, pixels, n, num_classes, ignore_index)
    row = image * rows_apart + key
    inside = (c < channels)[:, None] & (n < pixels)[None, :]
    from_ = rows + row[None, :] * row_stride + c.to(tl.int64)[:, None] * channel_stride
    x = tl.load(from_, mask=inside & (key >= 0)[None, :], other=0.0)
    at = _pixels_at(n, width, row_pixels_stride, pixel_stride, FLAT)
    to = result + image * image_stride + c.to(tl.int64)[:, None] * feature_stride + at[None, :]
    tl.store(to, x, mask=inside)
