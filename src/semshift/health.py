"""Health figures of adversarial training, to log beside the losses.

If a discriminator's accuracy stays at 1 on both domains, the discriminator teaches the segmenter nothing. If the
accuracy stays at one half, the discriminator has lost, or the domains do not differ. An adversarial loss has no effect
if its gradient at the features is a thousandth of the segmentation loss's gradient. If its gradient exceeds the
segmentation loss's gradient, the adversarial loss dominates the training.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Optional, get_args

import torch
from torch import Tensor

from semshift._checks import check_device, check_floating, check_number, check_option, check_weight
from semshift._gradients import gradient_at
from semshift.losses import Objective

__all__ = [
    "DomainAccuracy",
    "class_domain_accuracy",
    "domain_accuracy",
    "gradient_norm",
    "health_warnings",
    "prototype_distance",
]

# docs/health.md gives the reason for each threshold.
_CERTAIN, _CHANCE, _SILENT, _DOMINATES, _STEPS = 0.98, 0.55, 1e-3, 2.0, 10
_FIGURES = ("source_accuracy", "target_accuracy", "gradient_ratio")


class DomainAccuracy(NamedTuple):
    """Accuracy of a discriminator on each domain: the share of the domain's elements that it classifies correctly.

    Example:
        >>> logits = torch.tensor([2.0, -1.0])
        >>> semshift.domain_accuracy(logits, logits - 3)
        DomainAccuracy(source=tensor(0.5000), target=tensor(1.))
    """

    source: Tensor
    """Scalar in [0, 1], nan if no source element counts."""
    target: Tensor
    """Scalar in [0, 1], nan if no target element counts."""


def domain_accuracy(
    source_logits: Tensor,
    target_logits: Tensor,
    *,
    source_weight: Optional[Tensor] = None,
    target_weight: Optional[Tensor] = None,
) -> DomainAccuracy:
    """Accuracy of a discriminator on each domain: the share of logits with the right sign.

    One number for both domains would hide the usual collapse, in which everything is classified as one domain. A logit
    of exactly 0 is counted as wrong in both domains.

    Args:
        source_logits: any shape, positive for source; nan is counted as wrong in both domains too.
        target_logits: any shape.
        source_weight: bool or floating point in the shape of `source_logits`; elements of weight 0 do not count, and
            all others count equally. None counts all elements.
        target_weight: the same for `target_logits`.

    Returns:
        `DomainAccuracy`, two float32 scalars on the logits' device; nan if no element counts.

    Raises:
        TypeError: logits that are not a floating-point tensor, or a weight that is neither bool nor floating point.
        ValueError: a weight of a wrong shape or device.

    Example:
        >>> accuracy = semshift.domain_accuracy(torch.tensor([1.0, -1.0]), torch.tensor([-2.0, -1.0]))
        >>> accuracy.source.item(), accuracy.target.item()
        (0.5, 1.0)
    """
    check_floating("source_logits", source_logits)
    check_floating("target_logits", target_logits)
    return DomainAccuracy(
        _share("source_", source_logits > 0, source_weight), _share("target_", target_logits < 0, target_weight)
    )


def class_domain_accuracy(
    source_logits: Tensor,
    target_logits: Tensor,
    *,
    source_weight: Optional[Tensor] = None,
    target_weight: Optional[Tensor] = None,
) -> DomainAccuracy:
    """Accuracy of a class-and-domain discriminator on each domain.

    Such a discriminator has 2K outputs, see `class_discriminator_loss`. Its answer is the domain whose K outputs have
    the larger total probability.

    Args:
        source_logits: `[..., 2K]`, source classes then target classes.
        target_logits: `[..., 2K]`.
        source_weight: `[...]`, as for `domain_accuracy`.
        target_weight: `[...]`, as for `domain_accuracy`.

    Returns:
        `DomainAccuracy`, two float32 scalars on the logits' device; nan if no element counts.

    Raises:
        TypeError: logits that are not a floating-point tensor, or a weight that is neither bool nor floating point.
        ValueError: logits with an odd last dimension, or a weight of a wrong shape or device.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
        >>> semshift.class_domain_accuracy(logits, logits).target.item()
        0.0
    """
    halves = []
    for name, logits in (("source_logits", source_logits), ("target_logits", target_logits)):
        check_floating(name, logits)
        if logits.dim() < 1 or logits.shape[-1] < 2 or logits.shape[-1] % 2:
            raise ValueError(f"expected {name} [..., 2K], got {list(logits.shape)}")
        source_half, target_half = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).chunk(2, dim=-1)
        halves.append(source_half.logsumexp(-1) - target_half.logsumexp(-1))
    return domain_accuracy(halves[0], halves[1], source_weight=source_weight, target_weight=target_weight)


def gradient_norm(loss: Tensor, features: Tensor) -> Tensor:
    """Gradient norm: the Euclidean norm of a loss's gradient at the features.

    The function keeps the graph, so you can call it just before the backward. It writes no `.grad`, except that of
    features on which `retain_grad` was called. To compare two losses, multiply each norm by the weight of its loss.

    Args:
        loss: scalar, a function of `features`.
        features: any shape, part of the graph.

    Returns:
        A scalar in the dtype of `features`, at least float32.

    Raises:
        TypeError: a loss or features that are not a floating-point tensor.
        ValueError: a loss that is not a scalar or does not depend on features. A loss in which no element counts does
            depend on them: its norm is 0.
        RuntimeError: activation checkpointing with `use_reentrant=True`, a compiled network that frees its buffers in
            the backward, or a backward that has already freed the graph. The message gives the fix.

    Example:
        >>> features = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> semshift.gradient_norm(features.square().sum(), features)
        tensor(10.)
    """
    gradient = gradient_at(features, loss)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=wide)
    return norm


def prototype_distance(source_means: Tensor, target_means: Tensor, *, weight: Optional[Tensor] = None) -> Tensor:
    """Distance between the two domains' prototypes of each class, in units of the distance between classes.

    A prototype is the mean feature of a class. The unit is the mean distance between different classes, where each
    class is at the middle of its two prototypes. Without this unit, features that shrink would look like domains that
    come closer. If all prototypes are equal, the unit is 0, and the distance is nan rather than 0.

    Args:
        source_means: prototypes `[K, C]`.
        target_means: prototypes `[K, C]`.
        weight: bool or floating point `[K]`, positive for the classes that are present in both domains; None uses all
            classes.

    Returns:
        `[K]` float32 (float64 for float64 means), without gradient; nan for classes that are not used, and for all
        classes if fewer than two are used.

    Raises:
        TypeError: means that are not floating-point tensors, or a weight that is neither bool nor floating point.
        ValueError: shapes or devices that do not match.

    Example:
        >>> source, target = torch.tensor([[0.0], [4.0]]), torch.tensor([[0.0], [2.0]])
        >>> semshift.prototype_distance(source, target)
        tensor([0.0000, 0.6667])
    """
    check_floating("source_means", source_means)
    check_floating("target_means", target_means)
    if source_means.dim() != 2 or source_means.shape != target_means.shape:
        raise ValueError(
            f"expected source_means and target_means [K, C], got {list(source_means.shape)} "
            f"and {list(target_means.shape)}"
        )
    check_device("target_means", target_means, "source_means", source_means)
    wide = torch.promote_types(torch.promote_types(source_means.dtype, target_means.dtype), torch.float32)
    source, target = source_means.detach().to(wide), target_means.detach().to(wide)
    here = _mask("weight", weight, "source_means", source[:, 0])
    middle = torch.where(here[:, None], (source + target) / 2, 0.0)
    # This mode needs no tensor [K, K, C], and it avoids cancellation.
    between = torch.cdist(middle, middle, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = here[:, None] & here & ~torch.eye(len(here), dtype=torch.bool, device=here.device)
    unit = torch.where(pairs, between, 0.0).sum() / pairs.sum()
    apart = torch.linalg.vector_norm(source - target, dim=-1)
    return torch.where(here, apart / unit, torch.nan)


def health_warnings(history: Sequence[Mapping[str, float | Tensor]], *, objective: Objective = "bce") -> list[str]:
    """Health warnings: faults of a discriminator, found in its figures over many steps.

    Pass the last tenth of a run, and only steps at which the weight has reached its final value: before that, a high
    accuracy is no fault. A figure is judged if at least ten steps have it. Reading tensors on a device forces a device
    sync.

    Args:
        history: one mapping for each step: `AlignmentLosses.figures`, or floats under the same keys. You may add
            `gradient_ratio`: the norm of the weighted confusion loss's gradient at the features, divided by the norm of
            the task loss's gradient. Other keys are ignored, and so is nan.
        objective: the discriminator's objective. With `"wasserstein"`, the accuracy is not judged.

    Returns:
        One warning for each fault; an empty list if there is no fault. A warning begins with its kind: `certain`
        (accuracy near 1), `chance` (accuracy near one half), `idle` (nothing was compared), `silent` (gradient too
        small) or `dominates` (gradient too large).

    Raises:
        TypeError: a history that is not a sequence of mappings, or a figure that is not a number.
        ValueError: steps without any of the figures, a figure out of range, or an unknown objective.

    Example:
        >>> history = [{"source_accuracy": 0.8, "target_accuracy": 0.7, "gradient_ratio": 0.0004}] * 10
        >>> [warning.split(":")[0] for warning in semshift.health_warnings(history)]
        ['silent']
    """
    check_option("objective", objective, get_args(Objective))
    source, target, ratios = (_figures(history, name) for name in _FIGURES)
    if history and not (source or target or ratios):
        raise ValueError(f"expected history with at least one of {', '.join(_FIGURES)}, got {list(history[0])}")
    found = []
    if min(len(source), len(target)) >= _STEPS:
        source, target = ([value for value in values if not math.isnan(value)] for values in (source, target))
        if not (source and target):
            # The ratio is not judged: for the same reason, the gradient is 0.
            return [
                "idle: no class in the labels of one domain was seen in the other, so nothing was compared; check the "
                "label ids, or label more images"
            ]
        # With the Wasserstein objective the sign of a logit has no meaning; only differences have one.
        if min(len(source), len(target)) >= _STEPS and objective != "wasserstein":
            found += _judge_accuracy(statistics.fmean(source), statistics.fmean(target))
    ratios = [ratio for ratio in ratios if not math.isnan(ratio)]
    if len(ratios) >= _STEPS:
        found += _judge_ratio(statistics.median(ratios))
    return found


def _figures(history: Sequence[Mapping[str, float | Tensor]], name: str) -> list[float]:
    """The values of a figure at the steps that hold it."""
    if not isinstance(history, Sequence):
        raise TypeError(f"expected history to be a sequence of mappings, got {type(history).__name__}")
    values = []
    for row in history:
        if not isinstance(row, Mapping):
            raise TypeError(f"expected history to be a sequence of mappings, got a sequence with {type(row).__name__}")
        if name in row:
            given = row[name]
            if isinstance(given, Tensor) and given.dim() == 0:
                given = float(given)
            value = check_number(f"{name} in history", given)  # type: ignore[arg-type]  # because it refuses other tensors
            most = math.inf if name == "gradient_ratio" else 1.0
            if value < 0 or value > most:
                raise ValueError(f"expected {name} in history in [0, {most:g}] or nan, got {value}")
            values.append(float(value))
    return values


def _judge_accuracy(source: float, target: float) -> list[str]:
    found = f"(accuracy {source:.2f} on source and {target:.2f} on target)"
    if min(source, target) >= _CERTAIN:
        return [
            f"certain: the discriminator separates the domains almost without error {found}, so the segmenter does not "
            "fool it. Lower the discriminator's learning rate or set spectral_norm. Or raise the weight, as long as "
            "the validation score does not fall"
        ]
    if (source + target) / 2 <= _CHANCE:
        return [
            f"chance: the discriminator is at chance {found}, so its gradient is noise. Check that its parameters "
            "change, and that Adam or AdamW trains them. Raise its learning rate, or lower the weight if the accuracy "
            "fell as the weight rose. If prototype_distance is near 0, the domains are aligned"
        ]
    return []


def _judge_ratio(ratio: float) -> list[str]:
    found = f"the weighted confusion loss's gradient at the features is {ratio:.2g} times the task loss's"
    if ratio < _SILENT:
        return [f"silent: {found}, so it changes nothing; raise the weight"]
    if ratio > _DOMINATES:
        return [f"dominates: {found}, so it outweighs the task; lower the weight"]
    return []


def _share(domain: str, right: Tensor, weight: Optional[Tensor]) -> Tensor:
    here = _mask(f"{domain}weight", weight, f"{domain}logits", right)
    # A quotient of integers would have the default dtype.
    return (right & here).sum().float() / here.sum()


def _mask(name: str, weight: Optional[Tensor], of: str, like: Tensor) -> Tensor:
    if weight is None:
        return torch.ones_like(like, dtype=torch.bool)
    # The losses check the values; here it only matters whether a weight is positive.
    check_weight(name, weight, of, like, like.shape, values=False)
    return weight > 0
