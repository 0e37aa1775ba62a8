"""Label maps on the feature grid, and the checks that belong where labels are loaded."""

from collections.abc import Mapping
from typing import Literal, Optional, Union

import torch
from torch import Tensor

__all__ = ["check_labels", "class_shares", "remap_labels", "resize_labels"]

_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Elements of shares that are held beside the result, unless a single image has more.
_HELD = 2**20


def check_labels(labels: Tensor, num_classes: int, *, ignore_index: Optional[int] = 255) -> None:
    """Refuse labels outside `[0, num_classes)` that are not `ignore_index`, on any device.

    It waits for the device. Call it where labels are loaded: pooling on CUDA does not look, and such a label takes no
    part there.

    Args:
        labels: any shape, uint8, int8, int16, int32 or int64.
        num_classes: K, at least 1.
        ignore_index: id of pixels without a class; None if there is none.

    Raises:
        TypeError: labels of another dtype, or a count that is no int.
        ValueError: a label out of range, with how many of which there are; or `num_classes` over 255 with the
            default `ignore_index`.

    Example:
        >>> check_labels(torch.tensor([[0, 18, 255]]), 19)
        >>> check_labels(torch.tensor([[0, 19, 19]]), 19)
        Traceback (most recent call last):
        ValueError: expected labels in [0, 19) or ignore_index 255, got 19 (2 pixels)
    """
    _check_arguments(labels, num_classes, ignore_index)
    ignored = _ignored(labels, ignore_index)
    _check_values(labels if ignored is None else labels.masked_fill(ignored, 0), num_classes, ignore_index)


def _check_values(ids: Tensor, num_classes: int, ignore_index: Optional[int]) -> None:
    """What `check_labels` promises, of labels whose ignored pixels are a class by now."""
    if ids.numel() == 0:
        return
    low, high = torch.aminmax(ids)
    if int(low) < 0 or int(high) >= num_classes:
        wide = ids.long()
        values, counts = torch.unique(wide[(wide < 0) | (wide >= num_classes)], return_counts=True)
        came = ", ".join(f"{v} ({c} pixel{'s' if c > 1 else ''})" for v, c in zip(values[:5].tolist(), counts.tolist()))
        more = f" and {len(values) - 5} more values" if len(values) > 5 else ""
        or_ignored = "" if ignore_index is None else f" or ignore_index {ignore_index}"
        raise ValueError(f"expected labels in [0, {num_classes}){or_ignored}, got {came}{more}")


def remap_labels(labels: Tensor, table: Union[Mapping[int, int], Tensor]) -> Tensor:
    """Give every label its new id by a table.

    An id that the table lacks is an error, not a guess: a data set whose ids are not what one thinks scores 1 %.
    It waits for the device.

    Args:
        labels: any shape, uint8, int8, int16, int32 or int64.
        table: old id to new id, for every id that occurs, the ignored one included; or `[N]` of such a dtype, the
            new ids of 0 to N - 1.

    Returns:
        Labels of the same shape and dtype. Widen uint8 first where a new id does not fit.

    Raises:
        TypeError: labels or a table of another dtype, or an id in the table that is no int.
        ValueError: a label that the table lacks, an empty table or one of another shape, or a new id that the dtype
            of the labels cannot hold.

    Example:
        >>> remap_labels(torch.tensor([7, 8, 0], dtype=torch.uint8), {0: 255, 7: 0, 8: 1})
        tensor([  0,   1, 255], dtype=torch.uint8)
    """
    _check_dtype(labels)
    if isinstance(table, Tensor):
        if table.dtype not in _DTYPES:
            raise TypeError(f"expected table of dtype uint8, int8, int16, int32 or int64, got {table.dtype}")
        if table.dim() != 1:
            raise ValueError(f"expected table [N], got {list(table.shape)}")
        table = dict(enumerate(table.tolist()))
    if not isinstance(table, Mapping):
        raise TypeError(f"expected table to be a mapping or a tensor, got {type(table).__name__}")
    if not table:
        raise ValueError("expected table to map at least one id, got an empty one")
    for old, new in table.items():
        for value in (old, new):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"expected the ids of table to be ints, got {value!r}")
            if not _holds(torch.int64, value):
                raise ValueError(f"expected the ids of table to fit int64, got {value}")
    unfit = sorted(new for new in table.values() if not _holds(labels.dtype, new))
    if unfit:
        raise ValueError(f"expected table to hold new ids that {labels.dtype} can hold, got {unfit[0]}")
    olds = torch.tensor(sorted(table), device=labels.device)
    news = torch.tensor([table[old] for old in sorted(table)], device=labels.device)
    wide = labels.long()
    place = torch.searchsorted(olds, wide).clamp(max=len(olds) - 1)
    unknown = olds[place] != wide
    if unknown.any():
        values = torch.unique(wide[unknown])
        more = f" and {len(values) - 5} more" if len(values) > 5 else ""
        count = int(unknown.sum())
        came = f"{', '.join(map(str, values[:5].tolist()))}{more} ({count} pixel{'s' if count > 1 else ''})"
        raise ValueError(f"expected labels to be ids of table, got {came}")
    return news[place].to(labels.dtype)


