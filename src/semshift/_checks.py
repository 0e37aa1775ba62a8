"""Argument checks that several modules share. Each error names the argument, the rule and the value."""

import math
import sys
from collections.abc import Sequence
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from semshift._transforms import readable

__all__ = [
    "FLOATS",
    "INTEGERS",
    "check_bool",
    "check_device",
    "check_features",
    "check_finite",
    "check_floating",
    "check_ignore_index",
    "check_int",
    "check_label_dtype",
    "check_labelling",
    "check_number",
    "check_option",
    "check_pooled",
    "check_tensor",
    "check_weight",
    "fits",
]

# Read at import, since torch 2.4 cannot trace `sys.float_info`.
_LARGEST = sys.float_info.max
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_int(name: str, value: int, least: Optional[int] = None) -> int:
    """Check an integer of Python or NumPy and return it as Python's; bools and tensors are refused."""
    # Under torch.compile a size may be symbolic, and `int` would turn it into a constant. The types are a tuple, since
    # Dynamo of torch 2.4 cannot trace a union.
    if isinstance(value, bool) or not isinstance(value, (int, np.integer, torch.SymInt)):
        raise TypeError(f"expected {name} to be an int, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"expected {name} to be at least {least}, got {value}")
    return int(value) if isinstance(value, np.integer) else value


def check_number(name: str, value: float) -> float:
    """Check a number of Python or NumPy and return it as Python's; bools and tensors are refused."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"expected {name} to be a number, got {value!r}")
    if isinstance(value, np.integer):
        return int(value)
    return float(value) if isinstance(value, np.floating) else value


def check_finite(name: str, value: float, *, negative: bool = True) -> float:
    """Check that a number is finite and, unless `negative`, at least 0; return it as Python's."""
    value = check_number(name, value)
    # Compared, since `math.isfinite` fails for an int that is too large for a float.
    if not (-_LARGEST if negative else 0) <= value <= _LARGEST:
        raise ValueError(f"expected {name} to be finite{'' if negative else ' and not negative'}, got {value}")
    return value


def check_bool(name: str, value: bool) -> None:
    """Check that a value is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"expected {name} to be a bool, got {value!r}")


def check_option(name: str, value: object, options: Sequence[Optional[str]]) -> None:
    """Check that a value is one of the options: strings, or None."""
    if value not in options:
        *others, last = (repr(option) for option in options)
        raise ValueError(f"expected {name} to be {', '.join(others)} or {last}, got {value!r}")


def check_tensor(name: str, tensor: object) -> None:
    """Check that a value is a tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(tensor).__name__}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Check that a value is a floating-point tensor."""
    check_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"expected {name} to be floating point, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, of: str, other: Tensor) -> None:
    """Check that two tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"expected {name} and {of} on one device, got {tensor.device} and {other.device}")


def check_weight(
    name: str, weight: Optional[Tensor], of: str, tensor: Tensor, shape: Sequence[int], *, values: bool = True
) -> None:
    """Check a mask, or weights that must be finite and not negative, against the tensor that they belong to."""
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"expected {name} to be a tensor or None, got {type(weight).__name__}")
    if weight.dtype != torch.bool and not weight.is_floating_point():
        raise TypeError(f"expected {name} to be bool or floating point, got {weight.dtype}")
    if list(weight.shape) != list(shape):
        raise ValueError(f"expected {name} {list(shape)} for {of} {list(tensor.shape)}, got {list(weight.shape)}")
    check_device(name, weight, of, tensor)
    if values and weight.is_floating_point() and (seen := readable(weight)) is not None:
        wrong = seen[~((seen >= 0) & (seen < math.inf))]
        if wrong.numel() > 0:
            raise ValueError(f"expected {name} to be finite and not negative, got {wrong[0].item()}")


def check_label_dtype(labels: Tensor) -> None:
    """Check that labels are a tensor of an integer dtype that PyTorch computes in."""
    check_tensor("labels", labels)
    if labels.dtype not in INTEGERS:
        raise TypeError(f"expected labels of dtype uint8, int8, int16, int32 or int64, got {labels.dtype}")


def check_ignore_index(ignore_index: Optional[int], num_classes: int) -> Optional[int]:
    """Check that `ignore_index` is None or fits int64; the default 255 is refused where it would be a class."""
    if ignore_index is None:
        return None
    ignore_index = check_int("ignore_index", ignore_index)
    # The ops pass it on as an int64.
    if not fits(torch.int64, ignore_index):
        raise ValueError(f"expected ignore_index to fit int64, got {ignore_index}")
    if ignore_index == 255 and num_classes > 255:
        raise ValueError(
            f"expected an explicit ignore_index with more than 255 classes (None, or an id that is not a class), "
            f"got 255 with num_classes {num_classes}"
        )
    return ignore_index


def check_labelling(labels: Tensor, num_classes: int, ignore_index: Optional[int]) -> tuple[int, Optional[int]]:
    """Check labels, `num_classes` and `ignore_index`; return the last two as Python's ints."""
    check_label_dtype(labels)
    num_classes = check_int("num_classes", num_classes, 1)
    return num_classes, check_ignore_index(ignore_index, num_classes)


def check_features(features: Tensor) -> None:
    """Check that features are `[B, C, *S]` of a dtype that pooling supports."""
    check_tensor("features", features)
    if features.dtype not in FLOATS:
        raise TypeError(f"expected features of dtype float16, bfloat16, float32 or float64, got {features.dtype}")
    if features.dim() < 2:
        raise ValueError(f"expected features [B, C, *S], got {list(features.shape)}")


def check_pooled(features: Tensor, labels: Tensor, resample: Optional[str], align_corners: bool) -> None:
    """Check that features and labels fit together, and that `resample` can bring them to one size."""
    check_features(features)
    check_label_dtype(labels)
    if labels.dim() != features.dim() - 1 or labels.shape[0] != features.shape[0]:
        raise ValueError(
            f"expected labels [B, {'H, W' if features.dim() == 4 else '*S'}] for features "
            f"{list(features.shape)}, got {list(labels.shape)}"
        )
    check_device("features", features, "labels", labels)
    check_option("resample", resample, ("bilinear", "nearest", "majority", "area", None))
    check_bool("align_corners", align_corners)
    if align_corners and resample != "bilinear":
        raise ValueError(f"expected align_corners only with resample 'bilinear', got {resample!r}")
    size = features.shape[2:]
    if labels.shape[1:] == size:
        return
    if resample is None:
        raise ValueError(
            f"expected labels of the features' size {list(size)} with resample None (the default 'bilinear' accepts "
            f"any size), got labels {list(labels.shape)} for features {list(features.shape)}"
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
    _check_aspect(features, labels)


def _check_aspect(features: Tensor, labels: Tensor) -> None:
    """Refuse label maps that look transposed: resampling would stretch them to fit, without an error."""
    (height, width), (rows, columns) = features.shape[2:], labels.shape[1:]
    # Below 4 cells a side, the aspect ratio of the features is too coarse to judge by.
    if min(height, width) >= 4 and (rows * width > 2 * columns * height or columns * height > 2 * rows * width):
        raise ValueError(
            f"expected labels with about the aspect ratio of the features, got labels {list(labels.shape)} for "
            f"features {list(features.shape)}: are the labels transposed?"
        )


def fits(dtype: torch.dtype, value: int) -> bool:
    """Whether an integer dtype can hold a value."""
    info = torch.iinfo(dtype)
    return info.min <= value <= info.max
