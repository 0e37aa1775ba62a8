"""Adversarial losses for the discriminator and for the segmenter.

Every loss takes logits, never probabilities; positive logits mean source. The boundary between the domains is 0 for
every objective except `wasserstein`, where an offset that both domains share has no effect. Weights say how much each
element counts. Where the weight is 0, the loss and its gradient ignore the logit, whatever its value. If no element
counts, the loss is 0 with gradient 0. A weight that is negative or not finite is an error on the CPU. On other devices
weights are not checked, since checking would force a device sync.

Losses are float32 (float64 for float64 logits), whatever the logits' dtype. A float16 sum overflows beyond 65504, and
so does a float16 loss times the first scale of `GradScaler`. A bfloat16 sum of ones stops at 256.
"""

import math
from typing import Any, Literal, Optional, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from semshift._checks import (
    check_device,
    check_finite,
    check_floating,
    check_int,
    check_option,
    check_weight,
)
from semshift._transforms import readable

__all__ = [
    "Objective",
    "class_confusion_loss",
    "class_discriminator_loss",
    "confusion_loss",
    "discriminator_loss",
    "entropy_map",
    "r1_penalty",
    "reverse_gradient",
]

Objective: TypeAlias = Literal["bce", "least-squares", "hinge", "wasserstein"]
"""Objective, the form of the adversarial loss; use the same for the discriminator and the segmenter.

`bce`: Goodfellow et al. 2014, the non-saturating form. `least-squares`: Mao et al. 2017, with targets 1 (source) and
-1. `hinge`: Lim and Ye 2017. `wasserstein`: Arjovsky et al. 2017, which also needs a penalty or spectral norm.

Example:
    >>> objective: semshift.Objective = "least-squares"
    >>> semshift.confusion_loss(torch.tensor([1.0]), objective=objective)
    tensor(0.)
"""

_OBJECTIVES = get_args(Objective)


def discriminator_loss(
    source_logits: Tensor,
    target_logits: Tensor,
    *,
    objective: Objective = "bce",
    source_weight: Optional[Tensor] = None,
    target_weight: Optional[Tensor] = None,
) -> Tensor:
    """Adversarial loss for the discriminator: half the sum of the two domains' weighted means.

    Args:
        source_logits: any shape, from detached inputs.
        target_logits: any shape, from detached inputs.
        objective: see `Objective`.
        source_weight: bool or floating point in the shape of `source_logits`, not negative; None means equal weights.
        target_weight: the same for `target_logits`.

    Returns:
        A scalar, float32 (float64 for float64 logits).

    Raises:
        TypeError: logits that are not a floating-point tensor, or a weight that is neither bool nor floating point.
        ValueError: a weight of a wrong shape or device, negative or not finite, or an unknown objective.

    Example:
        >>> semshift.discriminator_loss(torch.tensor([2.0]), torch.tensor([-3.0]), objective="hinge")
        tensor(0.)
    """
    check_option("objective", objective, _OBJECTIVES)
    check_floating("source_logits", source_logits)
    check_floating("target_logits", target_logits)
    check_weight("source_weight", source_weight, "source_logits", source_logits, source_logits.shape)
    check_weight("target_weight", target_weight, "target_logits", target_logits, target_logits.shape)
    check_device("target_logits", target_logits, "source_logits", source_logits)
    source, source_weight = _masked(source_logits, source_weight)
    target, target_weight = _masked(target_logits, target_weight)
    if objective == "bce":
        losses = F.softplus(-source), F.softplus(target)
    elif objective == "least-squares":
        losses = (source - 1).square(), (target + 1).square()
    elif objective == "hinge":
        losses = F.relu(1 - source), F.relu(1 + target)
    else:
        losses = -source, target
    return (_weighted_mean(losses[0], source_weight) + _weighted_mean(losses[1], target_weight)) / 2


