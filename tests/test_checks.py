"""Argument checks: what every public function accepts as a count, a number or a flag, then each check alone."""

import inspect
import math
from typing import Optional

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import semshift
from semshift import _checks, _transforms
from tests.errors import refuses

FEATURES = torch.arange(24.0).reshape(1, 2, 3, 4)
LABELS = torch.tensor([[[0, 1, 2, 0], [9, 9, 1, 1], [2, 0, 0, 9]]])
LOGITS = torch.linspace(-3, 3, 2 * 32 * 32).reshape(1, 2, 32, 32)
LEAF = torch.arange(6.0).reshape(2, 3).requires_grad_()
SQUARES = LEAF.square()
RAMP = {"start": 1, "stop": 2, "steps": 7}


# Methods have counts and flags as well: here by functions that call them.


def linear_at(step: int):
    return semshift.Linear(0.0, 1.0, 1000)(step)


def then_at(step: int):
    return semshift.Then(semshift.Constant(0.0), 2, semshift.Cosine(0.0, 1.0, 1000))(step)


def resume(first_step: int, rank: int, world_size: int):
    sampler = semshift.MixedBatchSampler({"a": 1000}, {"a": 4}, seed=0, steps=600)
    return sampler.resume(first_step, rank=rank, world_size=world_size, per_batch={"a": 2})


def aligned(size=(33, 32), *, align_corners: bool = False):
    torch.manual_seed(0)
    return semshift.GlobalAlignment(2).eval()(LOGITS, LOGITS, size, align_corners=align_corners)


CALLS = {
    semshift.ClassPixelDiscriminator: {"in_channels": 2, "num_classes": 3, "spectral_norm": True},
    semshift.Constant: {"value": 3},
    semshift.Cosine: RAMP,
    semshift.FCDiscriminator: {"in_channels": 2, "base_channels": 3, "spectral_norm": True},
    semshift.GlobalAlignment: {"num_classes": 2, "base_channels": 3, "spectral_norm": True},
    semshift.Linear: RAMP,
    semshift.MixedBatchSampler: {"sizes": {"a": 7}, "per_batch": {"a": 2}, "seed": 5}
    | {"rank": 1, "world_size": 2, "first_step": 3, "steps": 4},
    semshift.Polynomial: RAMP | {"power": 2},
    semshift.PrototypeBank: {"in_channels": 2, "num_classes": 3, "momentum": 0},
    semshift.PrototypeDiscriminator: {"in_channels": 2, "num_classes": 3, "spectral_norm": True},
    semshift.SemanticAlignment: {"in_channels": 2, "num_classes": 3, "ignore_index": 9}
    | {"spectral_norm": True, "align_corners": True, "per_image": False},
    semshift.Sigmoid: RAMP | {"gain": 2},
    semshift.Then: {"first": float, "steps": 3, "second": float},
    semshift.balanced_weight: {"loss": SQUARES.sum(), "confusion": LEAF.sum(), "features": LEAF, "ratio": 2},
    semshift.check_labels: {"labels": LABELS, "num_classes": 3, "ignore_index": 9},
    semshift.class_mix: {"labels": LABELS, "num_classes": 3, "ignore_index": 9, "keys": torch.arange(3.0)[None]},
    semshift.class_shares: {"labels": LABELS, "size": (2, 2), "num_classes": 3, "ignore_index": 9}
    | {"resample": "bilinear", "align_corners": True},
    semshift.class_sums: {"features": FEATURES, "labels": LABELS, "num_classes": 3, "ignore_index": 9}
    | {"align_corners": True, "per_image": True},
    semshift.prototype_contrast_loss: {"features": FEATURES, "labels": LABELS, "prototypes": torch.eye(3, 2)}
    | {"temperature": 1, "ignore_index": 9, "align_corners": True},
    semshift.pseudo_labels: {"logits": LOGITS, "threshold": 1},
    semshift.r1_penalty: {"logits": SQUARES, "inputs": LEAF, "sample_dims": 2},
    semshift.rare_class_weights: {"class_counts": np.arange(6).reshape(3, 2), "temperature": 1, "min_pixels": 2},
    semshift.remap_labels: {"labels": LABELS, "table": {0: 5}, "default": 7},
    semshift.resize_labels: {"labels": LABELS, "size": (2, 2), "num_classes": 3, "ignore_index": 9}
    | {"resample": "majority", "min_share": 1},
    semshift.reverse_gradient: {"features": LEAF, "scale": 3},
    semshift.weighted_class_sums: {"features": FEATURES, "weights": FEATURES, "per_image": True},
    linear_at: {"step": 5},
    then_at: {"step": 5},
    resume: {"first_step": 200, "rank": 1, "world_size": 2},
    aligned: {"align_corners": True},
}


