"""Training on mixtures of two images: pseudo-labels of the target, and which pixels of the source go on top of it.

The mixture itself is a `torch.where`, of whatever there is for each pixel: images, labels, weights.
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
    """Pseudo-labels, and how far to trust them.

    Example:
        >>> pseudo = semshift.pseudo_labels(torch.tensor([[[9.0, 0.0], [0.0, 0.5]]]))
        >>> pseudo.labels.where(pseudo.sure, 255)
        tensor([[  0, 255]])
    """

    labels: Tensor
    """`[B, *S]` int64, in `[0, K)`."""
    weight: Tensor
    """`[B]` float32 in [0, 1], the share of an image's pixels of which the network is sure."""
    sure: Tensor
    """`[B, *S]` bool, the pixels of which the network is sure: their largest probability exceeds the threshold."""


def pseudo_labels(logits: Tensor, *, threshold: float = 0.968) -> PseudoLabels:
    """Pseudo-labels: the likeliest class of every pixel, and which pixels the network is sure of.

    As in DACS (Tranheden et al. 2021, arXiv 2007.08702), image by image as in DAFormer (Hoyer et al. 2022,
    arXiv 2111.14887), section 3.1: every pixel has a label, and the weight goes before the loss of the image's pixels.
    The logits come from a teacher or the network itself; no gradient flows back. Probabilities by mistake show as a
    weight of 0 at every step.

    Args:
        logits: `[B, K, *S]`, floating point, K at least 2; the softmax is taken in float32 at least.
        threshold: a network is sure where its largest probability exceeds this; in [0, 1].

    Returns:
        `PseudoLabels`: labels `[B, *S]` int64, weight `[B]` float32, 0 for an image without pixels, and sure
        `[B, *S]` bool.

    Raises:
        TypeError: logits that are not a floating-point tensor, or a threshold that is not a number.
        ValueError: another shape, a threshold outside [0, 1], or on the CPU, logits without probabilities, such as
            nan; on CUDA the network is not sure of those.

    Example:
        >>> pseudo = semshift.pseudo_labels(torch.tensor([[[9.0, 0.0], [0.0, 0.5]]]))
        >>> pseudo.labels, pseudo.weight, pseudo.sure
        (tensor([[0, 1]]), tensor([0.5000]), tensor([[ True, False]]))
    """
    check_floating("logits", logits)
    if logits.dim() < 2 or logits.shape[1] < 2:
        raise ValueError(
            f"expected logits [B, K, *S] with K of at least 2 (one logit z of a binary model is the two "
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
            raise ValueError(f"expected logits of which there is a softmax, got nan, inf or only -inf at {pixels}")
    # A last axis of one, so that there is something to flatten in `[B, K]` too. Counted first, divided last.
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
    """ClassMix mask: the pixels of half of the classes of each image, rounded up, which go on top of another image.

    ClassMix (Olsson et al. 2021, arXiv 2007.07936), section 3.1; from source to target as in DACS (Tranheden et al.
    2021, arXiv 2007.08702). Images choose one by one, among the classes that they hold; ignored pixels are never
    chosen. What lies under the mask comes from the source, with a weight of 1, the rest from the target, with the
    weight of its pseudo-labels::

        images = torch.where(mask[:, None], source_images, target_images)
        labels = torch.where(mask, source_labels, pseudo.labels)
        weight = torch.where(mask, 1.0, pseudo.weight[:, None, None])

    Args:
        labels: of the source, `[B, *S]`, uint8, int8, int16, int32 or int64, in `[0, num_classes)` or `ignore_index`.
            On CUDA any other label is never chosen, since checking would force a device sync: see
            `check_labels`.
        num_classes: K, at least 1.
        ignore_index: id of pixels without a class, None if there is none. The default is refused with more than 255
            classes.
        generator: of the choice, on any device; None takes PyTorch's own, on the labels' device. One on the CPU
            chooses the same on every device, and one seeded by the step makes the mask a function of it.
        keys: `[B, K]` finite, in place of the generator: of the classes that an image holds, the
            half with the lower keys is chosen. `torch.rand(B, K, generator=generator)` chooses what `generator` does,
            and goes into a full graph of `torch.compile`, into which no generator goes.

    Returns:
        `[B, *S]` bool, on the device of `labels`.

    Raises:
        TypeError: labels of another dtype, a count that is not an int, or keys that are not floating point.
        ValueError: labels without dimensions of pixels, keys of another shape or beside a generator, or on the CPU a
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
    takes_part = (ids >= 0) & (ids < num_classes)
    if ignore_index is not None:
        takes_part = takes_part & (ids != ignore_index)
    # Pixels without a class have a slot of their own, the last, which is never chosen.
    slots = torch.where(takes_part, ids, num_classes)
    held = torch.zeros(len(labels), num_classes + 1, dtype=torch.bool, device=labels.device)
    held = held.scatter(1, slots, True)[:, :num_classes]
    if keys is None:
        device = labels.device if generator is None else generator.device
        keys = torch.rand(len(labels), num_classes, generator=generator, device=device, dtype=torch.float32)
    # The lower half of the keys is chosen, by rank: equal keys would choose a class too many.
    order = keys.to(labels.device, non_blocking=True).masked_fill(~held, math.inf).argsort(dim=1, stable=True)
    chosen = order.argsort(1) < (held.sum(1, keepdim=True) + 1) // 2
    return F.pad(chosen, (0, 1)).gather(1, slots).reshape(labels.shape)


def _check_keys(keys: Tensor, shape: list[int], generator: Optional[torch.Generator]) -> None:
    check_floating("keys", keys)
    if list(keys.shape) != shape:
        raise ValueError(f"expected keys [B, K] {shape}, got {list(keys.shape)}")
    if generator is not None:
        raise ValueError("expected generator or keys, got both")
    if (seen := readable(keys)) is not None and not (finite := seen.isfinite()).all():
        raise ValueError(f"expected keys to be finite, got {seen[~finite][0].item()}")