def confusion_loss(logits: Tensor, *, objective: Objective = "bce", weight: Optional[Tensor] = None) -> Tensor:
    """Adversarial loss for the segmenter: a weighted mean over target logits, low if they are classified as source.

    Args:
        logits: any shape, of target inputs, from a `frozen` discriminator.
        objective: the discriminator's, see `Objective`.
        weight: bool or floating point in the shape of `logits`, not negative; None means equal weights.

    Returns:
        A scalar, float32 (float64 for float64 logits).

    Raises:
        TypeError: logits that are not a floating-point tensor, or a weight that is neither bool nor floating point.
        ValueError: a weight of a wrong shape or device, negative or not finite, or an unknown objective.

    Example:
        >>> semshift.confusion_loss(torch.tensor([0.0, float("nan")]), weight=torch.tensor([True, False]))
        tensor(0.6931)
    """
    check_option("objective", objective, _OBJECTIVES)
    check_floating("logits", logits)
    check_weight("weight", weight, "logits", logits, logits.shape)
    wide, weight = _masked(logits, weight)
    if objective == "bce":
        losses = F.softplus(-wide)
    elif objective == "least-squares":
        losses = (wide - 1).square()
    else:
        losses = -wide
    return _weighted_mean(losses, weight)


def class_discriminator_loss(
    source_logits: Tensor,
    target_logits: Tensor,
    *,
    source_classes: Optional[Tensor] = None,
    target_classes: Optional[Tensor] = None,
    source_weight: Optional[Tensor] = None,
    target_weight: Optional[Tensor] = None,
) -> Tensor:
    """Adversarial loss for a class-and-domain discriminator: cross-entropy over class and domain jointly.

    This is the loss of FADA (Wang et al. 2020, arXiv 2007.09222), section 3.2, with half the sum of the two domains'
    means. A class-and-domain discriminator has 2K outputs: it is a `ClassPixelDiscriminator`, or a
    `PrototypeDiscriminator` with `conditioning="class-and-domain"`.

    Args:
        source_logits: `[..., 2K]`, source classes then target classes; pass maps `[B, 2K, H, W]` as
            `maps.movedim(1, -1)`.
        target_logits: `[..., 2K]`.
        source_classes: class probabilities `[..., K]`, detached. None means that the logits are `[..., K, 2K]` of
            prototypes, where row k is class k.
        target_classes: the same for `target_logits`.
        source_weight: bool or floating point `[...]`, the logits' shape without the last dimension, not negative;
            None means equal weights.
        target_weight: the same for `target_logits`.

    Returns:
        A scalar, float32 (float64 for float64 logits).

    Raises:
        TypeError: logits or classes that are not a floating-point tensor, or a weight that is neither bool nor floating
            point.
        ValueError: shapes or devices that do not match, or a weight that is negative or not finite.

    Example:
        >>> semshift.class_discriminator_loss(torch.zeros(3, 6), torch.zeros(3, 6))
        tensor(1.7918)
    """
    source = _class_domain_losses("source_", source_logits, source_classes, source_weight, of_source=True)
    target = _class_domain_losses("target_", target_logits, target_classes, target_weight, of_source=False)
    check_device("target_logits", target_logits, "source_logits", source_logits)
    return (source + target) / 2


def class_confusion_loss(
    logits: Tensor, *, classes: Optional[Tensor] = None, weight: Optional[Tensor] = None
) -> Tensor:
    """Class-and-domain adversarial loss for the segmenter: cross-entropy to each element's class in the source domain.

    This is the loss of FADA (Wang et al. 2020, arXiv 2007.09222), section 3.2. The loss is low if the discriminator
    classifies each target element as the element's own class of the source.

    Args:
        logits: `[..., 2K]`, of target inputs, source classes then target classes.
        classes: class probabilities `[..., K]`, detached. None means that the logits are `[..., K, 2K]` of prototypes,
            where row k is class k.
        weight: bool or floating point `[...]`, not negative; None means equal weights.

    Returns:
        A scalar, float32 (float64 for float64 logits).

    Raises:
        TypeError: logits or classes that are not a floating-point tensor, or a weight that is neither bool nor floating
            point.
        ValueError: shapes or devices that do not match, or a weight that is negative or not finite.

    Example:
        >>> semshift.class_confusion_loss(torch.zeros(3, 6))
        tensor(1.7918)
    """
    return _class_domain_losses("", logits, classes, weight, of_source=True)


