"""Prototype bank: running class prototypes of a domain, which keep the classes that a batch lacks.

Sums and mass are averaged separately and divided last, as in pooling. An average of means would count three pixels of a
class as much as a whole image of that class.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from semshift._checks import check_device, check_int, check_number
from semshift._transforms import readable
from semshift.distributed import all_reduce_sum
from semshift.pooling import ClassSums

__all__ = ["FilledPrototypes", "PrototypeBank"]

_DTYPES = (torch.float32, torch.float64)


class FilledPrototypes(NamedTuple):
    """Prototypes of a batch, filled in from the bank where the batch lacks a class.

    Example:
        >>> bank = semshift.PrototypeBank(1, 2)
        >>> bank.update(semshift.ClassSums(torch.tensor([[6.0], [4.0]]), torch.tensor([3, 4])))
        >>> bank(semshift.ClassSums(torch.tensor([[5.0], [0.0]]), torch.tensor([1, 0])))
        FilledPrototypes(means=tensor([[5.],
                [1.]]), present=tensor([True, True]))
    """

    means: Tensor
    """`[(B,) K, C]`; 0 for a class that neither the batch nor the bank has."""
    present: Tensor
    """`[(B,) K]` bool, the classes that the batch or the bank has."""


class PrototypeBank(nn.Module):
    """Prototype bank: running class prototypes of one domain over many batches; use one bank for each domain.

    A prototype is the mean feature of a class. Let m be the momentum, and s and n the sums and mass of an update. For a
    class k that is present in the update, the bank sets `S_k = m S_k + (1 - m) s_k` and `M_k = m M_k + (1 - m) n_k`.
    For an absent class, both stay bit-identical. The prototype is `S_k / M_k`: the weighted mean of all features so
    far. After j later updates of the class, a feature has the weight `m ** j`. So an update counts in proportion to its
    mass. Starting from 0 causes no bias, since it affects `S_k` and `M_k` alike.

    The state is two buffers without gradients, which the `state_dict` includes. Keep the bank in float32 or float64,
    whatever the model's precision: after a cast to half precision it raises an error.

    Args:
        in_channels: C, the length of a prototype, at least 1.
        num_classes: K, at least 1.
        momentum: m, in [0, 1); with 0 the bank keeps only the last update of a class.

    Raises:
        TypeError: a count that is not an int, or a momentum that is not a number.
        ValueError: a count below 1, or a momentum outside [0, 1).

    Example:
        >>> bank = semshift.PrototypeBank(1, 2, momentum=0.5)
        >>> bank.update(semshift.ClassSums(torch.tensor([[6.0], [0.0]]), torch.tensor([3, 0])))
        >>> bank.update(semshift.ClassSums(torch.tensor([[4.0], [0.0]]), torch.tensor([1, 0])))
        >>> bank.means.flatten(), bank.present
        (tensor([2.8000, 0.0000]), tensor([ True, False]))
    """

    sums: Tensor
    mass: Tensor

    def __init__(self, in_channels: int, num_classes: int, *, momentum: float = 0.99) -> None:
        super().__init__()
        self.in_channels = in_channels = check_int("in_channels", in_channels, 1)
        self.num_classes = num_classes = check_int("num_classes", num_classes, 1)
        self.momentum = momentum = check_number("momentum", momentum)
        if not 0 <= momentum < 1:
            raise ValueError(f"expected momentum in [0, 1), got {momentum}")
        self.register_buffer("sums", torch.zeros(num_classes, in_channels, dtype=torch.float32))
        self.register_buffer("mass", torch.zeros(num_classes, dtype=torch.float32))

    @property
    def means(self) -> Tensor:
        """The prototypes `[K, C]` float32, without gradient; 0 for a class that was never seen.

        Raises:
            TypeError: the bank was cast to half precision.
        """
        return self._state().means

    @property
    def present(self) -> Tensor:
        """`[K]` bool, True for the classes that were seen in any update.

        Raises:
            TypeError: the bank was cast to half precision.
        """
        return self._state().present

    @torch.no_grad()
    def update(self, pooled: ClassSums) -> None:
        """Update the bank with the sums of a batch; with several ranks, with the sums of all ranks.

        Every rank must call the method, even if its batch lacks every class. The banks of all ranks are then the same.
        Images are added up first; then each rank's sums and mass go through `all_reduce_sum`. Sums that were already
        added up over ranks do no harm, since the prototype is a ratio.

        Args:
            pooled: `ClassSums` with sums `[K, C]`, or `[B, K, C]` if pooled with `per_image=True`.

        Raises:
            TypeError: not a `ClassSums`, sums that are not float32 or float64, or a bank in half precision.
            ValueError: a wrong shape or device; on the CPU, sums of a present class that are not finite in the bank's
                dtype, or a mass that is negative or not finite. The bank is then unchanged. On other devices checking
                would force a device sync. There, and in a compiled graph, such a class is not an error, and its
                prototype stays as it is.
        """
        state = self._state()
        self._check(pooled)
        sums, mass = pooled.sums, pooled.mass
        if sums.dim() == 3:
            sums, mass = sums.sum(0), mass.sum(0)
        # Counts are added up as integers. The total is checked, so that either all ranks raise or none does.
        sums = all_reduce_sum(sums).to(state.sums.dtype)
        mass = all_reduce_sum(mass).to(state.mass.dtype)
        weighs = (mass >= 0) & mass.isfinite()
        finite = sums.isfinite().all(-1)
        if readable(sums) is not None:
            _check_values(sums, mass, weighs, finite)
        moves = (mass > 0) & weighs & finite
        momentum = self.momentum
        # An absent class keeps its bits; its sums are discarded, whatever they hold.
        self.sums.copy_(torch.where(moves[:, None], momentum * state.sums + (1 - momentum) * sums, state.sums))
        self.mass.copy_(torch.where(moves, momentum * state.mass + (1 - momentum) * mass, state.mass))

    def forward(self, pooled: ClassSums) -> FilledPrototypes:
        """Fill in the classes that a batch lacks; the bank itself does not change.

        Gradients flow to the batch's own rows; the bank's rows are constants.

        Args:
            pooled: `ClassSums` with sums `[K, C]` or `[B, K, C]`.

        Returns:
            `FilledPrototypes` of the shape of `pooled`, means in the dtype of its sums.

        Raises:
            TypeError: as in `update`.
            ValueError: a wrong shape or device.
        """
        state = self._state()
        self._check(pooled)
        means = torch.where(pooled.present[..., None], pooled.means, state.means.to(pooled.sums.dtype))
        return FilledPrototypes(means, pooled.present | state.present)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.in_channels}, {self.num_classes}, momentum={self.momentum}"

    def _state(self) -> ClassSums:
        if self.sums.dtype not in _DTYPES:
            raise TypeError(f"the bank must stay in float32, got {self.sums.dtype}; call its .float()")
        return ClassSums(self.sums, self.mass)

    def _check(self, pooled: ClassSums) -> None:
        if not isinstance(pooled, ClassSums):
            raise TypeError(f"expected pooled to be a ClassSums, got {type(pooled).__name__}")
        if pooled.sums.dtype not in _DTYPES:
            raise TypeError(f"expected pooled.sums of dtype float32 or float64, got {pooled.sums.dtype}")
        if pooled.sums.dim() not in (2, 3) or pooled.sums.shape[-2:] != self.sums.shape:
            raise ValueError(
                f"expected pooled.sums [{self.num_classes}, {self.in_channels}] or "
                f"[B, {self.num_classes}, {self.in_channels}], got {list(pooled.sums.shape)}"
            )
        if pooled.mass.shape != pooled.sums.shape[:-1]:
            raise ValueError(
                f"expected pooled.mass {list(pooled.sums.shape[:-1])} for pooled.sums {list(pooled.sums.shape)}, "
                f"got {list(pooled.mass.shape)}"
            )
        for name, tensor in (("sums", pooled.sums), ("mass", pooled.mass)):
            check_device(f"pooled.{name}", tensor, "the bank", self.sums)


def _check_values(sums: Tensor, mass: Tensor, weighs: Tensor, finite: Tensor) -> None:
    for k in (~weighs).nonzero()[:1].flatten().tolist():
        raise ValueError(f"expected pooled.mass to be finite and not negative, got {mass[k].item()} for class {k}")
    for k in ((mass > 0) & ~finite).nonzero()[:1].flatten().tolist():
        wrong = next(value for value in sums[k].tolist() if not math.isfinite(value))
        raise ValueError(f"expected pooled.sums to be finite in {sums.dtype}, got {wrong} for class {k}")
