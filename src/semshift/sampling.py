"""Sampler of batches mixed from several domains; each batch is a pure function of the seed, the step and the rank."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional

import numpy as np
import torch
from torch.utils.data import default_collate

from semshift._checks import check_int, check_number
from semshift._orders import key, mix, permuted, wrapped

__all__ = ["MixedBatchSampler", "collate_by_domain", "rare_class_weights"]

_MOST = 1 << 62
_BLOCK = 512


class MixedBatchSampler:
    """Sampler of mixed batches: each batch has a fixed number of images from every domain.

    Each domain is one endless stream of draws: passes through all of its images, each pass in a different random order.
    With n images per batch and W ranks, step s uses draws `[s * W * n, (s + 1) * W * n)` of the stream. Rank 0 takes
    the first n of them, rank 1 the next n, and so on. A batch depends on (seed, world size, rank, step) and nothing
    else. To resume, set `first_step`: this takes no time and needs no state. Orders are computed, not stored, so a
    billion images need no more memory or time than a thousand. A domain's stream depends on its name and length, not on
    the other domains.

    Pass it as `batch_sampler` to a `torch.utils.data.DataLoader` over the `ConcatDataset` of the domains, in the order
    of `sizes`. The sampler is a value: you can print, compare and pickle it. Each iteration starts at `first_step`
    again. So a loop over several epochs must call `set_epoch`, as Lightning, Fabric and Accelerate do: then each epoch
    continues where the last one ended.

    The sampler distributes the batches over ranks, so no other tool may distribute them again. With Lightning and
    Fabric, set `use_distributed_sampler=False`. Accelerate gives each of W processes every W-th batch: pass
    `rank=0, world_size=1` and W times the `steps`.

    Args:
        sizes: maps a domain's name to its number of images, at least 1; the order matters.
        per_batch: maps the same names, in the same order, to the number of images per batch on each rank, at least 1.
        seed: seed of all streams, at least 0.
        rank: the rank of this process, in `[0, world_size)`.
        world_size: number of processes, at least 1. A run may resume at a step with a different number of processes if
            world size times images per batch stays the same; `resume` checks this.
        first_step: the step of the first batch, at least 0.
        steps: number of batches of an epoch, at least 0; None for an endless sampler.
        weights: maps a domain's name to one weight per image, not negative. Images of these domains are drawn
            independently with replacement, in proportion to their weights. See `rare_class_weights`.

    Raises:
        TypeError: not a mapping, a name that is not a str, a count that is not an int, or weights that are not numbers.
        ValueError: an empty domain, names that do not match, a count out of range, or weights of a wrong length,
            negative, not finite or all 0.

    Example:
        >>> sizes, per_batch = {"source": 1000, "target": 50}, {"source": 2, "target": 1}
        >>> sampler = semshift.MixedBatchSampler(sizes, per_batch, seed=0, steps=2)
        >>> [len(batch) for batch in sampler]
        [3, 3]
        >>> all(1000 <= batch[2] < 1050 for batch in sampler)
        True
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        per_batch: Mapping[str, int],
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        first_step: int = 0,
        steps: Optional[int] = None,
        weights: Optional[Mapping[str, Sequence[float] | np.ndarray | torch.Tensor]] = None,
    ) -> None:
        _check_mapping("sizes", sizes)
        _check_mapping("per_batch", per_batch)
        _check_mapping("weights", {} if weights is None else weights)
        if not sizes:
            raise ValueError("expected sizes to name at least one domain, got none")
        if list(sizes) != list(per_batch):
            raise ValueError(f"expected per_batch to name the domains {list(sizes)} in order, got {list(per_batch)}")
        for name in sizes:
            if not isinstance(name, str):
                raise TypeError(f"expected the names in sizes to be strings, got {name!r}")
        # NumPy's integers become Python's, which do not overflow.
        self.sizes = {name: check_int(f"sizes[{name!r}]", size, 1) for name, size in sizes.items()}
        self.per_batch = {name: check_int(f"per_batch[{name!r}]", count, 1) for name, count in per_batch.items()}
        if sum(self.sizes.values()) > _MOST:
            raise ValueError(f"expected sizes to sum to at most 2 ** 62, got {sum(self.sizes.values())}")
        self.seed = check_int("seed", seed, 0)
        self.world_size = check_int("world_size", world_size, 1)
        self.rank = check_int("rank", rank, 0)
        if rank >= world_size:
            raise ValueError(f"expected rank below world_size {world_size}, got {rank}")
        self.first_step = check_int("first_step", first_step, 0)
        self.steps = None if steps is None else check_int("steps", steps, 0)
        self.weights = {name: tuple(_weights(name, weight, sizes)) for name, weight in (weights or {}).items()}
        self.epoch = 0
        # `_first` is the first step of epoch 0, and `_length` the length of an epoch. After `resume`, `first_step` and
        # `steps` are those of the rest of the epoch.
        self._first, self._length = self.first_step, self.steps
        self._cumulative = {name: _cumulative(weight) for name, weight in self.weights.items()}

    def __iter__(self) -> Iterator[list[int]]:
        """Batches from `first_step` on: lists of indices into the concatenated data set, domain after domain."""
        # Read once, so that `set_epoch` does not change an iteration that has begun.
        step, end = self.first_step, None if self.steps is None else self.first_step + self.steps
        while end is None or step < end:
            steps = _BLOCK if end is None else min(_BLOCK, end - step)
            yield from self._batches(step, steps)
            step += steps

    def __len__(self) -> int:
        """Number of batches; raises TypeError if the sampler is endless."""
        if self.steps is None:
            raise TypeError("expected a sampler with steps for len(), got an endless sampler; pass steps=")
        return self.steps

    def set_epoch(self, epoch: int) -> None:
        """Move to an epoch: its first step is that of epoch 0 plus `epoch * steps`.

        If your loop resumes by calling `set_epoch`, as Lightning does, create the sampler with the first step of epoch
        0.

        Args:
            epoch: 0 or more. Setting the current epoch changes nothing, so a sampler from `resume` keeps its position.

        Raises:
            TypeError: an epoch that is not an int.
            ValueError: a negative epoch, or an epoch above 0 of an endless sampler, which needs `steps`.

        Example:
            >>> sampler = semshift.MixedBatchSampler({"source": 1000}, {"source": 4}, seed=0, steps=100)
            >>> sampler.set_epoch(2)
            >>> sampler.first_step
            200
        """
        epoch = check_int("epoch", epoch, 0)
        if epoch == self.epoch:
            return
        if self._length is None:
            raise ValueError(
                f"expected epoch 0 for an endless sampler, got {epoch}; pass steps= to set the length of an epoch"
            )
        self.epoch, self.steps = epoch, self._length
        self.first_step = self._first + self.epoch * self._length

    @property
    def sampler(self) -> "MixedBatchSampler":
        """The sampler itself: Lightning and Accelerate call `set_epoch` on it.

        Returns:
            This sampler.

        Example:
            >>> sampler = semshift.MixedBatchSampler({"source": 1000}, {"source": 4}, seed=0)
            >>> sampler.sampler is sampler
            True
        """
        return self

    @property
    def drop_last(self) -> bool:
        """False: Accelerate reads this property when it distributes batches over processes.

        Returns:
            False.

        Raises:
            ValueError: a `world_size` above 1, with which this sampler already distributes its batches.

        Example:
            >>> semshift.MixedBatchSampler({"source": 1000}, {"source": 4}, seed=0).drop_last
            False
        """
        if self.world_size > 1:
            raise ValueError(
                f"this sampler already distributes its batches over world_size {self.world_size}: with Accelerate "
                f"pass rank=0, world_size=1 and the number of processes times steps"
            )
        return False

    def resume(
        self, first_step: int, *, rank: int, world_size: int, per_batch: Mapping[str, int]
    ) -> "MixedBatchSampler":
        """Sampler of the same streams from a step on, with the same or a different number of ranks.

        Args:
            first_step: the step to resume at; `steps` is reduced, so that the epoch ends where it would have ended.
            rank: the rank of this process, in `[0, world_size)`.
            world_size: number of processes, at least 1.
            per_batch: images per batch on each rank; `world_size` times each number must stay the same.

        Returns:
            A `MixedBatchSampler` that begins at `first_step`.

        Raises:
            TypeError: as in the constructor.
            ValueError: a changed number of draws per step, a step before `first_step` or after the end of the epoch, or
                as in the constructor.

        Example:
            >>> sampler = semshift.MixedBatchSampler({"source": 1000}, {"source": 4}, seed=0, steps=100)
            >>> sampler.resume(60, rank=0, world_size=2, per_batch={"source": 2})
            MixedBatchSampler({'source': 1000}, {'source': 2}, seed=0, rank=0, world_size=2, first_step=60, steps=40)
        """
        first_step = check_int("first_step", first_step, self.first_step)
        end = None if self.steps is None else self.first_step + self.steps
        if end is not None and first_step > end:
            raise ValueError(
                f"expected first_step to be at most {end}, the end of epoch {self.epoch}, got {first_step}"
            )
        resumed = MixedBatchSampler(
            self.sizes,
            per_batch,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            first_step=first_step,
            steps=None if end is None else end - first_step,
            weights=self.weights,
        )
        # After the constructor, which has checked the counts.
        for name, images in self.per_batch.items():
            before, now = images * self.world_size, resumed.per_batch[name] * resumed.world_size
            if before != now:
                raise ValueError(
                    f"expected world_size * per_batch[{name!r}] to stay {before}, so that the stream continues, got "
                    f"{now}"
                )
        resumed.epoch, resumed._first, resumed._length = self.epoch, self._first, self._length
        return resumed

    def _batches(self, step: int, steps: int) -> list[list[int]]:
        """The batches of many steps at once: NumPy's cost is per call, not per number."""
        parts, offset = [], 0
        for name, size in self.sizes.items():
            images = self.per_batch[name]
            first = (step * self.world_size + self.rank) * images
            later = np.arange(steps)[:, None] * (self.world_size * images) + np.arange(images)
            parts.append(offset + self._draws(name, first, later))
            offset += size
        batches: list[list[int]] = np.concatenate(parts, axis=1).tolist()
        return batches

    def _draws(self, name: str, first: int, later: np.ndarray) -> np.ndarray:
        """The images of draws `first + later` of a domain's stream; int64, in the shape of `later`."""
        stream = np.uint64(key(self.seed, name))
        cumulative = self._cumulative.get(name)
        if cumulative is not None:
            # 53 bits make a float in [0, 1); `right` never lands on an image of weight 0.
            uniform = (mix(stream, wrapped(first) + later.astype(np.uint64)) >> np.uint64(11)) / (1 << 53)
            images: np.ndarray = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
            return images
        turn, place = divmod(first, self.sizes[name])
        turns, places = np.divmod(place + later, self.sizes[name])
        return permuted(places, self.sizes[name], mix(stream, wrapped(turn) + turns.astype(np.uint64)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MixedBatchSampler) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash((self.seed, self.rank, self.world_size, self.first_step, self.steps, tuple(self.sizes.items())))

    def __repr__(self) -> str:
        weighted = f", weights=<{', '.join(self.weights)}>" if self.weights else ""
        epoch = f", epoch=<{self.epoch}>" if self.epoch else ""
        return (
            f"MixedBatchSampler({self.sizes}, {self.per_batch}, seed={self.seed}, rank={self.rank}, "
            f"world_size={self.world_size}, first_step={self.first_step}, steps={self.steps}{weighted}{epoch})"
        )

    def _values(self) -> tuple[Any, ...]:
        # Dicts compare without their order, but the order of domains decides what an index means.
        ordered = tuple(self.sizes.items()), tuple(self.per_batch.items())
        epochs = self.epoch, self._first, self._length
        return (*ordered, self.seed, self.rank, self.world_size, self.first_step, self.steps, self.weights, epochs)


def collate_by_domain(samples: Sequence[Any], per_batch: Mapping[str, int]) -> dict[str, Any]:
    """Collate the samples of a mixed batch, domain by domain.

    Domains may differ in image size, and some have no labels. So the samples of each domain are collated separately.

    Args:
        samples: as `MixedBatchSampler` draws them, domain after domain.
        per_batch: the sampler's `per_batch`; bind it with `functools.partial` to get the `collate_fn` of a
            `DataLoader`.

    Returns:
        A dictionary from each domain's name to its samples, collated by `torch.utils.data.default_collate`.

    Raises:
        TypeError: a count that is not an int.
        ValueError: a wrong number of samples, or a count below 1.

    Example:
        >>> semshift.collate_by_domain([1, 2, 3.5], {"source": 2, "target": 1})
        {'source': tensor([1, 2]), 'target': tensor([3.5000], dtype=torch.float64)}
    """
    _check_mapping("per_batch", per_batch)
    per_batch = {name: check_int(f"per_batch[{name!r}]", images, 1) for name, images in per_batch.items()}
    expected = sum(per_batch.values())
    if len(samples) != expected:
        raise ValueError(f"expected {expected} samples for per_batch {per_batch}, got {len(samples)}")
    remaining = iter(samples)
    return {name: default_collate([next(remaining) for _ in range(images)]) for name, images in per_batch.items()}


def rare_class_weights(
    class_counts: np.ndarray | torch.Tensor, *, temperature: float = 0.01, min_pixels: int = 1
) -> np.ndarray:
    """Image weights for rare class sampling: images with rare classes are drawn more often.

    This is DAFormer's rare class sampling (Hoyer et al. 2022, arXiv 2111.14887), section 3.2. First, a class is chosen:
    a class of frequency f has a probability proportional to `exp((1 - f) / temperature)`. Then one of the images that
    hold this class is chosen. The weight of an image is its probability under this scheme. A class that no image holds
    is never chosen.

    Args:
        class_counts: `[N, K]`, pixels of each class in each image, not negative.
        temperature: positive; the smaller it is, the more the rarest class is favoured.
        min_pixels: an image holds a class if at least this number of the image's pixels are of the class; at least 1.
            If there are only a few such pixels, a random crop mostly misses them. Frequencies count every pixel.

    Returns:
        `float64 [N]`, summing to 1; 0 for images without any class.

    Raises:
        TypeError: counts or a temperature that are not numbers, or a min_pixels that is not an int.
        ValueError: a wrong shape, counts that are negative, all 0 or all below `min_pixels`, a temperature that is not
            positive, or a min_pixels below 1.

    Example:
        >>> semshift.rare_class_weights(np.array([[90, 0], [90, 10]]), temperature=0.5).round(2)
        array([0.07, 0.93])
    """
    counts = _floats("class_counts", class_counts)
    if counts.ndim != 2:
        raise ValueError(f"expected class_counts [N, K], got {list(counts.shape)}")
    _check_weights("class_counts", counts)
    temperature = check_number("temperature", temperature)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"expected temperature to be finite and positive, got {temperature}")
    check_int("min_pixels", min_pixels, 1)
    frequency = counts.sum(0) / counts.sum()
    held = counts >= min_pixels
    if not held.any():
        raise ValueError(
            f"expected class_counts with a count of at least min_pixels {min_pixels}, got at most {counts.max()}"
        )
    occurs = held.any(0)
    # Only ratios matter. The rarest class is set to exp(0), since otherwise a small temperature would overflow. Others
    # may underflow.
    with np.errstate(over="ignore"):
        exponent = np.where(occurs, (frequency[occurs].min() - frequency) / temperature, -np.inf)
    chosen = np.exp(exponent)
    weights: np.ndarray = (held / np.maximum(held.sum(0), 1)) @ (chosen / chosen.sum())
    return weights