def entropy_map(probabilities: Tensor) -> Tensor:
    """Entropy map, `-p log p / log K` for each class and pixel: the input of ADVENT's discriminator.

    This is the map of Vu et al. 2019 (arXiv 1811.12833), section 3.2. Its sum over classes is 1 where all classes are
    equally likely. The gradient is finite where a probability is 0.

    Args:
        probabilities: `[B, K, *S]`, in [0, 1], K at least 2.

    Returns:
        `[B, K, *S]` in the dtype of `probabilities`.

    Raises:
        TypeError: probabilities that are not a floating-point tensor.
        ValueError: a wrong shape; on the CPU, a value outside [0, 1], for example in logits passed by mistake.

    Example:
        >>> semshift.entropy_map(torch.tensor([[[0.5], [0.5]]])).flatten()
        tensor([0.5000, 0.5000])
    """
    check_floating("probabilities", probabilities)
    if probabilities.dim() < 2 or probabilities.shape[1] < 2:
        raise ValueError(f"expected probabilities [B, K, *S] with K of at least 2, got {list(probabilities.shape)}")
    if (seen := readable(probabilities)) is not None and seen.numel() > 0:
        low, high = (value.item() for value in seen.detach().aminmax())
        # Interpolated maps may exceed 1 by rounding. nan passes through, so that the caller's check of the loss sees
        # it.
        if low < 0 or high > 1 + 8 * torch.finfo(probabilities.dtype).eps:
            wrong = low if low < 0 else high
            raise ValueError(f"expected probabilities in [0, 1], got {wrong}; for logits pass logits.softmax(1)")
    smallest = torch.finfo(probabilities.dtype).tiny
    # Not clamp, whose gradient at the limit itself differs between versions of PyTorch.
    positive = torch.where(probabilities < smallest, smallest, probabilities)
    return -probabilities * positive.log() / math.log(probabilities.shape[1])


def r1_penalty(logits: Tensor, inputs: Tensor, *, sample_dims: int = 1, weight: Optional[Tensor] = None) -> Tensor:
    """R1 gradient penalty: half the mean squared norm of a discriminator's gradient at its source inputs.

    This is equation 9 of Mescheder et al. 2018 (arXiv 1801.04406) without the factor gamma. Add the penalty to the
    discriminator's loss. The penalty's backward differentiates the gradient once more.

    Args:
        logits: any shape, computed from `inputs`.
        inputs: the discriminator's inputs, detached and then set to require grad.
        sample_dims: number of leading dimensions of `inputs` that count samples. Pass 1 for maps `[B, C, H, W]`, and
            the number of dimensions minus 1 for prototypes `[..., K, C]`.
        weight: bool or floating point in the shape of the `sample_dims` leading dimensions, not negative; None means
            equal weights.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        TypeError: logits or inputs that are not a floating-point tensor, a sample_dims that is not an int, or a weight
            that is neither bool nor floating point.
        ValueError: logits that do not depend on inputs, a sample_dims out of range, or a weight of a wrong shape or
            device, negative or not finite.

    Example:
        >>> inputs = torch.ones(2, 3, requires_grad=True)
        >>> semshift.r1_penalty(2 * inputs.sum(1), inputs)
        tensor(6.)
    """
    check_floating("logits", logits)
    check_floating("inputs", inputs)
    sample_dims = check_int("sample_dims", sample_dims)
    if not 1 <= sample_dims <= inputs.dim():
        raise ValueError(
            f"expected sample_dims in 1 to {inputs.dim()} for inputs {list(inputs.shape)}, got {sample_dims}"
        )
    check_weight("weight", weight, "inputs", inputs, inputs.shape[:sample_dims])
    if not (inputs.requires_grad and logits.requires_grad):
        raise ValueError("expected logits computed from inputs that require grad, got no gradient of logits at inputs")
    (gradient,) = torch.autograd.grad(logits.sum(), inputs, create_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError("expected logits computed from inputs that require grad, got no gradient of logits at inputs")
    # A last axis of size 1, so that `flatten` also works where every dimension counts samples.
    gradient = gradient.unsqueeze(-1).flatten(sample_dims)
    gradient, weight = _masked(gradient, weight, trailing=1)
    return _weighted_mean(gradient.square().sum(-1), weight) / 2


def reverse_gradient(features: Tensor, *, scale: float = 1.0) -> Tensor:
    """Gradient reversal: the features are unchanged, and their gradient is multiplied by `-scale`.

    This is the layer of Ganin and Lempitsky 2015 (arXiv 1409.7495), section 3. Apply it to the discriminator's inputs.
    One backward of the discriminator's loss then trains the discriminator, and teaches the segmenter to fool it.

    Args:
        features: any shape, floating point.
        scale: the gradient is multiplied by `-scale`; finite, not negative. Pass a schedule's value to vary it.

    Returns:
        A tensor equal to `features`.

    Raises:
        TypeError: features that are not a floating-point tensor, or a scale that is not a number.
        ValueError: a scale that is negative or not finite.
        NotImplementedError: forward-mode differentiation, such as `torch.func.jvp`.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> semshift.reverse_gradient(x, scale=0.5).sum().backward()
        >>> x.grad
        tensor([-0.5000, -0.5000])
    """
    check_floating("features", features)
    scale = check_finite("scale", scale, negative=False)
    try:
        result: Tensor = _Reverse.apply(features, scale)  # type: ignore[no-untyped-call]  # because torch's apply is untyped
    except NotImplementedError as error:
        # If we defined `jvp`, torch would silently give 0 for forward mode nested in forward mode.
        raise NotImplementedError("reverse_gradient has no forward mode: use reverse mode, such as jacrev") from error
    return result


class _Reverse(torch.autograd.Function):
    # With a separate `setup_context`, torch.func's transforms work too.
    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor, scale: float) -> Tensor:
        return features.view_as(features)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return -ctx.scale * gradient, None


