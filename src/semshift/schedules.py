"""Schedules: weights and learning rates as functions of the step.

A schedule is a value without a counter: you can print, compare, hash and pickle it. `schedule(step)` is a plain float,
so a resumed run needs the step and nothing else.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from semshift._checks import check_finite, check_int

__all__ = ["Constant", "Cosine", "Linear", "Polynomial", "Schedule", "Sigmoid", "Then"]

Schedule: TypeAlias = Callable[[int], float]
"""Type of a schedule, which is any function of a step (0 or more) that returns a float.

Example:
    >>> halved: semshift.Schedule = lambda step: 0.01 * 0.5 ** (step // 1000)
    >>> semshift.Then(semshift.Constant(0.0), 100, halved)(1100)
    0.005
"""


@dataclass(frozen=True)
class Constant:
    """Constant schedule: the same value at every step.

    Args:
        value: any finite number.

    Raises:
        ValueError: `value` is not finite.
        TypeError: `value` is not a number.

    Example:
        >>> semshift.Constant(0.01)(1000)
        0.01
    """

    value: float

    def __post_init__(self) -> None:
        _settle(self)

    def __call__(self, step: int) -> float:
        """The value, whatever the step."""
        check_int("step", step, 0)
        return float(self.value)


@dataclass(frozen=True)
class Linear:
    """Linear schedule: a straight line from `start` at step 0 to `stop` at step `steps`, fixed from there on.

    Args:
        start: value at step 0, finite.
        stop: value from step `steps` on, finite.
        steps: number of steps from `start` to `stop`, at least 1.

    Raises:
        ValueError: a value is not finite, or `steps` is below 1.
        TypeError: a value is not a number, or `steps` not an int.

    Example:
        >>> semshift.Linear(0.0, 1.0, steps=4)(1)
        0.25
    """

    start: float
    stop: float
    steps: int

    def __post_init__(self) -> None:
        _settle(self)

    def __call__(self, step: int) -> float:
        """The value at `step`."""
        p = _progress(step, self.steps)
        return float((1 - p) * self.start + p * self.stop)


@dataclass(frozen=True)
class Cosine:
    """Cosine schedule: half a cosine from `start` at step 0 to `stop` at step `steps`, fixed from there on.

    Args:
        start: value at step 0, finite.
        stop: value from step `steps` on, finite.
        steps: number of steps from `start` to `stop`, at least 1.

    Raises:
        ValueError: a value is not finite, or `steps` is below 1.
        TypeError: a value is not a number, or `steps` not an int.

    Example:
        >>> round(semshift.Cosine(1.0, 0.0, steps=4)(2), 6)
        0.5
    """

    start: float
    stop: float
    steps: int

    def __post_init__(self) -> None:
        _settle(self)

    def __call__(self, step: int) -> float:
        """The value at `step`."""
        p = (1 - math.cos(math.pi * _progress(step, self.steps))) / 2
        return float((1 - p) * self.start + p * self.stop)


@dataclass(frozen=True)
class Polynomial:
    """Polynomial schedule, `stop + (start - stop) * (1 - step / steps) ** power`, fixed from step `steps` on.

    With the default power this is the learning-rate decay of DeepLab (Chen et al. 2017, section 4.1) and AdaptSegNet.

    Args:
        start: value at step 0, finite.
        stop: value from step `steps` on, finite.
        steps: number of steps from `start` to `stop`, at least 1.
        power: finite, not negative; 0 keeps `start` until step `steps`, 1 is a straight line.

    Raises:
        ValueError: a value is not finite, `steps` is below 1, or `power` is negative.
        TypeError: a value is not a number, or `steps` not an int.

    Example:
        >>> semshift.Polynomial(2.5e-4, 0.0, steps=250_000)(0)
        0.00025
    """

    start: float
    stop: float
    steps: int
    power: float = 0.9

    def __post_init__(self) -> None:
        _settle(self)
        if self.power < 0:
            raise ValueError(f"expected power to be at least 0, got {self.power}")

    def __call__(self, step: int) -> float:
        """The value at `step`."""
        remaining = 1 - _progress(step, self.steps)
        # 0 ** 0 is 1, but from step `steps` on the value is `stop` whatever the power. The test is `> 0`, since torch
        # 2.4 compiles `if remaining` again at every step.
        share = remaining**self.power if remaining > 0 else 0.0
        return float(share * self.start + (1 - share) * self.stop)


@dataclass(frozen=True)
class Sigmoid:
    """Sigmoid schedule of DANN: a rise or fall that is fast at first and then flat, fixed from step `steps` on.

    The value is `start + (stop - start) * (2 / (1 + exp(-gain * step / steps)) - 1)`. This is the schedule of Ganin et
    al. 2016 (JMLR 17), section 5.2.2, where the gain is 10. With this gain, the value at step `steps` is 0.9999 of the
    way from `start` to `stop`.

    Args:
        start: value at step 0, finite.
        stop: the value that the schedule approaches, finite.
        steps: number of steps from `start` to `stop`, at least 1.
        gain: how fast the value changes at the start, finite and positive.

    Raises:
        ValueError: a value is not finite, `steps` is below 1, or `gain` is not positive.
        TypeError: a value is not a number, or `steps` not an int.

    Example:
        >>> semshift.Sigmoid(0.0, 1.0, steps=100)(0)
        0.0
    """

    start: float
    stop: float
    steps: int
    gain: float = 10.0

    def __post_init__(self) -> None:
        _settle(self)
        if self.gain <= 0:
            raise ValueError(f"expected gain to be positive, got {self.gain}")

    def __call__(self, step: int) -> float:
        """The value at `step`."""
        # The same as `2 / (1 + exp(-2 x)) - 1`, which torch 2.4 does not compile.
        p = math.tanh(self.gain * _progress(step, self.steps) / 2)
        return float((1 - p) * self.start + p * self.stop)


@dataclass(frozen=True)
class Then:
    """Sequence of two schedules: the first for `steps` steps, then the second, whose steps start at 0 again.

    Args:
        first: the schedule for steps 0 to `steps - 1`.
        steps: length of the first, at least 1.
        second: the schedule from step `steps` on; its own steps start at 0.

    Raises:
        ValueError: `steps` is below 1.
        TypeError: a schedule is not callable, or `steps` not an int.

    Example:
        >>> semshift.Then(semshift.Constant(0.0), 500, semshift.Sigmoid(0.0, 0.01, steps=1000))(499)
        0.0
    """

    first: Schedule
    steps: int
    second: Schedule

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name != "steps" and not callable(getattr(self, field.name)):
                given = getattr(self, field.name)
                raise TypeError(f"expected {field.name} to be a schedule (a function of the step), got {given!r}")
        object.__setattr__(self, "steps", check_int("steps", self.steps, 1))

    def __call__(self, step: int) -> float:
        """The value at `step`."""
        step = check_int("step", step, 0)
        return self.first(step) if step < self.steps else self.second(step - self.steps)


def _progress(step: int, steps: int) -> float:
    step = check_int("step", step, 0)
    return step / steps if step < steps else 1.0


def _settle(schedule: Any) -> None:
    """Check the numbers of a schedule and store them as Python's numbers, which print, compare and pickle well."""
    for field in dataclasses.fields(schedule):
        value = getattr(schedule, field.name)
        checked = check_int("steps", value, 1) if field.name == "steps" else check_finite(field.name, value)
        object.__setattr__(schedule, field.name, checked)
