"""Pixel-to-prototype contrast: each feature is drawn to the prototypes of its class, and away from all others.

It needs labels or pseudo-labels, and no discriminator.
"""

import math
from typing import Literal, Optional

import torch
from torch import Tensor

from semshift._checks import FLOATS, check_device, check_finite, check_pooled, check_tensor
from semshift._soft_ops import soft_sums
from semshift._transforms import readable
from semshift.distributed import all_reduce_sum
from semshift.pooling import class_sums

__all__ = ["prototype_contrast_loss"]


def prototype_contrast_loss(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    temperature: float = 0.1,
    ignore_index: Optional[int] = 255,
    resample: Optional[Literal["nearest", "majority", "area", "bilinear"]] = "bilinear",
    align_corners: bool = False,
) -> Tensor:
    """Pixel-to-prototype contrastive loss: cross-entropy of telling a pixel's class by its cosines to the prototypes.

    With `p_dk` the prototype of class k in domain d and t the temperature, a pixel of class y with feature f costs::

        -mean_d log(exp(cos(f, p_dy) / t) / sum_dk exp(cos(f, p_dk) / t))

    over the domains that have its class, and the loss is the mean over pixels. Prototypes of zeros are classes that a
    domain lacks, as in the means of `PrototypeBank` and `ClassSums`: they are left out of the sums, and a pixel whose
    class has no prototype in any domain is ignored.

    The average over positives is L_out of Khosla et al. 2020 (arXiv 2004.11362). Prototypes in the place of pixels are
    from ProCA (Jiang et al. 2022, arXiv 2207.06654), the centroid-aware contrast of SePiCo (Xie et al. 2022,
    arXiv 2204.08808) and Zhou et al. 2022 (arXiv 2203.15102); Morales-Brotons et al. 2024 (arXiv 2411.18728) use
    pixel contrast with a small labelled target set.

    With `torch.distributed` initialised the loss is that of the whole batch. Every rank must call it, with the same
    prototypes, and run the backward; average the gradients over ranks, as `DistributedDataParallel` does.

    Args:
        features: `[B, C, *S]`, float16, bfloat16, float32 or float64, of either domain; differentiable. Where they
            are 0 they have no direction: every cosine is 0, and so is the gradient.
        labels: `[B, *S']`, uint8, int8, int16, int32 or int64, in `[0, K)` or `ignore_index`; pseudo-labels too. On
            CUDA any other label is ignored, since checking would force a device sync: see `check_labels`.
        prototypes: `[K, C]`, or `[D, K, C]` of D domains, of any of the dtypes of features; finite, which is checked
            on the CPU. Differentiable; those of a `PrototypeBank` are constants.
        temperature: t, above 0; the smaller, the more the nearest wrong prototypes count.
        ignore_index: id of pixels without a class, None if there is none. The default is refused with more than 255
            classes.
        resample: how labels meet a feature grid of another size, see `class_sums`. `"bilinear"` is the loss at the
            labels' size, of log-probabilities that are up-sampled to it.
        align_corners: of `"bilinear"`, as in `torch.nn.functional.interpolate`.

    Returns:
        A scalar, float32 (float64 if features or prototypes are); 0 with gradient 0 where no pixel counts. Loss and
        gradient are nan if a pixel that counts has features that are not finite, or so large that their squares are
        not.

    Raises:
        TypeError: features, labels or prototypes of another dtype, a temperature that is not a number, or a flag that
            is not a bool.
        ValueError: shapes or devices that do not belong together, a temperature that is not above 0, an unknown option,
            or on the CPU a label out of range or a prototype that is not finite.

    Example:
        >>> prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> features = torch.tensor([[[2.0, 0.0, 5.0], [0.0, 3.0, 5.0]]])
        >>> semshift.prototype_contrast_loss(features, torch.tensor([[0, 0, 255]]), prototypes, temperature=1.0)
        tensor(0.8133)
    """
    check_pooled(features, labels, resample, align_corners)
    _check_prototypes(prototypes, features)
    temperature = check_finite("temperature", temperature)
    if temperature <= 0:
        raise ValueError(f"expected temperature to be above 0, got {temperature}")
    num_classes = prototypes.shape[-2]
    costs, present = _costs(features, prototypes if prototypes.dim() == 3 else prototypes[None], temperature)
    pooled = class_sums(
        costs, labels, num_classes, ignore_index=ignore_index, resample=resample, align_corners=align_corners
    )
    # Row k adds up the pixels of class k, column k what they cost as class k, the last column those without a cost.
    spoilt = present & (pooled.sums[:, -1] > 0)
    total = pooled.sums.diagonal() * torch.where(spoilt, math.nan, 1.0).to(pooled.sums.dtype)
    total = all_reduce_sum(total.sum())
    mass = all_reduce_sum(torch.where(present, pooled.mass, 0).sum())
    return total / torch.where(mass > 0, mass, 1).to(total.dtype)


