"""Mixtures of two images: pseudo-labels of the target, and a mask of the source pixels to paste on the target.

The mixture itself is a `torch.where` of images, of labels and of weights.
"""

import math
from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from semshift._checks import check_floating, check_labelling, check_number
from semshift._transforms import readable
from semshift.labels import check_labels

__all__ = ["PseudoLabels", "class_mix", "pseudo_labels"]


class PseudoLabels(NamedTuple):
    """Pseudo-labels, the weight of each image, and the mask of the pixels that the network is sure of.

    Example:
        >>> pseudo = semshift.pseudo_labels(torch.tensor([[[9.0, 0.0], [0.0, 0.5]]]))
        >>> pseudo.labels.where(pseudo.sure, 255)
        tensor([[  0, 255]])
    """

    labels: Tensor
    """`[B, *S]` int64, in `[0, K)`."""
    weight: Tensor
    """`[B]` float32 in [0, 1], the share of an image's pixels that the network is sure of."""
    sure: Tensor
    """`[B, *S]` bool, the pixels that the network is sure of: their largest probability exceeds the threshold."""


def pseudo_labels(logits: Tensor, *, threshold: float = 0.968) -> PseudoLabels:
    """Pseudo-labels: the most likely class of every pixel, and which pixels the network is sure of.

    The pseudo-labels are those of DACS (Tranheden et al. 2021, arXiv 2007.08702), with one weight per image as in
    DAFormer (Hoyer et al. 2022, arXiv 2111.14887), section 3.1. Every pixel has a label, and the image's weight
    multiplies the loss of its pixels. The logits come from a teacher or from the network itself. No gradient flows
    back. If you pass probabilities by mistake, the weight is 0 at every step.

    Args:
        logits: `[B, K, *S]`, floating point, K at least 2; the softmax is taken in float32 at least.
        threshold: the network is sure of a pixel if its largest probability exceeds this; in [0, 1].

    Returns:
        `PseudoLabels`: labels `[B, *S]` int64; weight `[B]` float32, 0 for an image without pixels; and sure `[B, *S]`
        bool.

    Raises:
        TypeError: logits that are not a floating-point tensor, or a threshold that is not a number.
        ValueError: a wrong shape or a threshold outside [0, 1]; on the CPU, logits without a softmax, such as nan. On
            CUDA such logits are no error, and `sure` is False for their pixels.

    Example:
        >>> pseudo = semshift.pseudo_labels(torch.tensor([[[9.0, 0.0], [0.0, 0.5]]]))
        >>> pseudo.labels, pseudo.weight, pseudo.sure
        (tensor([[0, 1]]), tensor([0.5000]), tensor([[ True, False]]))
    """
    check_floating("logits", logits)
    if logits.dim() < 2 or logits.shape[1] < 2:
        raise ValueError(
            f"expected logits [B, K, *S] with K of at least 2 (for a binary model with one logit z, stack the two "
            f"logits 0 and z), got {list(logits.shape)}"
        )
    threshold = check_number("threshold", threshold)
    if not 0 <= threshold <= 1:
        raise ValueError(f"expected threshold in [0, 1], got {threshold}")
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    largest, labels = wide.max(1)
    probability = (largest - wide.logsumexp(1)).exp()
    if (seen := readable(probability)) is not None:
        unknown = int(seen.isnan().sum())
        if unknown:
            pixels = f"{unknown} pixel{'s' if unknown > 1 else ''}"
            raise ValueError(f"expected logits that have a softmax, got nan, inf or only -inf at {pixels}")
    # A last axis of size 1, so that `flatten` also works for `[B, K]`. Counted first, divided last.
    sure = probability > threshold
    flat = sure.unsqueeze(-1).flatten(1)
    return PseudoLabels(labels, flat.sum(1).float() / max(flat.shape[1], 1), sure)


