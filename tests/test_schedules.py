"""Schedules: values, monotony, what bad arguments say."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

import semshift
from tests.errors import refuses

RAMPS = [semshift.Linear, semshift.Cosine, semshift.Polynomial, semshift.Sigmoid]
RISING = [ramp(0.0, 2.0, 10) for ramp in RAMPS]
FOUR_FIFTHS = 2 / (1 + math.exp(-10 * 0.8)) - 1


@pytest.mark.parametrize(
    ("schedule", "step", "value"),
    [
        (semshift.Constant(0.3), 7, 0.3),
        (semshift.Linear(1.0, 3.0, 4), 1, 1.5),
        (semshift.Cosine(1.0, 0.0, 4), 1, (1 + math.cos(math.pi / 4)) / 2),
        (semshift.Polynomial(2.5e-4, 0.0, 250_000), 150_000, 2.5e-4 * (1 - 150 / 250) ** 0.9),
        (semshift.Polynomial(1.0, 0.0, 10, power=0.0), 9, 1.0),
        (semshift.Polynomial(1.0, 0.0, 10, power=0.0), 10, 0.0),
        (semshift.Polynomial(3.0, 1.0, 4, 1.0), 2, 2.0),
        (semshift.Polynomial(1.0, 3.0, 4, power=2.0), 1, 3 - 2 * 0.75**2),
        (semshift.Sigmoid(0.0, 0.5, 100), 50, 0.5 * (2 / (1 + math.exp(-5)) - 1)),
        (semshift.Sigmoid(0.0, 1.0, 10, gain=2.0), 10, 2 / (1 + math.exp(-2)) - 1),
        (semshift.Sigmoid(0.25, 1.0, 10, 2.0), 5, 0.25 + 0.75 * (2 / (1 + math.exp(-1)) - 1)),
        (semshift.Sigmoid(2.0, -1.0, 5), 4, 2 - 3 * FOUR_FIFTHS),
        (semshift.Then(semshift.Constant(1.0), 3, semshift.Linear(5.0, 6.0, 2)), 2, 1.0),
        (semshift.Then(semshift.Constant(1.0), 3, semshift.Linear(5.0, 6.0, 2)), 3, 5.0),
        (semshift.Then(semshift.Constant(1.0), 3, semshift.Linear(5.0, 6.0, 2)), 4, 5.5),
    ],
)
def test_values(schedule, step, value):
    result = schedule(step)
    assert type(result) is float
    assert result == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("ramp", RAMPS)
@given(start=st.floats(-9, 9), stop=st.floats(-9, 9), steps=st.integers(1, 50))
def test_ramps_go_from_start_to_stop(ramp, start, stop, steps):
    schedule = ramp(start, stop, steps)
    assert schedule == ramp(start=start, stop=stop, steps=steps)
    assert schedule(0) == start
    # The sigmoid ends at tanh(5) of the way, the others at its end.
    missing = 1 - math.tanh(5) if ramp is semshift.Sigmoid else 0.0
    for step in (steps, steps + 1, 10**9):
        assert schedule(step) == pytest.approx(stop + missing * (start - stop), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), np.int64(1)])
def test_plain_floats_whatever_came(number):
    # A NumPy float is a float, and would spread into logs and checkpoints, which `weights_only` refuses to load.
    schedules = [semshift.Constant(number), *(ramp(number, number, np.int64(3)) for ramp in RAMPS)]
    schedules += [ramp(0, 1, 3) for ramp in RAMPS]
    schedules.append(semshift.Then(schedules[0], np.int32(2), schedules[1]))
    for schedule in schedules:
        assert {type(schedule(step)) for step in (0, 1, 3, np.int64(2))} == {float}


def test_ends_are_exact_and_extremes_stay_finite():
    for make in (semshift.Linear, semshift.Cosine, semshift.Polynomial):
        assert (make(0.1, 0.3, 7)(0), make(0.1, 0.3, 7)(7)) == (0.1, 0.3)
    for make in RAMPS:
        assert all(math.isfinite(make(1e308, -1e308, 7)(step)) for step in range(8))
    assert semshift.Linear(0.0, 2.0, 3)(10**400) == 2.0
    assert semshift.Linear(0.0, 2.0, 10**400)(10**399) == pytest.approx(0.2)
    assert semshift.Sigmoid(0.0, 2.0, 3, gain=1e300)(1) == 2.0


@pytest.mark.parametrize("schedule", RISING)
@given(a=st.integers(0, 30), b=st.integers(0, 30))
def test_rising_then_held(schedule, a, b):
    low, high = sorted((a, b))
    assert schedule(low) <= schedule(high)
    assert schedule(0) == 0
    assert schedule(10) == schedule(10**12) == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize(
    "schedule", [*RISING, semshift.Constant(1.0), semshift.Then(semshift.Constant(0.0), 2, semshift.Sigmoid(0, 1, 3))]
)
def test_is_a_value(schedule):
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert eval(repr(schedule), vars(semshift).copy()) == schedule
    assert len({schedule, pickle.loads(pickle.dumps(schedule))}) == 1
    assert semshift.Linear(0.0, 2.0, 10) != semshift.Linear(0.0, 2.0, 11)


@pytest.mark.parametrize(
    "schedule",
    [
        semshift.Constant(0.3),
        *(ramp(2.0, 0.5, 20) for ramp in RAMPS),
        semshift.Polynomial(1, 0, 20, power=2),
        semshift.Then(
            semshift.Constant(0), 10, semshift.Then(semshift.Linear(0, 1, 5), 5, semshift.Sigmoid(1.0, 0.0, 9))
        ),
    ],
)
def test_full_graph(schedule):
    """In a compiled step the value is that of the step, and steps share their graphs."""
    torch._dynamo.reset()
    count = CompileCounter()
    weighted = torch.compile(lambda loss, step: schedule(step) * loss, backend=count, fullgraph=True)
    loss = torch.ones((), dtype=torch.float64)
    for step in range(40):
        assert weighted(loss, step).item() == pytest.approx(schedule(step), rel=1e-12)
    # Steps 0, 1 and the others, and the parts of a schedule: torch 2.4 compiles some of them twice.
    assert count.frame_count <= 8


@pytest.mark.parametrize("ramp", RAMPS)
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"start": math.nan}, ValueError),
        ({"start": math.inf}, ValueError),
        ({"stop": -math.inf}, ValueError),
        ({"stop": -(10**400)}, ValueError),
        ({"stop": np.float64("nan")}, ValueError),
        ({"start": "1"}, TypeError),
        ({"start": True}, TypeError),
        ({"stop": None}, TypeError),
        ({"steps": 0}, ValueError),
        ({"steps": np.int64(-2)}, ValueError),
        ({"steps": 2.0}, TypeError),
        ({"steps": True}, TypeError),
    ],
)
def test_bad_ramps(ramp, change, error):
    ((name, value),) = change.items()
    with refuses(error, name, value):
        ramp(**{"start": 0.0, "stop": 1.0, "steps": 2} | change)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: semshift.Constant(math.nan), ValueError, ("value", "nan")),
        (lambda: semshift.Constant("1"), TypeError, ("value", "'1'")),
        (lambda: semshift.Constant(True), TypeError, ("value", True)),
        (lambda: semshift.Polynomial(1.0, 0.0, 2, power=math.nan), ValueError, ("power", "nan")),
        (lambda: semshift.Polynomial(1.0, 0.0, 2, power=-1.0), ValueError, ("power", 0, -1.0)),
        (lambda: semshift.Sigmoid(0.0, 1.0, 2, gain=0.0), ValueError, ("gain", 0.0)),
        (lambda: semshift.Sigmoid(0.0, 1.0, 2, gain=True), TypeError, ("gain", True)),
        (lambda: semshift.Then(0.5, 2, semshift.Constant(1.0)), TypeError, ("first", "schedule", 0.5)),
        (lambda: semshift.Then(semshift.Constant(0.5), 2, None), TypeError, ("second", "schedule", None)),
        (lambda: semshift.Then(float, 2.0, float), TypeError, ("steps", 2.0)),
        (lambda: semshift.Then(float, -1, float), ValueError, ("steps", 1, -1)),
        (lambda: semshift.Constant(1.0)(-1), ValueError, ("step", 0, -1)),
        # Any function of the step will do, and most of them check nothing.
        (lambda: semshift.Then(float, 1, float)(-1), ValueError, ("step", 0, -1)),
        (lambda: semshift.Then(float, 1, float)(2.5), TypeError, ("step", 2.5)),
        (lambda: semshift.Sigmoid(0.0, 1.0, 2)(0.5), TypeError, ("step", 0.5)),
        (lambda: semshift.Linear(0.0, 1.0, 2)(True), TypeError, ("step", True)),
    ],
)
def test_errors(make, error, says):
    with refuses(error, *says):
        make()
