"""Class-prototype pooling: the features of each class are added up, and divided by its mass once at the end.

The mass of a class is its number of pixels, or the sum of its weights. Sums and masses can be added over images,
batches, shards and ranks. So a prototype over any of these needs one division: `(a + b).means`, never the mean of
means.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, Optional

import torch
from torch import Tensor
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from semshift._checks import (
    FLOATS,
    check_bool,
    check_device,
    check_features,
    check_labelling,
    check_pooled,
    check_tensor,
)
from semshift._label_ops import label_shares
from semshift._pooling_ops import hard_sums
from semshift._soft_ops import soft_sums, sum_dtype
from semshift.labels import resize_labels

__all__ = ["ClassSums", "class_sums", "weighted_class_sums"]


# Not frozen: Fabric refuses to move or save a frozen dataclass. Not a named tuple: torch 2.4 compiles neither its
# properties nor its addition.
@dataclass(eq=False)
class ClassSums:
    """Class sums: the summed features and the mass of each class.

    Add the objects of several batches or ranks with `+`. Then `.means` divides once, and gives the class prototypes:
    the mean feature of each class.

    Args:
        sums: `[(B,) K, C]` float32 (float64 for float64 features), the features of each class added up.
        mass: `[(B,) K]`, the amount that was added: a count of pixels or cells (int64), or a sum of weights in the
            dtype of `sums` for `"area"` and for weights.

    Raises:
        ValueError: on addition, shapes or dtypes that differ.

    Example:
        >>> one = semshift.class_sums(torch.ones(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64), 2)
        >>> (one + one).mass
        tensor([8, 0])
    """

    sums: Tensor
    mass: Tensor

    @property
    def means(self) -> Tensor:
        """Prototypes `[(B,) K, C]` in the dtype of `sums`; an absent class is 0 with gradient 0."""
        present = self.present[..., None]
        # The inner `where` keeps 0 / 0 out of the backward. The outer `where` hides the sums of an absent class,
        # whatever they hold.
        mass = torch.where(self.present, self.mass, 1)[..., None].to(self.sums.dtype)
        return torch.where(present, self.sums / mass, 0.0)

    @property
    def present(self) -> Tensor:
        """`[(B,) K]` bool, True for the classes with a mass above 0."""
        return self.mass > 0

    def to(self, *args: Any, **kwargs: Any) -> "ClassSums":
        """Sums and mass on a device or in a floating dtype, as by `torch.Tensor.to`; counts stay int64.

        Returns:
            The moved `ClassSums`.

        Raises:
            TypeError: a dtype that is not floating point.
        """
        sums = self.sums.to(*args, **kwargs)
        if not sums.is_floating_point():
            raise TypeError(f"expected a floating-point dtype for sums, got {sums.dtype}")
        if self.mass.is_floating_point():
            return ClassSums(sums, self.mass.to(*args, **kwargs))
        flags = {name: value for name, value in kwargs.items() if name in ("copy", "non_blocking")}
        return ClassSums(sums, self.mass.to(sums.device, **flags))

    def detach(self) -> "ClassSums":
        """Sums and mass without their graph.

        Returns:
            The detached `ClassSums`.
        """
        return ClassSums(self.sums.detach(), self.mass.detach())

    def pin_memory(self) -> "ClassSums":
        """Sums and mass in pinned memory; a `DataLoader` with `pin_memory=True` calls this.

        Returns:
            The pinned `ClassSums`.
        """
        return ClassSums(self.sums.pin_memory(), self.mass.pin_memory())

    def __add__(self, other: "ClassSums") -> "ClassSums":
        """Sums and mass of both, added up; `sum(parts)` adds up a list."""
        if not isinstance(other, ClassSums):
            return NotImplemented
        for name in ("sums", "mass"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                raise ValueError(
                    f"expected two ClassSums of the same shape and dtype, got {name} {list(ours.shape)} {ours.dtype} "
                    f"and {list(theirs.shape)} {theirs.dtype}"
                )
        return ClassSums(self.sums + other.sums, self.mass + other.mass)

    def __radd__(self, other: Any) -> "ClassSums":
        # `sum(parts)` begins with 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented


with warnings.catch_warnings():
    # In torch 2.4 this calls a function that torch 2.4 itself deprecates; importing semshift must be silent.
    warnings.simplefilter("ignore", FutureWarning)
    torch.export.register_dataclass(ClassSums)


def _collate(batch: list[ClassSums], **options: Any) -> ClassSums:
    sums, mass = ([getattr(pooled, name) for pooled in batch] for name in ("sums", "mass"))
    return ClassSums(collate(sums, **options), collate(mass, **options))


# The documentation of `torch.utils.data.default_collate` adds a type in this way.
default_collate_fn_map[ClassSums] = _collate


def class_sums(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    ignore_index: Optional[int] = 255,
    resample: Optional[Literal["nearest", "majority", "area", "bilinear"]] = "bilinear",
    align_corners: bool = False,
    per_image: bool = False,
) -> ClassSums:
    """Class sums: the features of each class added up, and its number of pixels.

    `.means` of the result are the class prototypes of Wang et al. 2020 (arXiv 2004.00794), section 3:
    `v_k = sum_i [y_i = k] f_i / sum_i [y_i = k]`. A pixel whose label is `ignore_index` is ignored, whatever its
    features hold. Sums are kept in float32 at least, counts in int64.

    Args:
        features: `[B, C, *S]`, float16, bfloat16, float32 or float64, any strides; differentiable.
            Second derivatives work in eager mode, but not under `torch.compile`.
        labels: `[B, *S']`, uint8, int8, int16, int32 or int64, in `[0, num_classes)` or `ignore_index`. On CUDA any
            other label is ignored without an error, since checking would force a device sync: see `check_labels`.
        num_classes: K, at least 1.
        ignore_index: id of pixels to ignore. None: every label must be a class; any other label raises an error on the
            CPU and is ignored on CUDA. With more than 255 classes the default raises an error: pass None or another id.
        resample: how labels are resampled to a feature grid of a different size, for two spatial dimensions only. At
            equal sizes all options give the same sums. `"bilinear"`: the exact sums of features that are bilinearly
            up-sampled to the labels' size, without up-sampling them. `"nearest"`: the label at the cell's centre.
            `"majority"`: the label that covers the largest part of the cell. `"area"`: each class is weighted by the
            share of the cell that it covers. None refuses labels of a different size.
        align_corners: for `"bilinear"` only, as in `torch.nn.functional.interpolate`.
        per_image: one set of prototypes per image instead of one for the batch.

    Returns:
        `ClassSums` with sums `[(B,) K, C]` and mass `[(B,) K]`. The mass counts label pixels in int64. After resampling
        with `"nearest"` or `"majority"` it counts cells in int64; with `"area"`, cells in the dtype of the sums.

    Raises:
        TypeError: features or labels of a wrong dtype, a count that is not an int, or a flag that is not a bool.
        ValueError: shapes that do not match, labels of a different size with `resample=None` or without two spatial
            dimensions, labels whose aspect ratio suggests that they are transposed, a `num_classes` below 1 (above 255
            with the default `ignore_index`), an unknown option, or align_corners without `"bilinear"`; on the CPU, a
            label out of range.

    Example:
        >>> features = torch.tensor([[[1.0, 3.0, 5.0, 9.0]]])
        >>> labels = torch.tensor([[0, 0, 1, 255]])
        >>> semshift.class_sums(features, labels, 3).means.squeeze(-1)
        tensor([2., 5., 0.])
    """
    check_pooled(features, labels, resample, align_corners)
    num_classes, ignore_index = check_labelling(labels, num_classes, ignore_index)
    check_bool("per_image", per_image)
    size = features.shape[2:]
    if resample is not None and labels.shape[1:] != size:
        if resample in ("nearest", "majority"):
            labels = resize_labels(
                labels, (size[0], size[1]), num_classes, resample=resample, ignore_index=ignore_index
            )
        else:
            return _resampled(features, labels, num_classes, ignore_index, resample, align_corners, per_image)
    sums, mass = hard_sums(features, labels, num_classes, ignore_index, per_image)
    # At equal sizes a cell is a pixel, so the modes differ only in the dtype of the mass.
    return ClassSums(sums, mass.to(sums.dtype) if resample == "area" else mass)


def weighted_class_sums(features: Tensor, weights: Tensor, *, per_image: bool = False) -> ClassSums:
    """Weighted class sums: features added up with a weight per class and cell, such as a network's probabilities.

    On the CPU, a cell whose weights are all 0 adds nothing, whatever its features hold. On CUDA this is a matrix
    product, so all features must be finite.

    Args:
        features: `[B, C, *S]`, float16, bfloat16, float32 or float64; differentiable.
        weights: `[B, K, *S]`, of any of these dtypes; differentiable. With negative weights, `.means` are not means.
        per_image: one set of prototypes per image instead of one for the batch.

    Returns:
        `ClassSums` with sums `[(B,) K, C]` and mass `[(B,) K]`, the sum of the weights, both float32 (float64 if
        either argument is).

    Raises:
        TypeError: features or weights of a wrong dtype, or a per_image that is not a bool.
        ValueError: shapes or devices that do not match.

    Example:
        >>> weights = torch.tensor([[[0.25, 0.75]]])
        >>> semshift.weighted_class_sums(torch.tensor([[[4.0, 8.0]]]), weights).means
        tensor([[7.]])
    """
    check_features(features)
    check_tensor("weights", weights)
    check_bool("per_image", per_image)
    if weights.dtype not in FLOATS:
        raise TypeError(f"expected weights of dtype float16, bfloat16, float32 or float64, got {weights.dtype}")
    if (
        weights.dim() != features.dim()
        or weights.shape[:1] + weights.shape[2:] != features.shape[:1] + features.shape[2:]
    ):
        raise ValueError(
            f"expected weights [B, K, *S] for features [B, C, *S], got {list(weights.shape)} for {list(features.shape)}"
        )
    check_device("features", features, "weights", weights)
    # A last axis of size 1, so that `flatten` also works for `[B, C]`.
    weights = weights.unsqueeze(-1).flatten(2)
    sums = soft_sums(features.unsqueeze(-1).flatten(2), weights)
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
    shares = label_shares(labels, height, width, num_classes, resample, align_corners, ignore_index)[:, :num_classes]
    if resample == "area":
        shares = shares / math.prod(labels.shape[1:])
    pooled = weighted_class_sums(features, shares.to(sum_dtype(features.dtype)), per_image=per_image)
    if resample == "area":
        return pooled
    # Interpolation weights sum to one for each label pixel, so the mass is a count, and rounding makes it exact.
    mass = shares.sum((2, 3)).round().long()
    return ClassSums(pooled.sums, mass if per_image else mass.sum(0))
