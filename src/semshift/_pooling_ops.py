"""Ops of pooling: bodies, fakes and backward. Their callers have checked all arguments except the labels' values.

`semshift::class_sums` adds features up by label, and `semshift::spread_rows` is its adjoint.
"""

import math
from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from semshift._kernels import launched
from semshift._label_ops import class_slots
from semshift._planes import FEW
from semshift._soft_ops import sum_dtype
from semshift._transforms import transformed

__all__ = ["hard_sums"]

# Half-precision elements that are converted to float32 at a time, so that the copies stay in the cache.
_BLOCK = 2**18
# On the CPU, up to this number of elements, fewer steps save more than a copy of the features costs.
_SMALL = 2**17
# Up to this number of channels, sorting pixels by class costs less than adding them in their own order.
_NARROW = 512
# Up to this number of classes, four sums per class cost less than waiting for a single sum.
_TURNED = 256


def hard_sums(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: Optional[int], per_image: bool
) -> tuple[Tensor, Tensor]:
    """Sums `[(B,) K, C]` of the features of each class, and its number of pixels."""
    # For a small call, the dispatch to an op costs more than all of the arithmetic.
    plain = not torch.compiler.is_compiling() and type(features) is Tensor and features.is_cpu
    if plain and transformed(features):
        return _definition(features, labels, num_classes, ignore_index, per_image)
    unseen = not (features.requires_grad and torch.is_grad_enabled())
    body = _add_up if plain and (unseen or _is_small(features)) else _class_sums
    sums, mass = body(features, labels, num_classes, ignore_index, per_image)
    return sums, mass