def _weights(name: str, weights: Any, sizes: Mapping[str, int]) -> list[float]:
    if name not in sizes:
        raise ValueError(f"expected weights for domains among {list(sizes)}, got {name!r}")
    values = _floats(f"weights[{name!r}]", weights)
    if values.shape != (sizes[name],):
        raise ValueError(f"expected weights[{name!r}] [{sizes[name]}], got {list(values.shape)}")
    _check_weights(f"weights[{name!r}]", values)
    result: list[float] = values.tolist()
    return result


def _cumulative(weights: Sequence[float]) -> np.ndarray:
    # Scaled by a power of two, which is exact, so that neither huge nor tiny weights leave the range of floats.
    exponent = math.frexp(max(weights))[1]
    return np.cumsum(np.ldexp(weights, -exponent))


def _floats(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"expected {name} to be an array of numbers: {error}") from error


def _check_weights(name: str, values: np.ndarray) -> None:
    wrong = values[~(np.isfinite(values) & (values >= 0))]
    if wrong.size:
        raise ValueError(f"expected {name} to be finite and not negative, got {wrong[0]}")
    if not values.any():
        raise ValueError(f"expected {name} with a positive value, got {'only 0' if values.size else 'no values'}")


def _check_mapping(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"expected {name} to be a mapping from domain names, got {value!r}")
