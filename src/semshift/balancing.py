"""The weight of a confusion loss, from the gradients that it and the task loss have at the features."""

import torch
from torch import Tensor

from semshift._checks import check_finite
from semshift._gradients import norm_over_ranks

__all__ = ["balanced_weight"]


def balanced_weight(loss: Tensor, confusion: Tensor, features: Tensor, ratio: float) -> Tensor:
    """Adaptive weight that makes the confusion loss's gradient at the features `ratio` times the task loss's gradient.

    This is the adaptive weight of VQGAN (Esser et al. 2021, arXiv 2012.09841), section 3.1, as a ratio of Euclidean
    norms. A call takes two more passes from the losses back to the features, or four in float16. With several ranks,
    the norms are computed over the batch of all ranks, and every rank must call the function. With float16 autocast,
    call the function inside the autocast context. There, the function scales the losses, so that float16 does not lose
    small gradients.

    Args:
        loss: the task loss (the segmentation loss), a scalar computed from `features`.
        confusion: `AlignmentLosses.confusion`, computed from `features` too.
        features: the tensor that both losses were computed from, not a slice or a copy of it. If your images come in
            several batches, concatenate them before the head, and pass the features of all images.
        ratio: the norm of the weighted confusion loss's gradient, divided by that of the task loss's gradient; finite
            and not negative. With 0.1, the task loss's gradient is ten times as large.

    Returns:
        A detached float32 scalar, at least 0; 0 if either gradient is 0.

    Raises:
        TypeError: losses or features that are not floating-point tensors, or a ratio that is not a number.
        ValueError: a loss that is not a scalar or was not computed from `features`, or a ratio out of range.
        RuntimeError: activation checkpointing with `use_reentrant=True`, a compiled network that frees its buffers in
            the backward, or a backward that has already freed the graph. The message gives the fix.

    Example:
        >>> features = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> semshift.balanced_weight(features.square().sum(), features.sum().abs(), features, 0.5).round(decimals=3)
        tensor(3.5360)
    """
    ratio = check_finite("ratio", ratio, negative=False)
    task = norm_over_ranks(features, loss, "loss")
    adversarial = norm_over_ranks(features, confusion, "confusion")
    vanishes = (task == 0) | (adversarial == 0)
    return torch.where(vanishes, 0.0, float(ratio) * task / torch.where(vanishes, 1.0, adversarial))
