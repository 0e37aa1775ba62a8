"""The memory layout of features and the launch plan of the pooling kernels: all that follows from shapes."""

import functools
import math
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

__all__ = ["FEW", "MOST_PIXELS", "Plane", "multiprocessors", "next_power", "plan", "plane_of"]

# Up to this number of classes, sums are added in a fixed order.
FEW = 256
# Kernels count pixels in 32 bits and may step past the last pixel.
MOST_PIXELS = 2**31 - 2**18
# A program has at least this number of pixels: with fewer, its partial sums cost more than it saves.
_PIXELS = 256
# One program adds up to this number of partial sums; more are added by several programs first.
_ADDED = 16
# The number of multiprocessors of an H100, for Triton's interpreter.
_MULTIPROCESSORS = 132


class Plane(NamedTuple):
    """Memory layout of each image's features: pixels in one dimension, or in two, the inner of size `width`."""

    images: int
    pixels: int
    width: int
    image_stride: int
    row_stride: int
    pixel_stride: int
    channel_stride: int

    @property
    def flat(self) -> bool:
        return self.pixels == self.width


def plane_of(features: Tensor, per_image: bool) -> Optional[Plane]:
    """The layout of features `[B, C, *S]`, with as few dimensions as the strides allow; None if two are not enough."""
    sizes, strides = features.shape, features.stride()
    merged: list[tuple[int, int]] = []
    for axis in (0, *range(2, len(sizes))):
        size, stride = sizes[axis], strides[axis]
        if (axis == 0 and per_image) or size == 1:
            continue
        if merged and merged[-1][1] == stride * size:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    images = (sizes[0], strides[0]) if per_image else (1, 0)
    if not per_image and len(merged) > 1:
        images, *merged = merged
    if len(merged) > 2:
        return None
    (height, row), (width, column) = [(1, 0)] * (2 - len(merged)) + merged
    if height * width >= MOST_PIXELS:
        return None
    return Plane(images[0], height * width, width, images[1], row, column, strides[1])


def next_power(number: int) -> int:
    """The next power of two. Triton's own function is a tenth as fast, which costs time at each launch."""
    return 1 << (number - 1).bit_length() if number > 1 else 1


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=256)
def plan(
    plane: Plane,
    channels: int,
    num_classes: int,
    per_image: bool,
    soft: bool,
    vector: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[tuple[int, int], int, int, dict[str, Any]]:
    """The launch plan: the grid, the numbers of partial sums and of arrivals, and the kernel's sizes.

    `vector` is the number of features in 128 bits, or 1 where the features are not aligned to 128 bits.
    """
    step, lead = 1, 0
    # Vectors are loaded if pixels or channels are contiguous, else single elements.
    by_plane = plane.flat and plane.pixel_stride == 1
    if by_plane:
        # Every `step`-th channel has the same alignment to vectors: a program takes these channels.
        step = vector // math.gcd(plane.channel_stride, vector)
        vector, step = (vector, step) if step <= channels else (1, 1)
        lead = vector if step > 1 or plane.image_stride % vector else 0
    elif (
        plane.channel_stride != 1
        or not plane.flat
        or any(of % vector for of in (channels, plane.pixel_stride, plane.image_stride))
    ):
        vector = 1
    # Weights, split into pieces, take more registers than one-hot labels.
    groups = -(-num_classes // (32 if soft else 64))
    wide_k = max(16, next_power(-(-num_classes // groups)))
    block_c = min(64, max(16, next_power(-(-channels // step))))
    block_n = 64 if dtype == torch.float32 or wide_k > 32 or soft else 128
    # Loads of single elements take more registers, and so do factors that are split into pieces.
    block_n = block_n if plane.flat and not soft else block_n // 2
    tiles = step * -(-channels // (step * block_c))
    pixels = plane.pixels + lead
    at_once = multiprocessors(device) * (4 if block_c <= 32 else 2)
    spans = _spans(tiles * groups * plane.images, at_once, max(1, pixels // _PIXELS))
    span = -(-pixels // (spans * block_n)) * block_n
    spans = -(-pixels // span)
    # The partial sums of a table of prototypes are divided into heaps. One program adds up each heap, and another adds
    # up the heaps' sums.
    tables, total = (plane.images, spans) if per_image else (1, plane.images * spans)
    heap = total if total <= _ADDED else math.ceil(math.sqrt(total))
    heaps = -(-total // heap)
    sizes = {
        "spans": spans,
        "span": span,
        "tiles": tiles,
        "total": total,
        "heap": heap,
        "SOFT": soft,
        "GROUPS": groups,
        "FLAT": plane.flat,
        "BY_PLANE": by_plane,
        "STEP": step,
        "VECTOR": vector,
        "EVEN": channels % (step * block_c) == 0,
        "WIDE_K": wide_k,
        "BLOCK_C": block_c,
        "BLOCK_N": block_n,
        "num_warps": 2 if block_c <= 32 else 4,
        "num_stages": 3,
        "enable_fp_fusion": True,
    }
    grid = (plane.images * spans * groups, tiles if soft else tiles + 1)
    partial = tables * (total + heaps if heaps > 1 else total) * tiles * groups * wide_k * block_c
    return grid, partial, tables * tiles * groups * (heaps + 1), sizes


def _spans(columns: int, at_once: int, most: int) -> int:
    """Number of spans of pixels in each column, chosen so that the last wave of programs is nearly full."""

    def worth(spans: int) -> float:
        waves = -(-spans * columns // at_once)
        # The share of the device that is busy. Each wave costs a tenth, for its additional partial sums.
        return spans * columns / (waves * at_once) - waves / 10

    return max((min(most, max(1, waves * at_once // columns)) for waves in range(1, 5)), key=worth)