def _is_small(features: Tensor) -> bool:
    # Copying costs more if the channels of a pixel are not contiguous.
    return features.is_cpu and features.numel() <= (_SMALL if features.stride(1) == 1 else _SMALL // 2)


def _add_up_at_once(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: Optional[int], per_image: bool
) -> tuple[Tensor, Tensor]:
    """The definition in the fewest steps, which autograd can differentiate."""
    keys, num_rows = _keys(class_slots(labels, num_classes, ignore_index, check=True), num_classes, per_image)
    flat, dtype = keys.flatten(), sum_dtype(features.dtype)
    pixels = features.movedim(1, -1).flatten(0, -2).to(dtype)
    sums = features.new_zeros((num_rows, features.shape[1]), dtype=dtype).index_add_(0, flat.long(), pixels)
    return _rows_of_classes(sums, torch.bincount(flat, minlength=num_rows), num_classes, per_image)


def _definition(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: Optional[int], per_image: bool
) -> tuple[Tensor, Tensor]:
    """The same sums from plain PyTorch operations, for forward mode and the transforms of torch.func."""
    # The op checks and counts the labels; the features that it needs for this have one channel of zeros.
    nothing = torch.zeros_like(labels[:, None], dtype=features.dtype)
    with torch._C._AutoDispatchBelowAutograd():
        _, mass = _class_sums(nothing, labels, num_classes, ignore_index, per_image)
    keys, num_rows = _keys(class_slots(labels, num_classes, ignore_index, check=False), num_classes, per_image)
    pixels = features.movedim(1, -1).flatten(0, -2).to(sum_dtype(features.dtype))
    sums = pixels.new_zeros((num_rows, features.shape[1])).index_add(0, keys.flatten().long(), pixels)
    if per_image:
        return sums.unflatten(0, (-1, num_classes + 1))[:, :num_classes], mass
    return sums[:num_classes], mass


# Not `torch.library.custom_op`: for a small call, its wrapper costs more than all of the arithmetic.
_LIBRARY = torch.library.Library("semshift", "FRAGMENT")
_LIBRARY.define(
    "class_sums(Tensor features, Tensor labels, SymInt num_classes, int? ignore_index, bool per_image) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "spread_rows(Tensor rows, Tensor labels, SymInt num_classes, int? ignore_index, bool per_image, "
    "bool channels_last) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_class_sums = torch.ops.semshift.class_sums.default
_spread_rows = torch.ops.semshift.spread_rows.default


@torch.library.impl(_LIBRARY, "class_sums", "CompositeExplicitAutograd")
def _add_up(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: Optional[int], per_image: bool
) -> tuple[Tensor, Tensor]:
    """The definition: add the feature of each pixel to the row of its class.

    Features are read in their memory order, by channel or by pixel; docs/benchmarks.md shows the gain of each way.
    """
    if _is_small(features):
        return _add_up_at_once(features, labels, num_classes, ignore_index, per_image)
    keys, num_rows = _keys(class_slots(labels, num_classes, ignore_index, check=True), num_classes, per_image)
    mass, pixels = _count(keys.flatten(), num_rows), features.movedim(1, -1)
    if features.stride(1) != 1:
        sums = _by_channel(pixels, keys, num_rows, turns=4 if num_classes <= _TURNED else 1)
    elif _in_bags(pixels, num_rows):
        order = keys.flatten().to(torch.uint8).argsort(stable=True)
        sums = embedding_bag(order, pixels.flatten(0, -2), mass.cumsum(0) - mass, mode="sum")
    else:
        sums = _by_pixel(pixels, keys, num_rows)
    return _rows_of_classes(sums, mass, num_classes, per_image)


@torch.library.impl(_LIBRARY, "spread_rows", "CompositeExplicitAutograd")
def _spread(
    rows: Tensor, labels: Tensor, num_classes: int, ignore_index: Optional[int], per_image: bool, channels_last: bool
) -> Tensor:
    """The adjoint: each pixel gets the row of its class, and 0 if it has none; `[B, C, *S]`."""
    images, channels = labels.shape[0], rows.shape[-1]
    slots = class_slots(labels, num_classes, ignore_index, check=False)
    if channels_last:
        keys, _ = _keys(slots, num_classes, per_image)
        padded = torch.cat([rows, rows.new_zeros((*rows.shape[:-2], 1, channels))], dim=-2)
        spread = padded.flatten(0, -2).index_select(0, keys.flatten().long())
        return spread.view(*labels.shape, channels).movedim(-1, 1)
    table = rows.new_zeros((*rows.shape[:-2], channels, num_classes + 1))
    table[..., :num_classes] = rows.mT
    keys = slots.long().unsqueeze(-1).flatten(1)[:, None].expand(images, channels, -1)
    return table.expand(images, channels, num_classes + 1).gather(2, keys).view(images, channels, *labels.shape[1:])


def _keys(slots: Tensor, num_classes: int, per_image: bool) -> tuple[Tensor, int]:
    """The row of each pixel in one table for all images, and the table's number of rows.

    The table has one row more than classes (per image). This row takes the ignored pixels, so that they need no mask.
    """
    if not per_image:
        return slots, num_classes + 1
    first = torch.arange(len(slots), device=slots.device) * (num_classes + 1)
    return slots + first.view(-1, *[1] * (slots.dim() - 1)), len(slots) * (num_classes + 1)


def _rows_of_classes(sums: Tensor, mass: Tensor, num_classes: int, per_image: bool) -> tuple[Tensor, Tensor]:
    """The rows of the classes, without the row of ignored pixels."""
    if per_image:
        size = (len(mass) // (num_classes + 1), num_classes + 1)
        sums, mass = sums.unflatten(0, size), mass.unflatten(0, size)
        return sums[:, :num_classes].contiguous(), mass[:, :num_classes].contiguous()
    return sums[:num_classes], mass[:num_classes]


def _count(keys: Tensor, rows: int) -> Tensor:
    if keys.device.type == "cpu":
        return torch.bincount(keys, minlength=rows)
    # On CUDA, bincount forces a device sync to find its largest key.
    return keys.new_zeros(rows, dtype=torch.int64).index_add_(0, keys.long(), torch.ones_like(keys, dtype=torch.int64))


def _in_bags(pixels: Tensor, num_rows: int) -> bool:
    """Whether to sort the pixels by class, so that each sum is finished before the next; keys must fit in a byte."""
    few = pixels.shape[-1] <= _NARROW and num_rows <= 256
    return few and pixels.is_cpu and pixels.dtype == torch.float32 and pixels.is_contiguous()


def _by_pixel(pixels: Tensor, keys: Tensor, num_rows: int) -> Tensor:
    """Sums `[num_rows, C]` of pixels `[*S, C]` whose channels are contiguous."""
    dtype = sum_dtype(pixels.dtype)
    sums = pixels.new_zeros((num_rows, pixels.shape[-1]), dtype=dtype)
    for part, to in _runs(pixels, keys.long(), dtype):
        sums.index_add_(0, to, part.to(dtype))
    return sums


def _by_channel(pixels: Tensor, keys: Tensor, num_rows: int, turns: int) -> Tensor:
    """Sums `[num_rows, C]` of pixels `[*S, C]`, each channel of which is contiguous.

    Neighbouring pixels mostly have the same class, so each addition would wait for the one before. So each class has
    several sums, and the pixels of a line use them in turn.
    """
    dtype = sum_dtype(pixels.dtype)
    keys = keys.long() + torch.arange(keys.shape[-1], device=keys.device) % turns * num_rows
    added = pixels.new_zeros((pixels.shape[-1], turns, num_rows), dtype=dtype)
    for part, to in _runs(pixels, keys, dtype):
        added.flatten(1).index_add_(1, to, part.mT.to(dtype))
    summed = added.sum(1) if turns > 1 else added[:, 0]
    return summed.mT.contiguous()


def _runs(pixels: Tensor, keys: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Views `[n, C]` of `[*S, C]` with keys `[n]`, as long as the strides allow without a copy.

    Views of half precision come in blocks, so that their widened copies stay in the cache.
    """
    size, stride = pixels.shape[:-1], pixels.stride()
    # With one image, the stride between images does not matter.
    outer = 1 if size[0] == 1 else 0
    if any(stride[i] != stride[i + 1] * size[i + 1] for i in range(outer, len(size) - 1)):
        for part, to in zip(pixels, keys):
            yield from _runs(part, to, dtype)
        return
    rows, flat = pixels.view(math.prod(size), pixels.shape[-1]), keys.reshape(-1)
    block = max(1, len(flat) if pixels.dtype == dtype else _BLOCK // max(1, pixels.shape[-1]))
    yield from zip(rows.split(block), flat.split(block))


@torch.library.impl(_LIBRARY, "class_sums", "CUDA")
def _add_up_on_cuda(features: Tensor, labels: Tensor, num_classes: int, *options: Any) -> tuple[Tensor, Tensor]:
    pooled = None
    # With many classes, the kernel adds in no fixed order.
    if num_classes <= FEW or not torch.are_deterministic_algorithms_enabled():
        pooled = launched("pooling", "add_up", features, labels, num_classes, *options)
    sums, mass = _add_up(features, labels, num_classes, *options) if pooled is None else pooled
    return sums, mass


@torch.library.impl(_LIBRARY, "spread_rows", "CUDA")
def _spread_on_cuda(rows: Tensor, labels: Tensor, *options: Any) -> Tensor:
    spread: Optional[Tensor] = launched("pooling", "spread", rows, labels, *options)
    return _spread(rows, labels, *options) if spread is None else spread


@torch.library.register_fake("semshift::class_sums")
def _(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: Optional[int], per_image: bool
) -> tuple[Tensor, Tensor]:
    rows = (features.shape[0], num_classes) if per_image else (num_classes,)
    sums = features.new_empty((*rows, features.shape[1]), dtype=sum_dtype(features.dtype))
    return sums, labels.new_empty(rows, dtype=torch.int64)


@torch.library.register_fake("semshift::spread_rows")
def _(
    rows: Tensor, labels: Tensor, num_classes: int, ignore_index: Optional[int], per_image: bool, channels_last: bool
) -> Tensor:
    channels = rows.shape[-1]
    if channels_last:
        return rows.new_empty((*labels.shape, channels)).movedim(-1, 1)
    return rows.new_empty((labels.shape[0], channels, *labels.shape[1:]))


class _ClassSums(torch.autograd.Function):
    """Pooling with its backward. Each of the two ops is the other's backward, to any order."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(labels)
        ctx.options, ctx.dtype, ctx.channels_last = options, features.dtype, _channels_last(features)
        with torch._C._AutoDispatchBelowAutograd():
            sums, mass = _class_sums(features, labels, *options)
        ctx.mark_non_differentiable(mass)
        return sums, mass

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Optional[Tensor], ...]:
        # Rounding the rows rounds each pixel's copy of them, at a fraction of the memory.
        return _spread_rows(grad.to(ctx.dtype), *ctx.saved_tensors, *ctx.options, ctx.channels_last), *[None] * 4


class _SpreadRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, labels: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(labels)
        ctx.options, ctx.dtype = options[:-1], rows.dtype
        with torch._C._AutoDispatchBelowAutograd():
            spread: Tensor = _spread_rows(rows, labels, *options)
        return spread

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        return _class_sums(grad, *ctx.saved_tensors, *ctx.options)[0].to(ctx.dtype), *[None] * 5


@torch.library.impl(_LIBRARY, "class_sums", "Autograd")
def _(features: Tensor, *arguments: Any) -> Any:
    if transformed(features):
        return _definition(features, *arguments)
    if features.requires_grad and torch.is_grad_enabled():
        return _ClassSums.apply(features, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _class_sums(features, *arguments)


@torch.library.impl(_LIBRARY, "spread_rows", "Autograd")
def _(rows: Tensor, *arguments: Any) -> Any:
    if transformed(rows):
        return _spread(rows, *arguments)
    if rows.requires_grad and torch.is_grad_enabled():
        return _SpreadRows.apply(rows, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _spread_rows(rows, *arguments)


def _channels_last(features: Tensor) -> bool:
    return features.dim() > 2 and features.stride(1) == 1