def resize_labels(
    labels: Tensor,
    size: tuple[int, int],
    *,
    mode: Literal["nearest", "majority"],
    num_classes: int,
    ignore_index: Optional[int] = 255,
    min_share: float = 0.0,
) -> Tensor:
    """Bring a label map to another size, one label a cell.

    Args:
        labels: `[B, H, W]`, uint8, int8, int16, int32 or int64.
        size: `(h, w)` of the result, coarser or finer.
        mode: `"nearest"` takes the label at the cell's centre (PyTorch's `nearest-exact`); `"majority"` the label
            that covers most of the cell, pixels on its border by the part inside. Ignored pixels vote for ignoring;
            ties go to the lower id, and to a class before ignoring.
        num_classes: K, at least 1.
        ignore_index: id of pixels without a class; None if there is none.
        min_share: with `"majority"`, a cell whose label covers less than this share of it is ignored; in [0, 1].

    Returns:
        `[B, h, w]` in the dtype of `labels`.

    Raises:
        TypeError: labels of another dtype, or a min_share that is no number.
        ValueError: a wrong shape, size, mode or share; on the CPU, a label out of range.

    Example:
        >>> labels = torch.tensor([[[0, 0, 1, 1], [0, 1, 1, 255]]])
        >>> resize_labels(labels, (1, 2), mode="majority", num_classes=2)
        tensor([[[0, 1]]])
    """
    _check_arguments(labels, num_classes, ignore_index)
    _check_map(labels, size)
    if mode not in ("nearest", "majority"):
        raise ValueError(f"expected mode to be 'nearest' or 'majority', got {mode!r}")
    if not isinstance(min_share, (int, float)) or isinstance(min_share, bool):
        raise TypeError(f"expected min_share to be a number, got {min_share!r}")
    if not 0 <= min_share <= 1:
        raise ValueError(f"expected min_share in [0, 1], got {min_share}")
    if min_share > 0 and (mode != "majority" or ignore_index is None):
        raise ValueError(
            f"expected min_share only with mode 'majority' and an ignore_index, got {mode!r} and {ignore_index}"
        )
    if min_share > 0 and ignore_index is not None and not _holds(labels.dtype, ignore_index):
        raise ValueError(f"expected an ignore_index that {labels.dtype} can hold, got {ignore_index}")
    resized: Tensor = _resize(labels, size[0], size[1], mode, num_classes, ignore_index, float(min_share))
    return resized


@torch.library.custom_op("semshift::resize_labels", mutates_args=())
def _resize(
    labels: Tensor,
    height: int,
    width: int,
    mode: str,
    num_classes: int,
    ignore_index: Optional[int],
    min_share: float,
) -> Tensor:
    """The definition of either mode; `[B, h, w]` in the dtype of the labels."""
    if mode == "nearest":
        if _is_looked_at(labels):
            # The pixels that no cell takes are looked at too: a wrong label is wrong wherever it lies.
            check_labels(labels, num_classes, ignore_index=ignore_index)
        if height * width == 0:
            return labels.new_empty((len(labels), height, width))
        rows, columns = (_centres(n, to, labels.device) for n, to in zip(labels.shape[1:], (height, width)))
        return labels[:, rows][:, :, columns]
    votes = _shares(labels, height, width, num_classes, "area", False, ignore_index)
    share, winner = votes.max(1).values, votes.argmax(1)
    if ignore_index is not None and _holds(labels.dtype, ignore_index):
        ignored = ignore_index
    else:
        # Only unchecked labels on CUDA come here; they are to stay out of range.
        info = torch.iinfo(labels.dtype)
        ignored = info.max if info.max >= num_classes else info.min
    # Votes count in integers, and a quotient is rounded as the decimal that a user writes.
    pixels = max(1, labels.shape[1] * labels.shape[2])
    kept = (winner < num_classes) & (share / pixels >= min_share)
    return torch.where(kept, winner, ignored).to(labels.dtype)


