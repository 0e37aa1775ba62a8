"""Schedules: values, monotony, what bad arguments say."""

import math
import pickle
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semshift.schedules import Constant, Cosine, Linear, Polynomial, Sigmoid, Then

RISING = [Linear(0.0, 2.0, 10), Cosine(0.0, 2.0, 10), Polynomial(0.0, 10, stop=2.0), Sigmoid(2.0, 10)]


@pytest.mark.parametrize(
    ("schedule", "step", "value"),
    [
        (Constant(0.3), 7, 0.3),
        (Linear(1.0, 3.0, 4), 1, 1.5),
        (Cosine(1.0, 0.0, 4), 1, (1 + math.cos(math.pi / 4)) / 2),
        (Polynomial(2.5e-4, 250_000), 150_000, 2.5e-4 * (1 - 150 / 250) ** 0.9),
        (Polynomial(1.0, 10, power=0.0), 9, 1.0),
        (Polynomial(1.0, 10, power=0.0), 10, 0.0),
        (Polynomial(3.0, 4, power=1.0, stop=1.0), 2, 2.0),
        (Sigmoid(0.5, 100), 50, 0.5 * (2 / (1 + math.exp(-5)) - 1)),
        (Sigmoid(1.0, 10, gain=2.0), 10, 2 / (1 + math.exp(-2)) - 1),
        (Then(Constant(1.0), 3, Linear(5.0, 6.0, 2)), 2, 1.0),
        (Then(Constant(1.0), 3, Linear(5.0, 6.0, 2)), 3, 5.0),
        (Then(Constant(1.0), 3, Linear(5.0, 6.0, 2)), 4, 5.5),
    ],
)
def test_values(schedule, step, value):
    result = schedule(step)
    assert type(result) is float
    assert result == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("kind", [Linear, Cosine])
def test_plain_floats_whatever_came(kind):
    # A NumPy float is a float, and would spread into logs and checkpoints, which `weights_only` refuses to load.
    number = np.float64(0.5)
    for schedule in (
        Constant(number),
        kind(number, number, 3),
        Polynomial(number, 3),
        Sigmoid(number, 3),
        kind(0, 1, 3),
    ):
        assert {type(schedule(step)) for step in (0, 1, 3)} == {float}


def test_ends_are_exact_and_extremes_stay_finite():
    for make in (Linear, Cosine, lambda start, stop, steps: Polynomial(start, steps, stop=stop)):
        assert (make(0.1, 0.3, 7)(0), make(0.1, 0.3, 7)(7)) == (0.1, 0.3)
        assert all(math.isfinite(make(1e308, -1e308, 7)(step)) for step in range(8))
    assert Linear(0.0, 2.0, 3)(10**400) == 2.0
    assert Linear(0.0, 2.0, 10**400)(10**399) == pytest.approx(0.2)
    assert Sigmoid(2.0, 3, gain=1e300)(1) == 2.0


@pytest.mark.parametrize("schedule", RISING)
@given(a=st.integers(0, 30), b=st.integers(0, 30))
def test_rising_then_held(schedule, a, b):
    low, high = sorted((a, b))
    assert schedule(low) <= schedule(high)
    assert schedule(0) == 0
    assert schedule(10) == schedule(10**12) == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize("schedule", [*RISING, Constant(1.0), Then(Constant(0.0), 2, Sigmoid(1.0, 3))])
def test_is_a_value(schedule):
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert eval(repr(schedule)) == schedule
    assert len({schedule, pickle.loads(pickle.dumps(schedule))}) == 1
    assert Linear(0.0, 2.0, 10) != Linear(0.0, 2.0, 11)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Constant(math.nan), ValueError, "expected value to be finite, got nan"),
        (lambda: Constant(-(10**400)), ValueError, f"expected value to be finite, got {-(10**400)}"),
        (lambda: Linear(0.0, -math.inf, 1), ValueError, "expected stop to be finite, got -inf"),
        (lambda: Cosine(math.nan, 0.0, 1), ValueError, "expected start to be finite, got nan"),
        (lambda: Cosine(0.0, None, 1), TypeError, "expected stop to be a number, got None"),
        (lambda: Polynomial("1", 2), TypeError, "expected start to be a number, got '1'"),
        (lambda: Polynomial(1.0, -2), ValueError, "expected steps to be at least 1, got -2"),
        (lambda: Polynomial(1.0, 2, power=math.nan), ValueError, "expected power to be finite, got nan"),
        (lambda: Polynomial(1.0, 2, stop=math.inf), ValueError, "expected stop to be finite, got inf"),
        (lambda: Sigmoid(math.nan, 2), ValueError, "expected stop to be finite, got nan"),
        (lambda: Sigmoid(1.0, 0), ValueError, "expected steps to be at least 1, got 0"),
        (lambda: Sigmoid(1.0, 2, gain=True), TypeError, "expected gain to be a number, got True"),
        (lambda: Constant("1"), TypeError, "expected value to be a number, got '1'"),
        (lambda: Constant(True), TypeError, "expected value to be a number, got True"),
        (lambda: Linear(math.inf, 0.0, 1), ValueError, "expected start to be finite, got inf"),
        (lambda: Linear(0.0, 0.0, 0), ValueError, "expected steps to be at least 1, got 0"),
        (lambda: Cosine(0.0, 1.0, 2.0), TypeError, "expected steps to be an int, got 2.0"),
        (lambda: Cosine(0.0, 1.0, True), TypeError, "expected steps to be an int, got True"),
        (lambda: Polynomial(1.0, 2, power=-1.0), ValueError, "expected power to be at least 0, got -1.0"),
        (lambda: Sigmoid(1.0, 2, gain=0.0), ValueError, "expected gain to be positive, got 0.0"),
        (
            lambda: Then(0.5, 2, Constant(1.0)),
            TypeError,
            "expected first to be a schedule, a function of the step, got 0.5",
        ),
        (
            lambda: Then(Constant(0.5), 2, None),
            TypeError,
            "expected second to be a schedule, a function of the step, got None",
        ),
        (lambda: Then(Constant(0.0), 2.0, Constant(1.0)), TypeError, "expected steps to be an int, got 2.0"),
        (lambda: Then(Constant(0.0), -1, Constant(1.0)), ValueError, "expected steps to be at least 1, got -1"),
        (lambda: Constant(1.0)(-1), ValueError, "expected step to be at least 0, got -1"),
        (lambda: Then(Constant(0.0), 1, Constant(1.0))(-1), ValueError, "expected step to be at least 0, got -1"),
        # Any function of the step will do, and most of them check nothing.
        (lambda: Then(float, 1, float)(-1), ValueError, "expected step to be at least 0, got -1"),
        (lambda: Then(float, 1, float)(2.5), TypeError, "expected step to be an int, got 2.5"),
        (lambda: Sigmoid(1.0, 2)(0.5), TypeError, "expected step to be an int, got 0.5"),
        (lambda: Linear(0.0, 1.0, 2)(True), TypeError, "expected step to be an int, got True"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        make()