def _costs(features: Tensor, prototypes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What each pixel would cost as each class, 0 where that has no prototype, and which of the K classes have one.

    `[B, K + 1, *S]`: the last map marks the pixels whose features are not finite. As nan, a pixel of one class would
    spoil all of them wherever pooling is a matrix product.
    """
    dtype = torch.promote_types(torch.promote_types(features.dtype, prototypes.dtype), torch.float32)
    info = torch.finfo(dtype)
    pixels = features.unsqueeze(-1).flatten(2)
    lengths = torch.linalg.vector_norm(pixels, dim=1, keepdim=True, dtype=dtype)
    finite = lengths < info.max**0.5 / 2
    pixels = torch.where(finite, pixels, 0).to(dtype)
    rows = prototypes.flatten(0, 1).to(dtype)
    rows, held = rows * _inverse_length(rows, 1) / temperature, (rows != 0).any(1, keepdim=True)
    # Not `@`, which autocast and the precision switches would take below float32.
    logits = soft_sums(pixels.mT, rows.expand(len(pixels), -1, -1)) * _inverse_length(pixels, 1)
    # Not -inf: with no class at all the softmax would be nan.
    logits = torch.where(held, logits, info.min)
    losses = torch.where(held, -logits.log_softmax(1), 0.0)
    num_domains, num_classes, _ = prototypes.shape
    domains = held.view(num_domains, num_classes).sum(0)
    costs = losses.reshape(len(pixels), num_domains, num_classes, pixels.shape[2]).sum(1)
    costs = costs / torch.where(domains > 0, domains, 1).to(dtype)[:, None]
    costs = torch.cat([costs, (~finite).to(dtype)], 1)
    return costs.reshape(len(features), num_classes + 1, *features.shape[2:]), domains > 0


def _inverse_length(x: Tensor, dim: int) -> Tensor:
    """1 / |x|; 0 with gradient 0 where x is 0, or so small that its square is."""
    square = x.square().sum(dim, keepdim=True)
    return torch.where(square < torch.finfo(x.dtype).tiny, math.inf, square).rsqrt()


def _check_prototypes(prototypes: Tensor, features: Tensor) -> None:
    check_tensor("prototypes", prototypes)
    if prototypes.dtype not in FLOATS:
        raise TypeError(f"expected prototypes of dtype float16, bfloat16, float32 or float64, got {prototypes.dtype}")
    channels = features.shape[1]
    if prototypes.dim() not in (2, 3) or prototypes.shape[-1] != channels or 0 in prototypes.shape[:-1]:
        raise ValueError(
            f"expected prototypes [K, {channels}] or [D, K, {channels}] for features {list(features.shape)}, got "
            f"{list(prototypes.shape)}"
        )
    check_device("prototypes", prototypes, "features", features)
    if (seen := readable(prototypes)) is not None:
        squares = seen.detach().to(torch.promote_types(seen.dtype, torch.float32)).square().sum(-1)
        if not squares.isfinite().all():
            raise ValueError(f"expected prototypes to be finite, and their squares too, got {seen.abs().max().item()}")
