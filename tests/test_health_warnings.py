"""`health_warnings`: thresholds, histories of all kinds, and refused arguments."""

import math

import pytest
import torch

import semshift
from tests.errors import mentions, refuses
from tests.test_health import NAN


def history(steps=10, **changed):
    """Of a healthy discriminator, each figure as said; None leaves it out."""
    row = {"source_accuracy": 0.8, "target_accuracy": 0.7, "gradient_ratio": 0.1, "prototype_distance": 0.5} | changed
    return [{name: value for name, value in row.items() if value is not None}] * steps


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"source_accuracy": 0.98, "target_accuracy": 0.98}, ["certain"]),
        ({"source_accuracy": 1.0, "target_accuracy": 0.97}, []),
        ({"source_accuracy": 1.0, "target_accuracy": 0.05}, ["chance"]),
        ({"source_accuracy": 0.56, "target_accuracy": 0.55}, []),
        ({"source_accuracy": NAN}, ["idle"]),
        ({"source_accuracy": NAN, "gradient_ratio": 0.0}, ["idle"]),
        ({"gradient_ratio": 0.0009}, ["silent"]),
        ({"gradient_ratio": 0.0011}, []),
        ({"gradient_ratio": 1.9}, []),
        ({"gradient_ratio": 2.1}, ["dominates"]),
        ({"gradient_ratio": math.inf}, ["dominates"]),
        ({"gradient_ratio": NAN}, []),
        ({"source_accuracy": 1.0, "target_accuracy": 1.0, "gradient_ratio": 0.0}, ["certain", "silent"]),
        # Each is judged without the other.
        ({"source_accuracy": None, "target_accuracy": None, "gradient_ratio": 0.0}, ["silent"]),
        ({"gradient_ratio": None, "source_accuracy": 0.4}, ["chance"]),
    ],
)
def test_health_warnings(changed, expected, kind):
    rows = [{name: kind(value) for name, value in row.items()} for row in history(**changed)]
    assert [warning.split(":")[0] for warning in semshift.health_warnings(rows)] == expected
    # Nine steps are too few to judge.
    assert semshift.health_warnings(rows[:9]) == []


def test_health_warnings_of_a_mixed_history():
    # Ratios count by their median, so that one odd batch is no fault; accuracies count by their mean, without nan.
    assert semshift.health_warnings([*history(9), *history(2, gradient_ratio=100.0)]) == []
    certain = history(10, source_accuracy=1.0, target_accuracy=1.0)
    nothing = history(5, source_accuracy=NAN, target_accuracy=NAN)
    assert [warning.split(":")[0] for warning in semshift.health_warnings(certain + nothing)] == ["certain"]
    (warning,) = semshift.health_warnings(history(source_accuracy=1.0, target_accuracy=0.99))
    mentions(warning, "1.00", "0.99")
    # Nine ratios are too few, and nan does not count.
    assert semshift.health_warnings([*history(5, gradient_ratio=NAN), *history(9, gradient_ratio=0.0)]) == []
    assert semshift.health_warnings([]) == []


def test_health_warnings_do_not_judge_the_sign_of_wasserstein_logits():
    rows = history(source_accuracy=1.0, target_accuracy=1.0)
    assert semshift.health_warnings(rows, objective="wasserstein") == []
    (warning,) = semshift.health_warnings(history(target_accuracy=NAN), objective="wasserstein")
    assert warning.startswith("idle: ")


def test_health_warnings_refuse():
    with refuses(TypeError, "history", "dict"):
        semshift.health_warnings(history()[0])
    with refuses(TypeError, "history", "float"):
        semshift.health_warnings([0.5])
    for wrong in ("0.5", True, torch.rand(2)):
        with refuses(TypeError, "source_accuracy"):
            semshift.health_warnings(history(source_accuracy=wrong))
    with refuses(ValueError, "target_accuracy", 97.0):
        semshift.health_warnings(history(target_accuracy=97.0))
    with refuses(ValueError, "gradient_ratio", -1.0):
        semshift.health_warnings(history(gradient_ratio=-1.0))
    with refuses(ValueError, "gradient_ratio", "acc"):
        semshift.health_warnings([{"acc": 1.0}])
    with refuses(ValueError, "objective", "'gan'"):
        semshift.health_warnings(history(), objective="gan")
