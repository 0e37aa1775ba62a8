"""Label maps: checks and remapping for loading, and resampling to the feature grid."""

from collections.abc import Mapping
from typing import Literal, Optional, Union

import torch
from torch import Tensor

from semshift._checks import (
    INTEGERS,
    check_bool,
    check_int,
    check_label_dtype,
    check_labelling,
    check_number,
    check_option,
    fits,
)
from semshift._label_ops import check_range, label_shares, resize
from semshift._transforms import values_of

__all__ = ["check_labels", "class_shares", "remap_labels", "resize_labels"]


def check_labels(labels: Tensor, num_classes: int, *, ignore_index: Optional[int] = 255) -> None:
    """Check labels: any label outside `[0, num_classes)` that is not `ignore_index` is an error, on any device.

    The check forces a device sync. Call the function where you load labels: pooling on CUDA does not check labels, and
    ignores wrong ones.

    Args:
        labels: any shape, uint8, int8, int16, int32 or int64.
        num_classes: K, at least 1.
        ignore_index: id of pixels to ignore. None: every label must be a class. With more than 255 classes the default
            raises an error: pass None or another id.

    Raises:
        TypeError: labels of a wrong dtype, or a count that is not an int.
        ValueError: a label out of range, with the number of pixels of each value; or `num_classes` over 255 with the
            default `ignore_index`.

    Example:
        >>> semshift.check_labels(torch.tensor([[0, 18, 255]]), 19)
        >>> semshift.check_labels(torch.tensor([[0, 19, 19]]), 19)
        Traceback (most recent call last):
        ValueError: expected labels in [0, 19) or ignore_index 255, got 19 (2 pixels)
    """
    num_classes, ignore_index = check_labelling(labels, num_classes, ignore_index)
    check_range(labels, num_classes, ignore_index)


def remap_labels(labels: Tensor, table: Union[Mapping[int, int], Tensor], *, default: Optional[int] = None) -> Tensor:
    """Remap labels: replace every label by its new id from a table.

    An id that the table lacks is an error unless you give a `default`. Without this error, training on a data set with
    unexpected ids would run, and score 1 %. The function forces a device sync.

    Args:
        labels: any shape, uint8, int8, int16, int32 or int64.
        table: mapping of old ids to new ids, for every id that occurs, including the ignored id. Or a tensor `[N]` of
            one of the dtypes above: its entry i is the new id of i.
        default: the new id of every label that the table lacks, such as 255; with None such labels are an error.

    Returns:
        Labels of the same shape and dtype. If a new id does not fit uint8, convert the labels to a wider dtype first.

    Raises:
        TypeError: labels or a table of a wrong dtype, or an id in the table or a default that is not an int.
        ValueError: a label that the table lacks, an empty table, a table of a wrong shape, or a new id that the dtype
            of the labels cannot hold.

    Example:
        >>> labels = torch.tensor([7, 8, 0, 40], dtype=torch.uint8)
        >>> semshift.remap_labels(labels, {7: 0, 8: 1}, default=255)
        tensor([  0,   1, 255, 255], dtype=torch.uint8)
    """
    check_label_dtype(labels)
    if isinstance(table, Tensor):
        if table.dtype not in INTEGERS:
            raise TypeError(f"expected table of dtype uint8, int8, int16, int32 or int64, got {table.dtype}")
        if table.dim() != 1:
            raise ValueError(f"expected table [N], got {list(table.shape)}")
        ids = values_of(table)
        if ids is None:
            raise ValueError(f"expected table with values, such as a mapping, got a fake or meta tensor [{len(table)}]")
        table = dict(enumerate(ids.tolist()))
    if not isinstance(table, Mapping):
        raise TypeError(f"expected table to be a mapping or a tensor, got {type(table).__name__}")
    if not table:
        raise ValueError("expected table to map at least one id, got an empty one")
    table = {check_int("each id of table", old): check_int("each id of table", new) for old, new in table.items()}
    for value in (*table, *table.values()):
        if not fits(torch.int64, value):
            raise ValueError(f"expected the ids of table to fit int64, got {value}")
    unfit = sorted(new for new in table.values() if not fits(labels.dtype, new))
    if unfit:
        raise ValueError(f"expected table to hold new ids that {labels.dtype} can hold, got {unfit[0]}")
    if default is not None:
        default = check_int("default", default)
        if not fits(labels.dtype, default):
            raise ValueError(f"expected default to be an id that {labels.dtype} can hold, got {default}")
    olds = torch.tensor(sorted(table), device=labels.device)
    news = torch.tensor([table[old] for old in sorted(table)], device=labels.device)
    wide = labels.long()
    place = torch.searchsorted(olds, wide).clamp(max=len(olds) - 1)
    unknown = olds[place] != wide
    if default is not None:
        return torch.where(unknown, default, news[place]).to(labels.dtype)
    # Fake tensors have no values to check.
    seen, lacking = values_of(wide), values_of(unknown)
    if seen is not None and lacking is not None and lacking.any():
        values = torch.unique(seen[lacking])
        more = f" and {len(values) - 5} more" if len(values) > 5 else ""
        count = int(lacking.sum())
        got = f"{', '.join(map(str, values[:5].tolist()))}{more} ({count} pixel{'s' if count > 1 else ''})"
        raise ValueError(f"expected labels to be ids in table, or a default for ids that table lacks, got {got}")
    return news[place].to(labels.dtype)