@_resize.register_fake
def _(
    labels: Tensor,
    height: int,
    width: int,
    mode: str,
    num_classes: int,
    ignore_index: Optional[int],
    min_share: float,
) -> Tensor:
    return labels.new_empty((labels.shape[0], height, width))


def class_shares(
    labels: Tensor,
    size: tuple[int, int],
    num_classes: int,
    *,
    mode: Literal["area", "bilinear"],
    align_corners: bool = False,
    ignore_index: Optional[int] = 255,
) -> Tensor:
    """The weight of each class in each cell of another grid.

    With `"area"`, the share of the cell that the class covers, so the weights of a cell sum to at most 1; ignored
    pixels fill the rest. With `"bilinear"`, the transpose of bilinear interpolation from the grid to the labels,
    applied to the class's mask, so the weights of a class sum to its label pixels, and pooling features by them is
    pooling the up-sampled features.

    Args:
        labels: `[B, H, W]`, uint8, int8, int16, int32 or int64.
        size: `(h, w)` of the grid, coarser or finer than the labels.
        num_classes: K, at least 1.
        mode: `"area"` or `"bilinear"`.
        align_corners: of the interpolation; only with `"bilinear"`.
        ignore_index: id of pixels without a class; None if there is none.

    Returns:
        `[B, K, h, w]` float32.

    Raises:
        TypeError: labels of another dtype.
        ValueError: a wrong shape, size or mode; on the CPU, a label out of range.

    Example:
        >>> labels = torch.tensor([[[0, 0, 1, 255]]])
        >>> class_shares(labels, (1, 2), 2, mode="area").tolist()
        [[[[1.0, 0.0]], [[0.0, 0.5]]]]
    """
    _check_arguments(labels, num_classes, ignore_index)
    _check_map(labels, size)
    if mode not in ("area", "bilinear"):
        raise ValueError(f"expected mode to be 'area' or 'bilinear', got {mode!r}")
    if align_corners and mode != "bilinear":
        raise ValueError(f"expected align_corners only with mode 'bilinear', got {mode!r}")
    shares: Tensor = _shares(labels, size[0], size[1], num_classes, mode, align_corners, ignore_index)[:, :num_classes]
    if mode == "area":
        # An empty label map covers no part of any cell; its shares are zeros already.
        shares = shares / max(labels.shape[1] * labels.shape[2], 1)
    return shares.float()


