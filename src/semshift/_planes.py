"""Where features lie, and into which programs the kernels of pooling cut their work: all that follows from shapes."""

import functools
import math
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

__all__ = ["FEW", "MOST_PIXELS", "Plane", "multiprocessors", "next_power", "plan", "plane_of"]

# Up to so many classes are added in a fixed order.
FEW = 256
# Kernels count pixels in 32 bits, and step beyond the last.
MOST_PIXELS = 2**31 - 2**18
# Of a program at least: fewer pixels are not worth its partial sums.
_PIXELS = 256
# Up to so many partial sums are added by one program, more by several first.
_ADDED = 16
# Of the H100; what the interpreter is told.
_MULTIPROCESSORS = 132


class Plane(NamedTuple):
    """Where the features of each image lie: pixels in one dimension, or in two of which the inner has `width`."""

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
    """Features `[B, C, *S]` as images of one or two dimensions, as few as the strides allow; None if it takes more."""
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
    """Triton's own, a tenth as fast, is felt at each launch."""
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
    """The grid, how many partial sums and arrivals there are, and the kernel's sizes: all that follows from shapes.

    `vector` is how many features 128 bits hold, 1 where the first ones do not begin at a multiple of these.
    """
    step, lead = 1, 0
    # Pixels or channels lie side by side, or else every element is loaded for itself.
    by_plane = plane.flat and plane.pixel_stride == 1
    if by_plane:
        # Every so many channels lie alike to the borders of vectors: a program takes those.
        step = vector // math.gcd(plane.channel_stride, vector)
        vector, step = (vector, step) if step <= channels else (1, 1)
        lead = vector if step > 1 or plane.image_stride % vector else 0
    elif (
        plane.channel_stride != 1
        or not plane.flat
        or any(of % vector for of in (channels, plane.pixel_stride, plane.image_stride))
    ):
        vector = 1
    # Pieces of weights take more registers than one-hot labels.
    groups = -(-num_classes // (32 if soft else 64))
    wide_k = max(16, next_power(-(-num_classes // groups)))
    block_c = min(64, max(16, next_power(-(-channels // step))))
    block_n = 64 if dtype == torch.float32 or wide_k > 32 or soft else 128
    # What is read element by element, or as several pieces of either factor, takes more registers.
    block_n = block_n if plane.flat and not soft else block_n // 2
    tiles = step * -(-channels // (step * block_c))
    pixels = plane.pixels + lead
    at_once = multiprocessors(device) * (4 if block_c <= 32 else 2)
    spans = _spans(tiles * groups * plane.images, at_once, max(1, pixels // _PIXELS))
    span = -(-pixels // (spans * block_n)) * block_n
    spans = -(-pixels // span)
    # The partial sums of a table of prototypes: a heap is added by one program, and what the heaps leave by another.
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
    """How many spans of pixels each column is cut into, so that few programs are left to run alone at the end."""

    def worth(spans: int) -> float:
        waves = -(-spans * columns // at_once)
        # How busy the device is; more partial sums must be worth a tenth for each wave.
        return spans * columns / (waves * at_once) - waves / 10

    return max((min(most, max(1, waves * at_once // columns)) for waves in range(1, 5)), key=worth)
