"""Class-prototype pooling: the sum of the features of each class, and its mass, divided once at the end.

Sums and masses add up over images, batches, shards and ranks, so a prototype over any of these is one division away:
`(a + b).means`, never the mean of means.
"""

import functools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Optional

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from semshift.labels import _check_arguments, _shares, _slots, resize_labels

__all__ = ["ClassSums", "class_sums", "weighted_class_sums"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Elements of half precision that are widened at a time, so that they stay in the cache.
_BLOCK = 2**18
# Where one way on the CPU becomes faster than another: docs/benchmarks.md has what each is worth.
_SMALL = 2**14
_NARROW = 64
_WIDE = 512
_PRODUCT = 32
# Up to so many classes the kernels add in a fixed order.
_FEW = 256


@dataclass(frozen=True, eq=False)
class ClassSums:
    """What pooling returns: a value to be added to others, then divided.

    Args:
        sums: `[(B,) K, C]` float32 (float64 for float64 features), the features of each class added up.
        mass: `[(B,) K]`, how much was added: int64 pixels, or in the dtype of `sums` for area and for weights.

    Example:
        >>> one = class_sums(torch.ones(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64), 2)
        >>> (one + one).mass
        tensor([8, 0])
    """

    sums: Tensor
    mass: Tensor

    @property
    def means(self) -> Tensor:
        """Prototypes `[(B,) K, C]` in the dtype of `sums`; an absent class is 0 with gradient 0."""
        present = self.present[..., None]
        # The inner `where` keeps 0 / 0 out of the backward, the outer one whatever the sums hold.
        mass = torch.where(self.present, self.mass, 1)[..., None].to(self.sums.dtype)
        return torch.where(present, self.sums / mass, 0.0)

    @property
    def present(self) -> Tensor:
        """`[(B,) K]` bool, the classes of which anything was added."""
        return self.mass > 0

    def __add__(self, other: "ClassSums") -> "ClassSums":
        if not isinstance(other, ClassSums):
            return NotImplemented
        for name in ("sums", "mass"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                raise ValueError(
                    f"expected two ClassSums of like shape and dtype, got {name} {list(ours.shape)} {ours.dtype} and "
                    f"{list(theirs.shape)} {theirs.dtype}"
                )
        return ClassSums(self.sums + other.sums, self.mass + other.mass)

    def __radd__(self, other: Any) -> "ClassSums":
        # `sum(parts)` begins with 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented


with warnings.catch_warnings():
    # In torch 2.4 this calls a function that torch 2.4 itself deprecates; importing semshift is to be silent.
    warnings.simplefilter("ignore", FutureWarning)
    torch.export.register_dataclass(ClassSums)


def class_sums(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    ignore_index: Optional[int] = 255,
    resample: Optional[Literal["nearest", "majority", "area", "bilinear"]] = None,
    align_corners: bool = False,
    per_image: bool = False,
) -> ClassSums:
    """Add up the features under each class's pixels.

    `.means` of the result are the class prototypes of Wang et al. 2020 (arXiv 2004.00794), section 3:
    `v_k = sum_i [y_i = k] f_i / sum_i [y_i = k]`. A pixel whose label is `ignore_index` takes no part, whatever its
    features hold. Sums are kept in float32 at least, counts in int64.

    Args:
        features: `[B, C, *S]`, float16, bfloat16, float32 or float64, any strides; differentiable, twice in eager mode.
        labels: `[B, *S']`, uint8, int8, int16, int32 or int64, in `[0, num_classes)` or `ignore_index`. On CUDA any
            other label takes no part, since to look would wait for the device: see `labels.check_labels`.
        num_classes: K, at least 1.
        ignore_index: id of pixels without a class, None if there is none. The default is refused with more than 255
            classes.
        resample: how labels meet a feature grid of another size, two spatial dimensions only. `"nearest"`: the label
            at the cell's centre. `"majority"`: the label that covers most of the cell. `"area"`: each class weighs by
            the share of the cell that it covers. `"bilinear"`: exactly what pooling bilinearly up-sampled features at
            the labels' size gives, without up-sampling them.
        align_corners: of `"bilinear"`, as in `torch.nn.functional.interpolate`.
        per_image: one row of prototypes per image instead of one for the batch.

    Returns:
        `ClassSums` with sums `[(B,) K, C]` and mass `[(B,) K]`: int64 label pixels, or with `"area"` cells in the
        dtype of the sums.

    Raises:
        TypeError: features or labels of another dtype.
        ValueError: shapes that do not belong together, labels of another size without `resample`, an unknown option,
            or on the CPU a label out of range.

    Example:
        >>> features = torch.tensor([[[1.0, 3.0, 5.0, 9.0]]])
        >>> labels = torch.tensor([[0, 0, 1, 255]])
        >>> class_sums(features, labels, 3).means.squeeze(-1)
        tensor([2., 5., 0.])
    """
    _check_features(features)
    _check_arguments(labels, num_classes, ignore_index)
    if labels.dim() != features.dim() - 1 or labels.shape[0] != features.shape[0]:
        raise ValueError(
            f"expected labels [B, {'H, W' if features.dim() == 4 else '*S'}] for features "
            f"{list(features.shape)}, got {list(labels.shape)}"
        )
    if labels.device != features.device:
        raise ValueError(f"expected features and labels on one device, got {features.device} and {labels.device}")
    if resample not in (None, "nearest", "majority", "area", "bilinear"):
        raise ValueError(f"expected resample to be None, 'nearest', 'majority', 'area' or 'bilinear', got {resample!r}")
    if align_corners and resample != "bilinear":
        raise ValueError(f"expected align_corners only with resample 'bilinear', got {resample!r}")
    size = features.shape[2:]
    if labels.shape[1:] != size:
        if resample is None:
            raise ValueError(
                f"expected labels of the features' size {list(size)} or resample to be chosen, "
                f"got labels {list(labels.shape)} for features {list(features.shape)}"
            )
        if features.dim() != 4:
            raise ValueError(
                f"expected features [B, C, h, w] and labels [B, H, W] for resample, got {list(features.shape)} "
                f"and {list(labels.shape)}"
            )
        if 0 in size or 0 in labels.shape[1:]:
            raise ValueError(
                f"expected features and labels with pixels for resample, got {list(features.shape)} "
                f"and {list(labels.shape)}"
            )
        if resample in ("nearest", "majority"):
            labels = resize_labels(
                labels, (size[0], size[1]), mode=resample, num_classes=num_classes, ignore_index=ignore_index
            )
        else:
            return _resampled(features, labels, num_classes, ignore_index, resample, align_corners, per_image)
    sums, mass = _class_sums(features, labels, num_classes, ignore_index, per_image)
    # At equal sizes an area is a pixel; only the dtype of the mass tells the modes apart.
    return ClassSums(sums, mass.to(sums.dtype) if resample == "area" else mass)


def weighted_class_sums(features: Tensor, weights: Tensor, *, per_image: bool = False) -> ClassSums:
    """Add up features by the weight of each class at each place, such as a network's probabilities.

    A cell that no class weighs contributes nothing on the CPU, whatever its features hold; on CUDA this is a matrix
    product, exact for finite features.

    Args:
        features: `[B, C, *S]`, float16, bfloat16, float32 or float64; differentiable.
        weights: `[B, K, *S]`, of any of these dtypes, not negative for means to be means; differentiable.
        per_image: one row of prototypes per image instead of one for the batch.

    Returns:
        `ClassSums` with sums `[(B,) K, C]` and mass `[(B,) K]`, the sum of the weights, both float32 (float64 if
        either argument is).

    Raises:
        TypeError: features or weights of another dtype.
        ValueError: shapes or devices that do not belong together.

    Example:
        >>> weights = torch.tensor([[[0.25, 0.75]]])
        >>> weighted_class_sums(torch.tensor([[[4.0, 8.0]]]), weights).means
        tensor([[7.]])
    """
    _check_features(features)
    if not isinstance(weights, Tensor):
        raise TypeError(f"expected weights to be a tensor, got {type(weights).__name__}")
    if weights.dtype not in _DTYPES:
        raise TypeError(f"expected weights of dtype float16, bfloat16, float32 or float64, got {weights.dtype}")
    if (
        weights.dim() != features.dim()
        or weights.shape[:1] + weights.shape[2:] != features.shape[:1] + features.shape[2:]
    ):
        raise ValueError(
            f"expected weights [B, K, *S] for features [B, C, *S], got {list(weights.shape)} for {list(features.shape)}"
        )
    if weights.device != features.device:
        raise ValueError(f"expected features and weights on one device, got {features.device} and {weights.device}")
    # A last axis of one, so that there is something to flatten in `[B, C]` too.
    weights = weights.unsqueeze(-1).flatten(2)
    sums = _soft_sums(features.unsqueeze(-1).flatten(2), weights)
    mass = weights.sum(2, dtype=sums.dtype)
    return ClassSums(sums, mass) if per_image else ClassSums(sums.sum(0), mass.sum(0))


def _resampled(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    ignore_index: Optional[int],
    resample: str,
    align_corners: bool,
    per_image: bool,
) -> ClassSums:
    height, width = features.shape[2:]
    shares = _shares(labels, height, width, num_classes, resample, align_corners, ignore_index)[:, :num_classes]
    if resample == "area":
        shares = shares / math.prod(labels.shape[1:])
    pooled = weighted_class_sums(features, shares.to(_sum_dtype(features.dtype)), per_image=per_image)
    if resample == "area":
        return pooled
    # Interpolation weights sum to one for each label pixel, so the mass is a count, and counts are exact.
    nothing = features.new_empty((labels.shape[0], 0, *labels.shape[1:]))
    _, mass = _class_sums(nothing, labels, num_classes, ignore_index, per_image)
    return ClassSums(pooled.sums, mass)


# Defined by hand, since the wrapper of `torch.library.custom_op` costs a small call more than all of its arithmetic.
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
    """The definition: add the feature of each pixel to the row of its class."""
    images, channels = features.shape[:2]
    dtype = _sum_dtype(features.dtype)
    # One row more than classes swallows the pixels that take no part, so that they need no masking.
    num_rows = (images if per_image else 1) * (num_classes + 1)
    slots = _slots(labels, num_classes, ignore_index, check=True)
    keys = _by_image(slots, num_classes) if per_image else slots
    flat = keys.flatten()
    mass = _count(flat, num_rows)
    pixels = features.movedim(1, -1)
    by_pixel = features.stride(1) == 1
    widened = channels if dtype != features.dtype else 0
    sums = None
    if features.numel() <= _SMALL:
        # A copy costs less than the steps of the others.
        sums = features.new_zeros((num_rows, channels), dtype=dtype)
        sums.index_add_(0, flat.long(), pixels.flatten(0, -2).to(dtype))
    elif by_pixel and channels < _WIDE and num_rows <= _FEW and _in_bags(pixels):
        order = flat.to(torch.uint8).argsort(stable=True)
        sums = embedding_bag(order, pixels.flatten(0, -2), mass.cumsum(0) - mass, mode="sum")
    elif by_pixel:
        sums = features.new_zeros((num_rows, channels), dtype=dtype)
        for part, to in _runs(pixels, keys.long(), widened):
            sums.index_add_(0, to, part.to(dtype))
    elif num_classes <= _PRODUCT and channels >= _NARROW and not widened and features.is_contiguous():
        sums = _product(features, slots, num_classes, per_image)
    if sums is None:
        keys, lanes = _in_lanes(keys, num_rows)
        sums = features.new_zeros((channels, lanes * num_rows), dtype=dtype)
        for part, to in _runs(pixels, keys, widened):
            sums.index_add_(1, to, part.mT.to(dtype))
        sums = sums.view(channels, lanes, num_rows).sum(1).mT if lanes > 1 else sums.mT
    if per_image:
        sums, mass = sums.reshape(images, num_classes + 1, channels), mass.view(images, num_classes + 1)
        return sums[:, :num_classes].contiguous(), mass[:, :num_classes].contiguous()
    return sums[:num_classes].contiguous(), mass[:num_classes]


@torch.library.impl(_LIBRARY, "spread_rows", "CompositeExplicitAutograd")
def _spread(
    rows: Tensor, labels: Tensor, num_classes: int, ignore_index: Optional[int], per_image: bool, channels_last: bool
) -> Tensor:
    """The adjoint: give each pixel the row of its class, and 0 to those that take no part; `[B, C, *S]`."""
    images, channels = labels.shape[0], rows.shape[-1]
    slots = _slots(labels, num_classes, ignore_index, check=False)
    padded = torch.cat([rows, rows.new_zeros((*rows.shape[:-2], 1, channels))], dim=-2)
    if channels_last:
        keys = _by_image(slots, num_classes) if per_image else slots
        spread = padded.flatten(0, -2).index_select(0, keys.flatten().long())
        return spread.view(*labels.shape, channels).movedim(-1, 1)
    keys = slots.long().unsqueeze(-1).flatten(1)[:, None].expand(images, channels, -1)
    table = padded.mT.contiguous().expand(images, channels, num_classes + 1)
    return table.gather(2, keys).view(images, channels, *labels.shape[1:])


def _by_image(slots: Tensor, num_classes: int) -> Tensor:
    """Rows of one table for all images, `num_classes + 1` of them for each."""
    first = torch.arange(len(slots), device=slots.device) * (num_classes + 1)
    return slots + first.view(-1, *[1] * (slots.dim() - 1))


def _product(features: Tensor, slots: Tensor, num_classes: int, per_image: bool) -> Optional[Tensor]:
    """Sums as one-hot labels times features, with a last row for no class; None where that would not be exact."""
    if features.device.type != "cpu" or torch.get_float32_matmul_precision() != "highest":
        return None
    images, channels = features.shape[:2]
    hot = features.new_zeros((images, num_classes + 1, slots[0].numel()))
    hot.scatter_(1, slots.flatten(1).long()[:, None], 1)
    sums = features.new_zeros((images, num_classes + 1, channels))
    with torch.autocast("cpu", enabled=False):
        sums[:, :num_classes] = torch.bmm(hot[:, :num_classes], features.flatten(2).mT)
    # In a product, 0 * inf reaches every class.
    if not sums.isfinite().all():
        return None
    return sums.flatten(0, 1) if per_image else sums.sum(0)


def _count(keys: Tensor, rows: int) -> Tensor:
    if keys.device.type == "cpu":
        return torch.bincount(keys, minlength=rows)
    # On CUDA a bincount waits for the device, to find its largest key.
    return keys.new_zeros(rows, dtype=torch.int64).index_add_(0, keys.long(), torch.ones_like(keys, dtype=torch.int64))


def _in_bags(pixels: Tensor) -> bool:
    return pixels.device.type == "cpu" and pixels.dtype == torch.float32 and pixels.is_contiguous()


def _in_lanes(keys: Tensor, num_rows: int) -> tuple[Tensor, int]:
    """Neighbours are mostly of one class and would wait for each other's sum: they take turns at several."""
    lanes = min(8, 4096 // num_rows)
    if lanes < 2 or keys.device.type != "cpu":
        return keys.long(), 1
    size = keys.shape[1:]
    turns = (torch.arange(lanes) * num_rows).repeat(math.ceil(math.prod(size) / lanes))
    return keys.long() + turns[: math.prod(size)].view(size), lanes


def _runs(pixels: Tensor, keys: Tensor, widened: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views `[n, C]` of `[*S, C]` with keys `[n]`, as long as the strides allow: nothing is copied.

    Those that will be widened come in blocks, whose copies stay in the cache.
    """
    size, stride = pixels.shape[:-1], pixels.stride()
    # How far apart the images lie does not matter where there is one.
    outer = 1 if size[0] == 1 else 0
    if any(stride[i] != stride[i + 1] * size[i + 1] for i in range(outer, len(size) - 1)):
        for part, to in zip(pixels, keys):
            yield from _runs(part, to, widened)
        return
    rows, flat = pixels.view(math.prod(size), pixels.shape[-1]), keys.reshape(-1)
    block = max(1, _BLOCK // widened) if widened else len(flat)
    if block < len(flat):
        yield from zip(rows.split(block), flat.split(block))
    else:
        yield rows, flat


@functools.lru_cache(maxsize=1)
def _kernels() -> Any:
    """Triton's kernels, imported where they are first needed; None without Triton."""
    try:
        from semshift import _pooling_triton
    except ImportError:
        return None
    return _pooling_triton


@torch.library.impl(_LIBRARY, "class_sums", "CUDA")
def _(features: Tensor, labels: Tensor, num_classes: int, *options: Any) -> tuple[Tensor, Tensor]:
    kernels = _kernels()
    # Sums of many classes are scattered in no fixed order.
    settled = num_classes <= _FEW or not torch.are_deterministic_algorithms_enabled()
    body = kernels.add_up if kernels and settled and kernels.takes(features) else _add_up
    sums, mass = body(features, labels, num_classes, *options)
    return sums, mass


@torch.library.impl(_LIBRARY, "spread_rows", "CUDA")
def _(rows: Tensor, *arguments: Any) -> Tensor:
    kernels = _kernels()
    body = kernels.spread if kernels and rows.dtype != torch.float64 else _spread
    spread: Tensor = body(rows, *arguments)
    return spread


@torch.library.register_fake("semshift::class_sums")
def _(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: Optional[int], per_image: bool
) -> tuple[Tensor, Tensor]:
    rows = (features.shape[0], num_classes) if per_image else (num_classes,)
    sums = features.new_empty((*rows, features.shape[1]), dtype=_sum_dtype(features.dtype))
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
    """Pooling with its backward; the two ops are each other's, to any order."""

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
        # Rounding the rows is rounding each pixel's copy of them, at a fraction of the memory.
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
    if features.requires_grad and torch.is_grad_enabled():
        return _ClassSums.apply(features, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _class_sums(features, *arguments)


@torch.library.impl(_LIBRARY, "spread_rows", "Autograd")
def _(rows: Tensor, *arguments: Any) -> Any:
    if rows.requires_grad and torch.is_grad_enabled():
        return _SpreadRows.apply(rows, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _spread_rows(rows, *arguments)


@torch.library.custom_op("semshift::soft_class_sums", mutates_args=())
def _soft_sums(features: Tensor, weights: Tensor) -> Tensor:
    """The definition: `[B, C, N]` and `[B, K, N]`, multiplied and added up over N, to `[B, K, C]`."""
    dtype = _soft_dtype(features, weights)
    sums = features.new_empty((features.shape[0], weights.shape[1], features.shape[1]), dtype=dtype)
    # Autocast would take the product, and so the sum, down to half precision.
    with torch.autocast(features.device.type, enabled=False):
        # One image at a time: what is widened to float32 is never more than that.
        for pooled, feature, weight in zip(sums, features, weights):
            wide, by = feature.to(dtype), weight.to(dtype)
            torch.mm(by, wide.mT, out=pooled)
            if features.device.type == "cpu" and not pooled.isfinite().all():
                # A second look: in a product, a place that no class weighs still gives 0 * inf.
                torch.mm(by, torch.where((by != 0).any(0), wide, 0).mT, out=pooled)
    return sums


@_soft_sums.register_fake
def _(features: Tensor, weights: Tensor) -> Tensor:
    shape = (features.shape[0], weights.shape[1], features.shape[1])
    return features.new_empty(shape, dtype=_soft_dtype(features, weights))


def _soft_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _soft_backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], Optional[Tensor]]:
    features, weights = ctx.saved_tensors
    needs_features, needs_weights = ctx.needs_input_grad
    # Both are products of the same kind, so the op is its own backward, to any order.
    to_features = _soft_sums(weights.mT, grad.mT).to(features.dtype) if needs_features else None
    to_weights = _soft_sums(features.mT, grad).to(weights.dtype) if needs_weights else None
    return to_features, to_weights


_soft_sums.register_autograd(_soft_backward, setup_context=_soft_setup)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _soft_dtype(features: Tensor, weights: Tensor) -> torch.dtype:
    return torch.promote_types(_sum_dtype(features.dtype), _sum_dtype(weights.dtype))


def _channels_last(features: Tensor) -> bool:
    return features.dim() > 2 and features.stride(1) == 1


def _check_features(features: Tensor) -> None:
    if not isinstance(features, Tensor):
        raise TypeError(f"expected features to be a tensor, got {type(features).__name__}")
    if features.dtype not in _DTYPES:
        raise TypeError(f"expected features of dtype float16, bfloat16, float32 or float64, got {features.dtype}")
    if features.dim() < 2:
        raise ValueError(f"expected features [B, C, *S], got {list(features.shape)}")
