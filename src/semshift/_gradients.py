"""The gradient of a loss at the features, and what to do where there is none."""

import torch
from torch import Tensor

from semshift._checks import check_floating

__all__ = ["gradient_at"]


def gradient_at(features: Tensor, loss: Tensor, name: str = "loss") -> Tensor:
    """The gradient of a scalar at the features; the graph stays, and no `.grad` is written."""
    check_floating(name, loss)
    check_floating("features", features)
    if loss.dim() != 0:
        raise ValueError(f"expected {name} to be a scalar, got {list(loss.shape)}")
    gradient = None
    if loss.requires_grad and features.requires_grad:
        try:
            (gradient,) = torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise RuntimeError(f"no gradient of {name} at features: {_way_out(str(error))}") from error
    if gradient is None:
        raise ValueError(
            f"expected features to be the tensor that {name} was computed from, got no gradient between them: a slice "
            f"or a copy is another tensor, and a network compiled whole, or checkpointed whole by reentrant "
            f"checkpointing, returns features that its logits do not depend on (compile backbone and head apart; pass "
            f"use_reentrant=False)"
        )
    return gradient


def _way_out(message: str) -> str:
    if "use_reentrant" in message or "Checkpointing" in message:
        return "torch.utils.checkpoint needs use_reentrant=False for it"
    if "donated" in message:
        return "a compiled network needs torch._functorch.config.donated_buffer = False before its first call"
    return message