def class_mix(
    labels: Tensor,
    num_classes: int,
    *,
    ignore_index: Optional[int] = 255,
    generator: Optional[torch.Generator] = None,
    keys: Optional[Tensor] = None,
) -> Tensor:
    """ClassMix mask: the pixels of half of each image's classes (rounded up), to paste on another image.

    This is ClassMix (Olsson et al. 2021, arXiv 2007.07936), section 3.1, from source to target as in DACS (Tranheden et
    al. 2021, arXiv 2007.08702). Classes are chosen for each image separately, among the classes that the image holds.
    Ignored pixels are never chosen. Pixels under the mask come from the source, with a weight of 1. The rest comes from
    the target, with the weight of its pseudo-labels::

        images = torch.where(mask[:, None], source_images, target_images)
        labels = torch.where(mask, source_labels, pseudo.labels)
        weight = torch.where(mask, 1.0, pseudo.weight[:, None, None])

    Args:
        labels: labels of the source, `[B, *S]`, uint8, int8, int16, int32 or int64, in `[0, num_classes)` or
            `ignore_index`. On CUDA pixels with any other label are never chosen. There is no error, since checking
            would force a device sync: see `check_labels`.
        num_classes: K, at least 1.
        ignore_index: id of pixels to ignore. None: every label must be a class; any other label raises an error on the
            CPU and is ignored on CUDA. With more than 255 classes the default raises an error: pass None or another id.
        generator: random generator for the choice, on any device; None uses PyTorch's default generator of the labels'
            device. A generator on the CPU makes the same choice for labels on every device. A generator that you seed
            by the step makes the mask a function of the step.
        keys: `[B, K]`, floating point and finite, to pass instead of a generator. Of the classes that an image holds,
            the half with the lower keys is chosen. `torch.rand(B, K, generator=generator)` makes the same choice as
            `generator`. Use keys in a full graph of `torch.compile`, which cannot contain a generator.

    Returns:
        `[B, *S]` bool, on the device of `labels`.

    Raises:
        TypeError: labels of a wrong dtype, a count that is not an int, or keys that are not floating point.
        ValueError: labels without pixel dimensions, keys of a wrong shape, or both keys and a generator; on the CPU, a
            label out of range or a key that is not finite.

    Example:
        >>> labels = torch.tensor([[[0, 0, 255], [1, 1, 1]]])
        >>> mask = semshift.class_mix(labels, 2, generator=torch.Generator().manual_seed(0))
        >>> int(mask.sum()) in (2, 3), labels[mask].unique().numel()
        (True, 1)
    """
    num_classes, ignore_index = check_labelling(labels, num_classes, ignore_index)
    if labels.dim() < 2:
        raise ValueError(f"expected labels [B, *S], got {list(labels.shape)}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"expected generator to be a torch.Generator or None, got {type(generator).__name__}")
    if keys is not None:
        _check_keys(keys, [len(labels), num_classes], generator)
    if readable(labels) is not None:
        check_labels(labels, num_classes, ignore_index=ignore_index)
    ids = labels.flatten(1).long()
    counts = (ids >= 0) & (ids < num_classes)
    if ignore_index is not None:
        counts = counts & (ids != ignore_index)
    # Pixels without a class have their own slot, the last one, which is never chosen.
    slots = torch.where(counts, ids, num_classes)
    held = torch.zeros(len(labels), num_classes + 1, dtype=torch.bool, device=labels.device)
    held = held.scatter(1, slots, True)[:, :num_classes]
    if keys is None:
        device = labels.device if generator is None else generator.device
        keys = torch.rand(len(labels), num_classes, generator=generator, device=device, dtype=torch.float32)
    # The lower half of the keys is chosen by rank: a threshold would choose too many classes if keys are equal.
    order = keys.to(labels.device, non_blocking=True).masked_fill(~held, math.inf).argsort(dim=1, stable=True)
    chosen = order.argsort(1) < (held.sum(1, keepdim=True) + 1) // 2
    return F.pad(chosen, (0, 1)).gather(1, slots).reshape(labels.shape)


def _check_keys(keys: Tensor, shape: list[int], generator: Optional[torch.Generator]) -> None:
    check_floating("keys", keys)
    if list(keys.shape) != shape:
        raise ValueError(f"expected keys [B, K] {shape}, got {list(keys.shape)}")
    if generator is not None:
        raise ValueError("expected either generator or keys, got both")
    if (seen := readable(keys)) is not None and not (finite := seen.isfinite()).all():
        raise ValueError(f"expected keys to be finite, got {seen[~finite][0].item()}")
