"""Op of weighted sums, `semshift::soft_class_sums`: body, fake and backward. Its callers have checked all arguments."""

from typing import Any, Optional

import torch
from torch import Tensor

from semshift._kernels import launched
from semshift._transforms import transformed

__all__ = ["soft_sums", "sum_dtype"]

# Elements that are converted to a wider dtype at a time.
_BLOCK = 2**18
_EXACT_BLOCK = 2**20


def soft_sums(features: Tensor, weights: Tensor) -> Tensor:
    """The product of features `[B, C, N]` and weights `[B, K, N]`, added up over N: `[B, K, C]`."""
    sums: Tensor = _soft_class_sums(features, weights)
    return sums


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums of features: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rounds_products(device: torch.device) -> bool:
    """Whether torch's precision switches, older or newer, allow products of float32 in lower precision."""
    backend = {"cpu": torch.backends.mkldnn, "xpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}.get(device.type)
    if backend is None:
        return False
    try:
        # torch.get_float32_matmul_precision raises after a newer switch was set. These backends know both kinds.
        precision: str = backend.matmul.fp32_precision
    except AttributeError:
        # Before torch 2.9 there is only one switch.
        return torch.get_float32_matmul_precision() != "highest"
    return precision in ("tf32", "bf16")


_LIBRARY = torch.library.Library("semshift", "FRAGMENT")
_LIBRARY.define("soft_class_sums(Tensor features, Tensor weights) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_soft_class_sums = torch.ops.semshift.soft_class_sums.default


@torch.library.impl(_LIBRARY, "soft_class_sums", "CompositeExplicitAutograd")
def _add_up(features: Tensor, weights: Tensor) -> Tensor:
    dtype = _soft_dtype(features, weights)
    sums = features.new_empty((features.shape[0], weights.shape[1], features.shape[1]), dtype=dtype)
    multiply = _multiply_exactly if dtype == torch.float32 and _rounds_products(features.device) else _multiply
    # Small images are computed together, others one by one, so that at most one large image is widened at a time.
    some = max(1, len(features)) if features.numel() <= _BLOCK else 1
    for pooled, feature, weight in zip(sums.split(some), features.split(some), weights.split(some)):
        wide, by = feature.to(dtype), weight.to(dtype)
        multiply(by, wide, pooled)
        if features.device.type == "cpu" and not pooled.isfinite().all():
            # Compute it again: in a product, a place whose weights are all 0 still gives 0 * inf.
            multiply(by, torch.where((by != 0).any(1, keepdim=True), wide, 0), pooled)
    return sums


@torch.library.impl(_LIBRARY, "soft_class_sums", "CUDA")
def _add_up_on_cuda(features: Tensor, weights: Tensor) -> Tensor:
    pooled: Optional[Tensor] = launched("pooling", "multiply", features, weights)
    return _add_up(features, weights) if pooled is None else pooled


def _multiply(weights: Tensor, features: Tensor, out: Tensor) -> None:
    # With `out=`, since autocast leaves such products in float32. For one image, `bmm` is slower than `mm` by a tenth.
    if len(out) == 1:
        torch.mm(weights[0], features[0].mT, out=out[0])
    else:
        torch.bmm(weights, features.mT, out=out)


def _multiply_exactly(weights: Tensor, features: Tensor, out: Tensor) -> None:
    """The product in float64, which no switch affects. Setting and resetting a switch would affect other threads."""
    some = max(1, _EXACT_BLOCK // max(1, weights.shape[1], features.shape[1]))
    sums = torch.zeros_like(out, dtype=torch.float64)
    for weight, feature in zip(weights.split(some, 2), features.split(some, 2)):
        sums.baddbmm_(weight.double(), feature.double().mT)
    out.copy_(sums)


def _definition(features: Tensor, weights: Tensor) -> Tensor:
    """The same sums from plain PyTorch operations, for forward mode and the transforms of torch.func."""
    dtype = _soft_dtype(features, weights)
    wide, by = features.to(dtype), weights.to(dtype)
    # Only non-finite features are replaced: a finite one still gives its weight of 0 a derivative.
    wide = torch.where((by == 0).all(1, keepdim=True) & ~wide.isfinite(), 0, wide)
    # Not a matrix product, since its backward would follow the precision switches. One class at a time, to avoid a
    # tensor [B, K, C, N].
    return torch.cat([(wide[:, None] * weight[:, :, None]).sum(-1) for weight in by.split(1, 1)], 1)


@torch.library.register_fake("semshift::soft_class_sums")
def _(features: Tensor, weights: Tensor) -> Tensor:
    shape = (features.shape[0], weights.shape[1], features.shape[1])
    return features.new_empty(shape, dtype=_soft_dtype(features, weights))


class _SoftSums(torch.autograd.Function):
    """Weighted sums with their backward: two weighted sums again, so derivatives of any order exist."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(features, weights)
        with torch._C._AutoDispatchBelowAutograd():
            return soft_sums(features, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        features, weights = ctx.saved_tensors
        needs_features, needs_weights = ctx.needs_input_grad
        to_features = soft_sums(weights.mT, grad.mT).to(features.dtype) if needs_features else None
        to_weights = soft_sums(features.mT, grad).to(weights.dtype) if needs_weights else None
        return to_features, to_weights


@torch.library.impl(_LIBRARY, "soft_class_sums", "Autograd")
def _(features: Tensor, weights: Tensor) -> Any:
    if transformed(features, weights):
        return _definition(features, weights)
    if torch.is_grad_enabled() and (features.requires_grad or weights.requires_grad):
        return _SoftSums.apply(features, weights)
    with torch._C._AutoDispatchBelowAutograd():
        return soft_sums(features, weights)


def _soft_dtype(features: Tensor, weights: Tensor) -> torch.dtype:
    return torch.promote_types(sum_dtype(features.dtype), sum_dtype(weights.dtype))