@torch.library.custom_op("semshift::label_shares", mutates_args=())
def _shares(
    labels: Tensor,
    height: int,
    width: int,
    num_classes: int,
    mode: str,
    align_corners: bool,
    ignore_index: Optional[int],
) -> Tensor:
    """Weights `[B, K + 1, h, w]` in float64, the last row of ignored pixels; area in units of 1 / (h * w) pixels."""
    # Where the cells of a pixel's class begin in a line of all classes.
    begins = _slots(labels, num_classes, ignore_index, check=True).long() * width
    device = labels.device
    rows, in_row, row_weights = _overlaps(labels.shape[1], height, mode, align_corners, device)
    columns, in_column, column_weights = _overlaps(labels.shape[2], width, mode, align_corners, device)
    # Along the columns first, where a pixel meets few cells; then whole rows at a time, by a product.
    lines, cells = labels.shape[1], (num_classes + 1) * width
    shares = labels.new_empty((len(labels), height, cells), dtype=torch.float64)
    by_row = shares.new_zeros((height, lines)).index_put_((in_row, rows), row_weights, accumulate=True)
    # Small images together, large ones one by one.
    some = max(1, min(len(labels), _HELD // max(1, lines * cells)))
    line = torch.arange(some * lines, device=device).view(some, lines, 1) * cells
    for share, begin in zip(torch.split(shares, some), torch.split(begins, some)):
        across = share.new_zeros((len(begin), lines, cells))
        keys = begin[:, :, columns] + (line[: len(begin)] + in_column)
        across.view(-1).index_add_(0, keys.flatten(), column_weights.expand(len(begin) * lines, -1).flatten())
        torch.matmul(by_row, across, out=share)
    shares = shares.view(len(labels), height, num_classes + 1, width).movedim(2, 1)
    return shares.contiguous()


@_shares.register_fake
def _(
    labels: Tensor,
    height: int,
    width: int,
    num_classes: int,
    mode: str,
    align_corners: bool,
    ignore_index: Optional[int],
) -> Tensor:
    return labels.new_empty((labels.shape[0], num_classes + 1, height, width), dtype=torch.float64)


def _slots(labels: Tensor, num_classes: int, ignore_index: Optional[int], *, check: bool) -> Tensor:
    """Class of each pixel, or `num_classes` where it has none; looks at the values on the CPU only, and if told to.

    In the dtype of the labels where that holds `num_classes`: eight passes over int64 cost more than those over uint8.
    """
    narrow = labels if _holds(labels.dtype, num_classes) else labels.long()
    if check and _is_looked_at(labels) and _all_take_part(narrow, num_classes, ignore_index):
        return narrow
    ignored = _ignored(narrow, ignore_index)
    if not _is_looked_at(labels):
        nowhere = (narrow < 0) | (narrow >= num_classes)
        return narrow.masked_fill(nowhere if ignored is None else nowhere | ignored, num_classes)
    if not check:
        return narrow if ignored is None else narrow.masked_fill(ignored, num_classes)
    # A class stands in for the ignored pixels while the others are looked at.
    classes = narrow if ignored is None else narrow.masked_fill(ignored, 0)
    _check_values(classes, num_classes, ignore_index)
    return classes if ignored is None else classes.masked_fill_(ignored, num_classes)


def _all_take_part(labels: Tensor, num_classes: int, ignore_index: Optional[int]) -> bool:
    if labels.numel() == 0:
        return True
    low, high = (int(value) for value in torch.aminmax(labels))
    return low >= 0 and high < num_classes and (ignore_index is None or not low <= ignore_index <= high)


def _is_looked_at(labels: Tensor) -> bool:
    # Elsewhere a look would wait for the device.
    return labels.device.type == "cpu"


def _ignored(labels: Tensor, ignore_index: Optional[int]) -> Optional[Tensor]:
    # In uint8 a comparison with -1 would match 255.
    return None if ignore_index is None or not _holds(labels.dtype, ignore_index) else labels == ignore_index


def _overlaps(
    pixels: int, cells: int, mode: str, align_corners: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis, every pair of a pixel and a cell that meet, and with which weight (float64)."""
    if pixels == 0 or cells == 0:
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return none, none, none.double()
    if mode == "area":
        # In units in which a pixel is `cells` long and a cell `pixels` long, every border is an integer: the
        # overlaps are exact. Pairs are the pieces between neighbouring borders of either kind.
        borders = (
            torch.cat(
                [torch.arange(pixels + 1, device=device) * cells, torch.arange(cells + 1, device=device) * pixels]
            )
            .sort()
            .values
        )
        length = borders.diff()
        left = borders[:-1][length > 0]
        return left // cells, left // pixels, length[length > 0].double()
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
    return (2 * torch.arange(cells, device=device) + 1) * pixels // (2 * max(cells, 1))


def _holds(dtype: torch.dtype, value: int) -> bool:
    info = torch.iinfo(dtype)
    return info.min <= value <= info.max


def _check_arguments(labels: Tensor, num_classes: int, ignore_index: Optional[int]) -> None:
    _check_dtype(labels)
    _check_int("num_classes", num_classes)
    if num_classes < 1:
        raise ValueError(f"expected num_classes to be at least 1, got {num_classes}")
    if ignore_index is not None:
        _check_int("ignore_index", ignore_index)
        # What holds it is an int64 from here on.
        if not _holds(torch.int64, ignore_index):
            raise ValueError(f"expected ignore_index to fit int64, got {ignore_index}")
    if ignore_index == 255 and num_classes > 255:
        raise ValueError(
            f"expected an explicit ignore_index (None, or an id that is no class) with more than 255 classes, "
            f"got 255 with num_classes {num_classes}"
        )


def _check_dtype(labels: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"expected labels to be a tensor, got {type(labels).__name__}")
    if labels.dtype not in _DTYPES:
        raise TypeError(f"expected labels of dtype uint8, int8, int16, int32 or int64, got {labels.dtype}")


def _check_int(name: str, value: int) -> None:
    # A symbolic size under torch.compile is an int too, but not an instance of it.
    # A tuple, since Dynamo of torch 2.4 cannot trace a union.
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"expected {name} to be an int, got {value!r}")


def _check_map(labels: Tensor, size: tuple[int, int]) -> None:
    if labels.dim() != 3:
        raise ValueError(f"expected labels [B, H, W], got {list(labels.shape)}")
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ValueError(f"expected size (h, w), got {size!r}")
    for extent in size:
        _check_int("size", extent)
    if min(size) < 0:
        raise ValueError(f"expected size (h, w) of at least 0 each way, got {tuple(size)}")
    if 0 in labels.shape[1:] and 0 not in size:
        raise ValueError(f"expected labels with pixels for a grid of {tuple(size)}, got {list(labels.shape)}")
