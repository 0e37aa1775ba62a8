"""Both adversarial losses of one discriminator, computed over the batch of all ranks."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch import distributed as dist

from semshift._ranks import initialised
from semshift.discriminators import frozen
from semshift.distributed import all_reduce_sum
from semshift.health import class_domain_accuracy, domain_accuracy
from semshift.losses import (
    Objective,
    class_confusion_loss,
    class_discriminator_loss,
    confusion_loss,
    discriminator_loss,
)
from semshift.pooling import ClassSums

__all__ = ["adversarial_losses", "sums_over_ranks"]


def adversarial_losses(
    discriminator: nn.Module,
    source: Tensor,
    target: Tensor,
    confused: Tensor,
    *,
    objective: Objective,
    class_and_domain: bool = False,
    masks: Optional[tuple[Tensor, ...]] = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Confusion loss, discriminator loss and accuracies, computed over the batch of all ranks.

    `masks` are three bool masks: which elements of `source`, `target` and `confused` count.
    """
    confuse: Callable[..., Tensor] = functools.partial(confusion_loss, objective=objective)
    tell: Callable[..., Tensor] = functools.partial(discriminator_loss, objective=objective)
    judge = domain_accuracy
    if class_and_domain:
        confuse, tell, judge = class_confusion_loss, class_discriminator_loss, class_domain_accuracy
    confused_logits = frozen(discriminator)(confused)
    run = _averaging_gradients(discriminator) if initialised() else discriminator
    logits = run(source.detach()), run(target.detach())
    if masks is None:
        masks = tuple(torch.ones_like(each, dtype=torch.bool) for each in (*logits, confused_logits))
    mask_s, mask_t, mask_c = masks
    confusion = confuse(confused_logits, weight=mask_c)
    accuracy = judge(*logits, source_weight=mask_s, target_weight=mask_t)
    if not initialised():
        return confusion, tell(*logits, source_weight=mask_s, target_weight=mask_t), _figures(*accuracy)
    # Two reductions, so that each loss has its own graph and its own backward, as in one process.
    confused_sum, confused_count = _add_over_ranks([confusion], [mask_c])
    halves = [
        tell(*logits, source_weight=mask_s, target_weight=torch.zeros_like(mask_t)),
        tell(*logits, source_weight=torch.zeros_like(mask_s), target_weight=mask_t),
    ]
    sums, counts = _add_over_ranks([*halves, *accuracy], [mask_s, mask_t, mask_s, mask_t])
    shares = (sums[2:] / counts[2:]).detach()
    return _mean(confused_sum, confused_count), _mean(sums[:2], counts[:2]), _figures(shares[0], shares[1])


def sums_over_ranks(pooled: ClassSums) -> tuple[ClassSums, ClassSums]:
    """The sums to compare, added over ranks unless they are per image, and the detached sums of all ranks' batch."""
    if pooled.sums.dim() == 2:
        pooled = ClassSums(all_reduce_sum(pooled.sums), all_reduce_sum(pooled.mass))
        return pooled, pooled.detach()
    whole = pooled.detach()
    return pooled, ClassSums(all_reduce_sum(whole.sums.sum(0)), all_reduce_sum(whole.mass.sum(0)))


def _add_over_ranks(means: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Sums and counts `[2, n]` over the elements of all ranks, whose numbers of images may differ."""
    values = torch.stack([mean.to(means[0].dtype) for mean in means])
    counts = torch.stack([mask.sum() for mask in masks]).to(values.dtype)
    return all_reduce_sum(torch.stack([torch.where(counts > 0, values * counts, 0.0), counts]))


def _mean(sums: Tensor, counts: Tensor) -> Tensor:
    """The sum of `sums / counts`, where an entry with count 0 adds 0."""
    # No indexing: FSDP warns about a module that returns a view.
    return (sums / torch.where(counts > 0, counts, 1.0)).sum()


def _figures(source: Tensor, target: Tensor) -> dict[str, Tensor]:
    return {"source_accuracy": source.float(), "target_accuracy": target.float()}


def _averaging_gradients(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module as a function whose backward averages the parameters' gradients over ranks."""
    names, parameters = zip(*module.named_parameters())
    averaged: Any = _AverageGradients.apply(*parameters)  # type: ignore[no-untyped-call]  # because torch's apply is untyped
    replaced = dict(zip(names, averaged))
    return lambda inputs: torch.func.functional_call(module, replaced, (inputs,))


class _AverageGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # One reduction for all gradients. It need not be differentiable: nothing is differentiated twice here.
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        return tuple(part.view_as(gradient) for part, gradient in zip(parts, gradients))
