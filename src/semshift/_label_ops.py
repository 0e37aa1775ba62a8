"""Ops on labels: the class of each pixel, label maps of a different size, the share of each class in each cell."""

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from semshift._checks import fits
from semshift._kernels import launched
from semshift._transforms import values_of

__all__ = ["check_range", "class_slots", "label_shares", "resize"]

# Not `torch.library.custom_op`, which in torch 2.4 does not support the transforms of torch.func.
_LIBRARY = torch.library.Library("semshift", "FRAGMENT")
_LIBRARY.define(
    "resize_labels(Tensor labels, SymInt height, SymInt width, str resample, SymInt num_classes, int? ignore_index, "
    "float min_share) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "label_shares(Tensor labels, SymInt height, SymInt width, SymInt num_classes, str resample, bool align_corners, "
    "int? ignore_index) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# `_resize` defines the first op: nearest or majority labels of a different size. `_share_out` defines the second: the
# share of each class in each cell.
resize: Callable[..., Tensor] = torch.ops.semshift.resize_labels.default
label_shares: Callable[..., Tensor] = torch.ops.semshift.label_shares.default

# The most temporary elements beside the result, unless a single image needs more.
_HELD = 2**20


def check_range(labels: Tensor, num_classes: int, ignore_index: Optional[int]) -> None:
    """Refuse labels outside `[0, num_classes)` that are not `ignore_index`; forces a device sync."""
    seen = values_of(labels)
    if seen is None:
        raise ValueError(f"expected labels with values to check, got a fake or meta tensor {list(labels.shape)}")
    labels = seen
    ignored = _ignored(labels, ignore_index)
    _check_classes(labels if ignored is None else labels.masked_fill(ignored, 0), num_classes, ignore_index)


def _check_classes(ids: Tensor, num_classes: int, ignore_index: Optional[int]) -> None:
    """Refuse ids outside `[0, num_classes)`; the caller has set ignored pixels to a class."""
    if ids.numel() == 0:
        return
    low, high = torch.aminmax(ids)
    if int(low) < 0 or int(high) >= num_classes:
        wide = ids.long()
        values, counts = torch.unique(wide[(wide < 0) | (wide >= num_classes)], return_counts=True)
        got = ", ".join(f"{v} ({c} pixel{'s' if c > 1 else ''})" for v, c in zip(values[:5].tolist(), counts.tolist()))
        more = f" and {len(values) - 5} more values" if len(values) > 5 else ""
        or_ignored = "" if ignore_index is None else f" or ignore_index {ignore_index}"
        raise ValueError(f"expected labels in [0, {num_classes}){or_ignored}, got {got}{more}")


@torch.library.impl(_LIBRARY, "resize_labels", "CompositeExplicitAutograd")
def _resize(
    labels: Tensor,
    height: int,
    width: int,
    resample: str,
    num_classes: int,
    ignore_index: Optional[int],
    min_share: float,
) -> Tensor:
    """The definition of nearest and majority resampling: `[B, h, w]` in the dtype of the labels."""
    if resample == "nearest":
        if labels.is_cpu:
            # Pixels that no cell uses are checked too: a label out of range is always an error.
            check_range(labels, num_classes, ignore_index)
        if height * width == 0:
            return labels.new_empty((len(labels), height, width))
        rows, columns = (_centres(n, to, labels.device) for n, to in zip(labels.shape[1:], (height, width)))
        return labels[:, rows[:, None], columns]
    # In a tie, `max` returns the first class.
    share, winner = label_shares(labels, height, width, num_classes, "area", False, ignore_index).max(1)
    if ignore_index is not None and fits(labels.dtype, ignore_index):
        ignored = ignore_index
    else:
        # Only unchecked labels on CUDA need this value, which must stay out of range.
        info = torch.iinfo(labels.dtype)
        ignored = info.max if info.max >= num_classes else info.min
    lost = winner == num_classes
    if min_share > 0:
        # Votes are integers, so their quotient is rounded like the decimal number that a user writes.
        lost |= share / max(1, labels.shape[1] * labels.shape[2]) < min_share
    return winner.masked_fill_(lost, ignored).to(labels.dtype)


@torch.library.register_fake("semshift::resize_labels")
def _(
    labels: Tensor,
    height: int,
    width: int,
    resample: str,
    num_classes: int,
    ignore_index: Optional[int],
    min_share: float,
) -> Tensor:
    return labels.new_empty((labels.shape[0], height, width))


@torch.library.impl(_LIBRARY, "label_shares", "CompositeExplicitAutograd")
def _share_out(
    labels: Tensor,
    height: int,
    width: int,
    num_classes: int,
    resample: str,
    align_corners: bool,
    ignore_index: Optional[int],
) -> Tensor:
    """Weights `[B, K + 1, h, w]` in float64, row K for ignored pixels; areas are in units of 1 / (h * w) pixels."""
    # The offset of the pixel's class in a line that holds the cells of all classes.
    begins = class_slots(labels, num_classes, ignore_index, check=True).long() * width
    device = labels.device
    rows, in_row, row_weights = _overlaps(labels.shape[1], height, resample, align_corners, device)
    columns, in_column, column_weights = _overlaps(labels.shape[2], width, resample, align_corners, device)
    # First along the columns, where a pixel overlaps few cells; then along the rows, as one matrix product.
    lines, cells = labels.shape[1], (num_classes + 1) * width
    shares = labels.new_empty((len(labels), height, cells), dtype=torch.float64)
    by_row = shares.new_zeros((height, lines)).index_put_((in_row, rows), row_weights, accumulate=True)
    # Small images are computed together, large ones one by one.
    some = max(1, min(len(labels), _HELD // max(1, lines * cells)))
    line = torch.arange(some * lines, device=device).view(some, lines, 1) * cells
    for share, begin in zip(torch.split(shares, some), torch.split(begins, some)):
        across = share.new_zeros((len(begin), lines, cells))
        keys = begin[:, :, columns] + (line[: len(begin)] + in_column)
        across.view(-1).index_add_(0, keys.flatten(), column_weights.expand(len(begin) * lines, -1).flatten())
        torch.matmul(by_row, across, out=share)
    shares = shares.view(len(labels), height, num_classes + 1, width).movedim(2, 1)
    return shares.contiguous()


@torch.library.impl(_LIBRARY, "label_shares", "CUDA")
def _share_out_on_cuda(labels: Tensor, *options: Any) -> Tensor:
    shares: Optional[Tensor] = launched("label", "share_out", labels, *options)
    return _share_out(labels, *options) if shares is None else shares


@torch.library.register_fake("semshift::label_shares")
def _(
    labels: Tensor,
    height: int,
    width: int,
    num_classes: int,
    resample: str,
    align_corners: bool,
    ignore_index: Optional[int],
) -> Tensor:
    return labels.new_empty((labels.shape[0], num_classes + 1, height, width), dtype=torch.float64)


def class_slots(labels: Tensor, num_classes: int, ignore_index: Optional[int], *, check: bool) -> Tensor:
    """Class of each pixel, or `num_classes` where it has none; `check` refuses labels out of range on the CPU.

    The result keeps the labels' dtype if that can hold `num_classes`: eight passes over int64 cost more than over
    uint8.
    """
    narrow = labels if fits(labels.dtype, num_classes) else labels.long()
    if check and labels.is_cpu and _all_count(narrow, num_classes, ignore_index):
        return narrow
    ignored = _ignored(narrow, ignore_index)
    if not labels.is_cpu:
        nowhere = (narrow < 0) | (narrow >= num_classes)
        return narrow.masked_fill(nowhere if ignored is None else nowhere | ignored, num_classes)
    if not check:
        return narrow if ignored is None else narrow.masked_fill(ignored, num_classes)
    # Ignored pixels are set to a class while the others are checked.
    classes = narrow if ignored is None else narrow.masked_fill(ignored, 0)
    _check_classes(classes, num_classes, ignore_index)
    return classes if ignored is None else classes.masked_fill_(ignored, num_classes)


def _all_count(labels: Tensor, num_classes: int, ignore_index: Optional[int]) -> bool:
    if labels.numel() == 0:
        return True
    low, high = (int(value) for value in torch.aminmax(labels))
    return low >= 0 and high < num_classes and (ignore_index is None or not low <= ignore_index <= high)


def _ignored(labels: Tensor, ignore_index: Optional[int]) -> Optional[Tensor]:
    # In uint8 a comparison with -1 would match 255.
    return None if ignore_index is None or not fits(labels.dtype, ignore_index) else labels == ignore_index


def _overlaps(
    pixels: int, cells: int, resample: str, align_corners: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of a pixel and a cell that overlap along one axis, and their weights (float64)."""
    if pixels == 0 or cells == 0:
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return none, none, none.double()
    if resample == "area":
        # If a pixel is `cells` long and a cell is `pixels` long, every border is an integer, so the overlaps are exact.
        # Each pair is a piece between two neighbouring borders.
        borders = (
            torch.cat(
                [torch.arange(pixels + 1, device=device) * cells, torch.arange(cells + 1, device=device) * pixels]
            )
            .sort()
            .values
        )
        # Pieces of length 0 stay, with weight 0: removing them would force a device sync.
        left = borders[:-1]
        return (left // cells).clamp(max=pixels - 1), (left // pixels).clamp(max=cells - 1), borders.diff().double()
    at = torch.arange(pixels, dtype=torch.float64, device=device)
    if align_corners:
        at = at * ((cells - 1) / (pixels - 1) if pixels > 1 else 0.0)
    else:
        at = ((at + 0.5) * (cells / pixels) - 0.5).clamp(min=0)
    low = at.floor().long().clamp(max=cells - 1)
    high = (low + 1).clamp(max=cells - 1)
    weight = (at - low).clamp(max=1)
    pixel = torch.arange(pixels, device=device)
    return torch.cat([pixel, pixel]), torch.cat([low, high]), torch.cat([1 - weight, weight])


def _centres(pixels: int, cells: int, device: torch.device) -> Tensor:
    """The pixel under the centre of each cell; `cells` is at least 1."""
    return torch.arange(pixels, 2 * pixels * cells, 2 * pixels, device=device) // (2 * cells)