def _class_domain_losses(
    prefix: str, logits: Tensor, classes: Optional[Tensor], weight: Optional[Tensor], *, of_source: bool
) -> Tensor:
    check_floating(f"{prefix}logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 2 or logits.shape[-1] % 2:
        raise ValueError(f"expected {prefix}logits [..., 2K], got {list(logits.shape)}")
    num_classes = logits.shape[-1] // 2
    if classes is None:
        if logits.dim() < 2 or logits.shape[-2] != num_classes:
            raise ValueError(
                f"expected {prefix}logits [..., K, 2K] of prototypes, or {prefix}classes, got {list(logits.shape)}"
            )
    else:
        check_floating(f"{prefix}classes", classes)
        if classes.shape != (*logits.shape[:-1], num_classes):
            raise ValueError(
                f"expected {prefix}classes {[*logits.shape[:-1], num_classes]} for {prefix}logits "
                f"{list(logits.shape)}, got {list(classes.shape)}"
            )
        check_device(f"{prefix}classes", classes, f"{prefix}logits", logits)
    check_weight(f"{prefix}weight", weight, f"{prefix}logits", logits, logits.shape[:-1])
    wide, weight = _masked(logits, weight, trailing=1)
    log_probabilities = wide.log_softmax(-1)
    half = log_probabilities[..., :num_classes] if of_source else log_probabilities[..., num_classes:]
    if classes is None:
        losses = -half.diagonal(dim1=-2, dim2=-1)
    else:
        classes, _ = _masked(classes, weight, trailing=1)
        losses = -(classes.to(half.dtype) * half).sum(-1)
    return _weighted_mean(losses, weight)


def _masked(values: Tensor, weight: Optional[Tensor], *, trailing: int = 0) -> tuple[Tensor, Optional[Tensor]]:
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if weight is None:
        return values, None
    # Cast before comparing: a weight that the cast rounds to 0 counts as 0.
    weight = weight.to(values.dtype)
    # Where the weight is 0, a value may be nan, and 0 * nan would be nan, in the loss or in the gradient.
    here = (weight > 0).reshape(*weight.shape, *[1] * trailing)
    return torch.where(here, values, 0.0), weight


def _weighted_mean(losses: Tensor, weight: Optional[Tensor]) -> Tensor:
    if weight is None:
        weight = torch.ones_like(losses)
    total = weight.sum()
    return (losses * weight).sum() / torch.where(total > 0, total, 1.0)
