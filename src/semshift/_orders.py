"""Random orders and numbers as functions of a key: computed, not stored."""

import functools
from typing import Any

import numpy as np

__all__ = ["key", "mix", "permuted", "wrapped"]

_MASK = (1 << 64) - 1
_ROUNDS = 12


def permuted(places: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Entries of random permutations of `[0, size)`, by their places and the permutations' keys; int64.

    A Feistel network permutes `[0, 4 ** bits)`, the smallest such range of at least `size` numbers. A result outside
    `[0, size)` is sent through again until it falls inside. This permutes `[0, size)`, in fewer than four rounds on
    average.
    """
    bits = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    half = (np.uint64(1) << bits) - np.uint64(1)
    rounds = [mix(keys, np.uint64(number)) for number in range(_ROUNDS)]
    result = places.astype(np.uint64)
    outside = np.ones(places.shape, dtype=bool)
    while outside.any():
        left, right = result[outside] >> bits, result[outside] & half
        for key in rounds:
            left, right = right, left ^ (mix(key[outside], right) & half)
        result[outside] = (left << bits) | right
        outside = result >= size
    return result.astype(np.int64)


@functools.lru_cache(maxsize=256)
def key(seed: int, name: str) -> int:
    """The key of a stream: a hash of the seed and the domain's name."""
    result = wrapped(seed)
    rest = seed >> 64
    while rest:
        result, rest = mix(result, wrapped(rest)), rest >> 64
    data = name.encode()
    for start in range(0, len(data), 8):
        result = mix(result, np.uint64(int.from_bytes(data[start : start + 8], "little")))
    return int(mix(result, np.uint64(len(data))))


def wrapped(value: int) -> np.uint64:
    """An int modulo 2 ** 64."""
    result: np.uint64 = np.uint64(value & _MASK)
    return result


def mix(key: Any, value: Any) -> Any:
    """A 64-bit hash of two numbers or arrays of uint64: the finaliser of SplitMix64 (Steele et al. 2014), twice."""
    # The hash relies on overflow. NumPy warns of overflow for numbers, not for arrays.
    with np.errstate(over="ignore"):
        mixed = key + (value + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        for _ in range(2):
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed
