"""The usual ways to write class pooling, in the code that people use.

All take features `[B, C, h, w]`, the row of each pixel `[B, h, w]` int64 and the number of rows. They return the sums
`[rows, C]`.
"""

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

__all__ = ["ONE_HOT", "WAYS", "Way", "by_index_add"]

Way = Callable[[Tensor, Tensor, int], Tensor]


def by_bmm(features: Tensor, slots: Tensor, rows: int) -> Tensor:
    """One-hot labels times features."""
    hot = torch.zeros(len(slots), rows, slots[0].numel(), device=slots.device, dtype=features.dtype)
    hot.scatter_(1, slots.flatten(1)[:, None], 1)
    return (hot @ features.flatten(2).mT).sum(0)


def by_bmm_other_order(features: Tensor, slots: Tensor, rows: int) -> Tensor:
    """Features times one-hot labels."""
    hot = torch.zeros(len(slots), slots[0].numel(), rows, device=slots.device, dtype=features.dtype)
    hot.scatter_(2, slots.flatten(1)[:, :, None], 1)
    return (features.flatten(2) @ hot).sum(0).mT


def by_einsum(features: Tensor, slots: Tensor, rows: int) -> Tensor:
    """An einsum over `one_hot`."""
    return torch.einsum("bchw,bhwk->kc", features, one_hot(slots, rows).to(features.dtype))


def by_scatter_add(features: Tensor, slots: Tensor, rows: int) -> Tensor:
    """`scatter_add_` along the pixels, with the index expanded over the channels."""
    images, channels = features.shape[:2]
    index = slots.flatten(1)[:, None].expand(images, channels, -1)
    return features.new_zeros(images, channels, rows).scatter_add_(2, index, features.flatten(2)).sum(0).mT


def by_scatter_reduce(features: Tensor, slots: Tensor, rows: int) -> Tensor:
    """The same as `by_scatter_add`, with `scatter_reduce`."""
    images, channels = features.shape[:2]
    index = slots.flatten(1)[:, None].expand(images, channels, -1)
    zeros = features.new_zeros(images, channels, rows)
    return zeros.scatter_reduce(2, index, features.flatten(2), "sum").sum(0).mT


def by_index_add(features: Tensor, slots: Tensor, rows: int) -> Tensor:
    """`index_add_` of a row for each pixel; the features are copied if the channels are not contiguous."""
    pixels = features.movedim(1, -1).reshape(-1, features.shape[1])
    return features.new_zeros(rows, features.shape[1]).index_add_(0, slots.flatten(), pixels)


def by_loop(features: Tensor, slots: Tensor, rows: int) -> Tensor:
    """A loop over the classes, with a boolean mask for each."""
    pixels = features.movedim(1, -1)
    return torch.stack([pixels[slots == k].sum(0) for k in range(rows)])


def by_torch_scatter(features: Tensor, slots: Tensor, rows: int) -> Tensor:
    """The package torch_scatter."""
    scatter = importlib.import_module("torch_scatter").scatter
    pixels: Tensor = features.flatten(2)
    summed: Tensor = scatter(pixels, slots.flatten(1)[:, None].expand_as(pixels), dim=2, dim_size=rows, reduce="sum")
    return summed.sum(0).mT


def by_lightly(features: Tensor, slots: Tensor, rows: int) -> Tensor:
    """`pool_masked` of the package lightly, which returns means per image; they are multiplied by the counts."""
    means: Tensor = importlib.import_module("lightly.models.utils").pool_masked(features, slots, rows)
    flat = slots.flatten(1)
    counts = means.new_zeros(len(flat), rows).scatter_add_(1, flat, means.new_ones(()).expand_as(flat))
    return (means * counts[:, None]).sum(0).mT


WAYS: dict[str, Way] = {
    "bmm": by_bmm,
    "bmm, other order": by_bmm_other_order,
    "einsum": by_einsum,
    "scatter_add_": by_scatter_add,
    "scatter_reduce": by_scatter_reduce,
    "index_add_": by_index_add,
    "loop": by_loop,
}
if importlib.util.find_spec("torch_scatter"):
    WAYS["torch_scatter"] = by_torch_scatter
if importlib.util.find_spec("lightly"):
    WAYS["lightly"] = by_lightly
ONE_HOT = {"bmm", "bmm, other order", "einsum"}
