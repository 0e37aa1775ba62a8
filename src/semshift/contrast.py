"""Pixel-to-prototype contrast: a loss that pulls each feature towards its class's prototypes and away from all others.

The loss needs labels or pseudo-labels, and no discriminator.
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
    """Pixel-to-prototype contrastive loss: cross-entropy over cosine similarities of features and prototypes.

    A prototype is the mean feature of a class. Let `p_dk` be the prototype of class k in domain d, `cos` the cosine
    similarity and t the temperature. The cost of a pixel of class y with feature f is::

        -mean_d log(exp(cos(f, p_dy) / t) / sum_dk exp(cos(f, p_dk) / t))

    The mean is over the domains that have class y. The loss is the mean cost over pixels. A prototype of zeros means
    that the domain lacks the class, as in the means of `PrototypeBank` and `ClassSums`. Such a prototype is left out of
    the sums. A pixel is ignored if its class has no prototype in any domain.

    The mean over positives (here the prototypes of class y), taken outside the logarithm, is L_out of Khosla et al.
    2020 (arXiv 2004.11362). Contrast with prototypes instead of pixels is from ProCA (Jiang et al. 2022, arXiv
    2207.06654), SePiCo (its centroid-aware contrast; Xie et al. 2022, arXiv 2204.08808) and Zhou et al. 2022 (arXiv
    2203.15102). Morales-Brotons et al. 2024 (arXiv 2411.18728) use pixel contrast with a small labelled target set.

    With `torch.distributed` initialised, the loss is computed over the batch of all ranks. Every rank must call the
    function with the same prototypes and run the backward. Average the gradients over ranks, as
    `DistributedDataParallel` does.

    Args:
        features: `[B, C, *S]`, float16, bfloat16, float32 or float64, of either domain; differentiable. A feature of
            zeros has no direction: all its cosines are 0, and so is its gradient.
        labels: `[B, *S']`, uint8, int8, int16, int32 or int64, in `[0, K)` or `ignore_index`; pseudo-labels too. On
            CUDA any other label is ignored without an error, since checking would force a device sync: see
            `check_labels`.
        prototypes: `[K, C]`, or `[D, K, C]` of D domains, of any dtype that features may have. They must be finite,
            which is checked on the CPU. Differentiable; the prototypes of a `PrototypeBank` have no gradient.
        temperature: t, above 0; the smaller it is, the more the nearest wrong prototypes count.
        ignore_index: id of pixels to ignore. None: every label must be a class; any other label raises an error on the
            CPU and is ignored on CUDA. With more than 255 classes the default raises an error: pass None or another id.
        resample: how labels are resampled to a feature grid of a different size, see `class_sums`. `"bilinear"`
            computes the loss at the labels' size, from up-sampled log-probabilities.
        align_corners: for `"bilinear"` only, as in `torch.nn.functional.interpolate`.

    Returns:
        A scalar, float32 (float64 if features or prototypes are); 0 with gradient 0 if no pixel counts. Loss and
        gradient are nan if a pixel that counts has features that are not finite, or so large that their squares are not
        finite.

    Raises:
        TypeError: features, labels or prototypes of a wrong dtype, a temperature that is not a number, or a flag that
            is not a bool.
        ValueError: shapes or devices that do not match, a temperature that is not above 0, or an unknown option; on the
            CPU, a label out of range or a prototype that is not finite.

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
    # Row k adds up the pixels of class k. Column k holds their costs as class k. The last column is above 0 if a
    # feature is not finite.
    spoilt = present & (pooled.sums[:, -1] > 0)
    total = pooled.sums.diagonal() * torch.where(spoilt, math.nan, 1.0).to(pooled.sums.dtype)
    total = all_reduce_sum(total.sum())
    mass = all_reduce_sum(torch.where(present, pooled.mass, 0).sum())
    return total / torch.where(mass > 0, mass, 1).to(total.dtype)


def _costs(features: Tensor, prototypes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Costs of each pixel as each class, 0 for classes without a prototype; and which of the K classes have one.

    The costs are `[B, K + 1, *S]`. The last map marks the pixels whose features are not finite. A cost of nan instead
    would make all classes nan where pooling is a matrix product.
    """
    dtype = torch.promote_types(torch.promote_types(features.dtype, prototypes.dtype), torch.float32)
    info = torch.finfo(dtype)
    pixels = features.unsqueeze(-1).flatten(2)
    lengths = torch.linalg.vector_norm(pixels, dim=1, keepdim=True, dtype=dtype)
    finite = lengths < info.max**0.5 / 2
    pixels = torch.where(finite, pixels, 0).to(dtype)
    rows = prototypes.flatten(0, 1).to(dtype)
    rows, held = rows * _inverse_length(rows, 1) / temperature, (rows != 0).any(1, keepdim=True)
    # Not `@`, since autocast and the precision switches would compute that product below float32.
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
    """1 / |x|; 0 with gradient 0 where x is 0, or so small that its square underflows."""
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