def parameters(function, *annotations):
    """Names of the arguments with such an annotation; none of what has no signature."""
    try:
        found = inspect.signature(function).parameters.items()
    except (TypeError, ValueError):
        return []
    return [name for name, parameter in found if parameter.annotation in annotations]


def arguments(*annotations):
    return [
        pytest.param(function, name, id=f"{function.__name__}-{name}")
        for function in CALLS
        for name in parameters(function, *annotations)
    ]


def call(function, name, value):
    """The result's repr. Every number that the result stores must be a Python number."""
    result = function(**CALLS[function] | {name: value})
    assert not any(isinstance(kept, np.generic) for kept in getattr(result, "__dict__", {}).values())
    return repr(result)


def test_every_public_count_number_and_flag_is_called_here():
    for function in (getattr(semshift, name) for name in semshift.__all__):
        expected = parameters(function, int, Optional[int], float, Optional[float], bool)
        assert set(expected) <= set(CALLS.get(function, ())), function


@pytest.mark.parametrize(("function", "name"), arguments(int, Optional[int]))
def test_counts(function, name):
    count = CALLS[function][name]
    for kind in (np.int16, np.uint8, np.int64, np.uint64):
        assert call(function, name, kind(count)) == call(function, name, count)
    for value in (True, 2.0, "2", [2], torch.tensor(2), np.array(2), np.bool_(True), np.float64(2)):
        with refuses(TypeError, name, repr(value)):
            call(function, name, value)


@pytest.mark.parametrize(("function", "name"), arguments(float))
def test_numbers(function, name):
    for kind in (np.int8, np.uint8, np.int64, np.float16, np.float32, np.float64, np.longdouble):
        number = kind(CALLS[function][name])
        plain = int(number) if isinstance(number, np.integer) else float(number)
        assert call(function, name, number) == call(function, name, plain)
    for value in (True, "1", None, 1j, torch.tensor(1.0), np.array(1.0), np.bool_(True)):
        with refuses(TypeError, name, repr(value)):
            call(function, name, value)


@pytest.mark.parametrize(("function", "name"), arguments(bool))
def test_flags(function, name):
    for flag in (True, False):
        call(function, name, flag)
    for value in (0, 1, None, "no", torch.tensor(True)):
        with refuses(TypeError, name, repr(value)):
            call(function, name, value)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda n: semshift.FCDiscriminator(n), "in_channels"),
        (lambda n: semshift.PrototypeDiscriminator(2, 2, hidden_channels=[n]), "hidden_channels"),
        (lambda n: semshift.ClassPixelDiscriminator(2, 2, hidden_channels=(n,)), "hidden_channels"),
        (lambda n: semshift.SemanticAlignment(2, 2, hidden_channels=(n, 4)), "hidden_channels"),
        (lambda n: semshift.resize_labels(LABELS, (n, 2), 3, resample="nearest", ignore_index=9), "size"),
        (lambda n: semshift.class_shares(LABELS, (2, n), 3, resample="area", ignore_index=9), "size"),
        (lambda n: aligned((n, 33)), "size"),
        (lambda n: aligned((32, n)), "size"),
        (lambda n: semshift.MixedBatchSampler({"a": n}, {"a": 1}, seed=0), "sizes['a']"),
        (lambda n: semshift.MixedBatchSampler({"a": 7}, {"a": n}, seed=0), "per_batch['a']"),
        (lambda n: semshift.collate_by_domain([1] * 40, {"a": n}), "per_batch['a']"),
        (lambda n: semshift.remap_labels(LABELS, {n: 5}, default=1), "table"),
        (lambda n: semshift.remap_labels(LABELS, {0: n}, default=1), "table"),
    ],
)
def test_counts_within_others(function, name):
    for kind in (np.uint8, np.int64, np.uint64):
        assert repr(function(kind(40))) == repr(function(40))
    for value in (True, 40.0, "40", torch.tensor(40)):
        with refuses(TypeError, name, repr(value)):
            function(value)


# The checks themselves.


def test_ints_are_at_least_what_they_must_be():
    assert _checks.check_int("n", 3, 3) == 3
    assert type(_checks.check_int("n", np.uint8(3))) is int
    assert _checks.check_int("n", -(10**30)) == -(10**30)
    with refuses(ValueError, "n", 4, 3):
        _checks.check_int("n", 3, 4)