def resize_labels(
    labels: Tensor,
    size: tuple[int, int],
    num_classes: int,
    *,
    resample: Literal["nearest", "majority"],
    ignore_index: Optional[int] = 255,
    min_share: float = 0.0,
) -> Tensor:
    """Resample a label map to a grid of a different size, with one label per cell of the grid.

    Args:
        labels: `[B, H, W]`, uint8, int8, int16, int32 or int64.
        size: `(h, w)` of the result, coarser or finer.
        num_classes: K, at least 1.
        resample: `"nearest"` takes the label at the cell's centre (PyTorch's `nearest-exact`); `"majority"` takes the
            label that covers the largest part of the cell. Of a pixel on the cell's border, only the part inside
            counts. Ignored pixels vote for an ignored cell. Ties go to the lower id, and to a class rather than to an
            ignored cell.
        ignore_index: id of pixels to ignore. None: every label must be a class; any other label raises an error on the
            CPU and is ignored on CUDA. With more than 255 classes the default raises an error: pass None or another id.
        min_share: with `"majority"`, a cell whose label covers less than this share of it is ignored; in [0, 1].

    Returns:
        `[B, h, w]` in the dtype of `labels`.

    Raises:
        TypeError: labels of a wrong dtype, or a min_share that is not a number.
        ValueError: a wrong shape, size or resample; a min_share outside [0, 1]; a min_share above 0 with `"nearest"`,
            or without an `ignore_index` that the labels' dtype can hold; on the CPU, a label out of range.

    Example:
        >>> labels = torch.tensor([[[0, 0, 1, 1], [0, 1, 1, 255]]])
        >>> semshift.resize_labels(labels, (1, 2), 2, resample="majority")
        tensor([[[0, 1]]])
    """
    num_classes, ignore_index = check_labelling(labels, num_classes, ignore_index)
    height, width = _check_map(labels, size)
    check_option("resample", resample, ("nearest", "majority"))
    check_number("min_share", min_share)
    if not 0 <= min_share <= 1:
        raise ValueError(f"expected min_share in [0, 1], got {min_share}")
    if min_share > 0 and (resample != "majority" or ignore_index is None):
        raise ValueError(
            f"expected min_share only with resample 'majority' and an ignore_index, got {resample!r} and {ignore_index}"
        )
    if min_share > 0 and ignore_index is not None and not fits(labels.dtype, ignore_index):
        raise ValueError(f"expected an ignore_index that {labels.dtype} can hold, got {ignore_index}")
    return resize(labels, height, width, resample, num_classes, ignore_index, float(min_share))


def class_shares(
    labels: Tensor,
    size: tuple[int, int],
    num_classes: int,
    *,
    resample: Literal["area", "bilinear"],
    align_corners: bool = False,
    ignore_index: Optional[int] = 255,
) -> Tensor:
    """Class shares: the weight of each class in each cell of a grid of a different size.

    With `"area"`, the weight is the share of the cell that the class covers. The weights of a cell sum to at most 1;
    ignored pixels fill the rest. With `"bilinear"`, the weights are the transpose of bilinear interpolation from the
    grid to the labels, applied to the class's mask. The weights of a class then sum to its number of label pixels.
    Pooling features with these weights is the same as pooling the up-sampled features.

    Args:
        labels: `[B, H, W]`, uint8, int8, int16, int32 or int64.
        size: `(h, w)` of the grid, coarser or finer than the labels.
        num_classes: K, at least 1.
        resample: `"area"` or `"bilinear"`.
        align_corners: for `"bilinear"` only, as in `torch.nn.functional.interpolate`.
        ignore_index: id of pixels to ignore. None: every label must be a class; any other label raises an error on the
            CPU and is ignored on CUDA. With more than 255 classes the default raises an error: pass None or another id.

    Returns:
        `[B, K, h, w]` float32.

    Raises:
        TypeError: labels of a wrong dtype, or an align_corners that is not a bool.
        ValueError: a wrong shape, size or resample, or align_corners without `"bilinear"`; on the CPU, a label out of
            range.

    Example:
        >>> labels = torch.tensor([[[0, 0, 1, 255]]])
        >>> semshift.class_shares(labels, (1, 2), 2, resample="area").tolist()
        [[[[1.0, 0.0]], [[0.0, 0.5]]]]
    """
    num_classes, ignore_index = check_labelling(labels, num_classes, ignore_index)
    height, width = _check_map(labels, size)
    check_option("resample", resample, ("area", "bilinear"))
    check_bool("align_corners", align_corners)
    if align_corners and resample != "bilinear":
        raise ValueError(f"expected align_corners only with resample 'bilinear', got {resample!r}")
    shares = label_shares(labels, height, width, num_classes, resample, align_corners, ignore_index)
    shares = shares[:, :num_classes]
    if resample == "area":
        # An empty label map covers no part of any cell: its shares are zeros already.
        shares = shares / max(labels.shape[1] * labels.shape[2], 1)
    return shares.float()


def _check_map(labels: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    if labels.dim() != 3:
        raise ValueError(f"expected labels [B, H, W], got {list(labels.shape)}")
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ValueError(f"expected size (h, w), got {size!r}")
    height, width = (check_int("size", extent) for extent in size)
    if min(height, width) < 0:
        raise ValueError(f"expected size (h, w) with h and w at least 0, got {tuple(size)}")
    if 0 in labels.shape[1:] and 0 not in (height, width):
        raise ValueError(f"expected labels with pixels for a grid of {tuple(size)}, got {list(labels.shape)}")
    return height, width
