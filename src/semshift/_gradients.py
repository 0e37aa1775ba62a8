"""The gradient of a loss at the features, with errors that say why there is none and how to fix it."""

from typing import Optional

import torch
from torch import Tensor

from semshift._checks import check_floating
from semshift.distributed import all_reduce_sum

__all__ = ["gradient_at", "norm_over_ranks"]

# The largest power of two that float16 holds. Without scaling, float16 loses gradients below 6e-8.
_SCALE = 2.0**15


def gradient_at(features: Tensor, loss: Tensor, name: str = "loss") -> Tensor:
    """The gradient of a scalar at the features; the graph is kept and no `.grad` is written."""
    check_floating(name, loss)
    check_floating("features", features)
    if loss.dim() != 0:
        raise ValueError(f"expected {name} to be a scalar, got {list(loss.shape)}")
    gradient = None
    if loss.requires_grad and features.requires_grad:
        try:
            (gradient,) = torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if (fix := _fix(str(error))) is None:
                # An error that is not about gradients, such as too little memory.
                raise
            raise RuntimeError(f"no gradient of {name} at features: {fix}") from error
    if gradient is None:
        raise ValueError(f"no gradient of {name} at features: {_why_none(features, loss, name)}")
    return gradient


def norm_over_ranks(features: Tensor, loss: Tensor, name: str) -> Tensor:
    """The Euclidean norm of a loss's gradient at the features of all ranks, float32."""

    def squares(scale: float) -> Tensor:
        gradient = gradient_at(features, loss * scale, name).detach()
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / scale
        return all_reduce_sum(gradient.square().sum())

    total = squares(1.0)
    if _through_float16(features):
        # Scaled, small gradients survive in float16. Where scaled ones overflow, the plain ones are large enough.
        scaled = squares(_SCALE)
        total = torch.where(scaled.isfinite(), scaled, total)
    return total.sqrt().float()


def _through_float16(features: Tensor) -> bool:
    device = features.device.type
    if features.dtype == torch.float16 or not torch.amp.is_autocast_available(device):
        return features.dtype == torch.float16
    # A layer norm may leave the features in float32 while the head runs in float16.
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16


def _why_none(features: Tensor, loss: Tensor, name: str) -> str:
    node = features.grad_fn
    if not loss.requires_grad:
        return f"expected {name} to require grad, got a constant"
    if not features.requires_grad:
        return "expected features to require grad, got detached features"
    if node is not None and _reaches(loss, node):
        # One autograd node returned both, so the loss depends on the node but not on the features.
        if node.name().startswith("Compiled"):
            return f"features and {name} come from one compiled network; compile the backbone and the head separately"
        if node.name().startswith("Checkpoint"):
            return f"features and {name} come from one checkpointed network; pass use_reentrant=False to checkpoint"
    return f"expected features to be the tensor that {name} was computed from, not a slice or a copy of it"


def _reaches(tensor: Tensor, node: torch.autograd.graph.Node) -> bool:
    """Whether a tensor's graph contains a node."""
    waiting, seen = [tensor.grad_fn], set()
    while waiting:
        current = waiting.pop()
        if current is node:
            return True
        if current is not None and current not in seen:
            seen.add(current)
            waiting += [parent for parent, _ in current.next_functions]
    return False


def _fix(message: str) -> Optional[str]:
    if "use_reentrant" in message or "Checkpointing" in message:
        return "pass use_reentrant=False to torch.utils.checkpoint.checkpoint"
    if "donated" in message:
        return (
            "a compiled network frees its buffers in the backward; set torch._functorch.config.donated_buffer = False "
            "before the network's first call"
        )
    if "second time" in message:
        return "a backward pass has freed the graph; call this function before the backward pass"
    return None