def test_a_symbolic_size_passes_through_untouched():
    """As a number it would be a constant of the graph."""

    def zeros(x):
        return x.new_zeros(_checks.check_int("n", x.shape[0], 1))

    traced = make_fx(zeros, tracing_mode="symbolic")(torch.ones(5))
    assert traced(torch.ones(7)).shape == (7,)


def test_numbers_come_back_as_pythons():
    for value, kind in ((2, int), (2.5, float), (np.uint8(2), int), (np.float64(2), float), (np.float16(2), float)):
        assert type(_checks.check_number("x", value)) is kind
    # Whether it is finite is the caller's business.
    assert math.isnan(_checks.check_number("x", np.float32("nan")))


def test_options():
    _checks.check_option("mode", "a", ("a", "b"))
    _checks.check_option("mode", None, ("a", None))
    for wrong in ("c", None, ["a"], 1):
        with refuses(ValueError, "mode", "'a'", "'b'", "'d'", repr(wrong)):
            _checks.check_option("mode", wrong, ("a", "b", "d"))
    with refuses(ValueError, "mode", "'a'", None, "'c'"):
        _checks.check_option("mode", "c", ("a", None))


def test_tensors():
    x = torch.zeros(2, 3)
    for dtype in _checks.FLOATS:
        _checks.check_floating("x", x.to(dtype))
    for check in (_checks.check_tensor, _checks.check_floating):
        with refuses(TypeError, "x", "ndarray"):
            check("x", x.numpy())
    for dtype in (*_checks.INTEGERS, torch.bool):
        with refuses(TypeError, "x", dtype):
            _checks.check_floating("x", x.to(dtype))
    _checks.check_device("x", x, "y", x)
    with refuses(ValueError, "x", "y", "cpu", "meta"):
        _checks.check_device("x", x, "y", x.to("meta"))


@pytest.mark.parametrize("dtype", [torch.bool, *_checks.FLOATS])
def test_weights(dtype):
    x = torch.zeros(2, 3)
    for good in (None, torch.tensor([1, 0]).to(dtype)):
        _checks.check_weight("weight", good, "x", x, [2])
    _checks.check_weight("weight", torch.zeros(2, 0).to(dtype), "x", x, torch.Size([2, 0]))


@pytest.mark.parametrize(
    ("weight", "error", "says"),
    [
        (1.0, TypeError, ("weight", "float")),
        (torch.ones(2).long(), TypeError, ("weight", torch.int64)),
        (torch.ones(3), ValueError, ("weight", [2], "x", [2, 3], [3])),
        (torch.ones(2, 1), ValueError, ("weight", [2], "x", [2, 3], [2, 1])),
        (torch.ones(2, device="meta"), ValueError, ("weight", "x", "meta", "cpu")),
        (torch.tensor([-0.5, 1.0]), ValueError, ("weight", -0.5)),
        (torch.tensor([1.0, math.inf]), ValueError, ("weight", "inf")),
        (torch.tensor([math.nan, -1.0]), ValueError, ("weight", "nan")),
    ],
)
def test_bad_weights(weight, error, says):
    with refuses(error, *says):
        _checks.check_weight("weight", weight, "x", torch.zeros(2, 3), [2])


def test_values_of_weights_are_looked_at_where_that_costs_nothing(monkeypatch):
    x, weight = torch.zeros(2), torch.tensor([-1.0, math.nan])
    _checks.check_weight("weight", weight, "x", x, [2], values=False)
    _checks.check_weight("weight", weight.to("meta"), "x", x.to("meta"), [2])
    assert _transforms.readable(weight) is weight
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert _transforms.readable(weight) is None
    _checks.check_weight("weight", weight, "x", x, [2])


def test_labelling():
    assert _checks.check_labelling(LABELS, np.int64(3), np.uint8(9)) == (3, 9)
    assert _checks.check_labelling(LABELS, 300, None) == (300, None)
    assert _checks.check_labelling(LABELS, 255, 255) == (255, 255)
    assert _checks.check_labelling(LABELS, 300, -(2**63)) == (300, -(2**63))
    for wrong in (2**63, -(2**63) - 1):
        with refuses(ValueError, "ignore_index", "int64", wrong):
            _checks.check_labelling(LABELS, 3, wrong)
    with refuses(ValueError, "ignore_index", None, 255, "num_classes", 256):
        _checks.check_labelling(LABELS, 256, 255)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        (torch.uint8, 0, 255),
        (torch.int8, -128, 127),
        (torch.int16, -(2**15), 2**15 - 1),
        (torch.int64, -(2**63), 2**63 - 1),
    ],
)
def test_what_a_dtype_holds(dtype, low, high):
    assert [_checks.fits(dtype, value) for value in (low - 1, low, high, high + 1)] == [False, True, True, False]
