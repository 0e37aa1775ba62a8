"""Health figures: accuracy per domain, gradient norm, prototype distance."""

import math
import re

import pytest
import torch

from semshift.health import class_domain_accuracy, domain_accuracy, gradient_norm, prototype_distance


def test_accuracy_is_told_domain_by_domain():
    everything_is_source = torch.tensor([1.0, 2.0, 0.5, 3.0])
    accuracy = domain_accuracy(everything_is_source, everything_is_source)
    assert (accuracy.source.item(), accuracy.target.item()) == (1.0, 0.0)
    assert accuracy.source.dtype == torch.float32
    # A logit of exactly 0 is wrong on both sides.
    accuracy = domain_accuracy(torch.zeros(2), torch.tensor([0.0, -1.0]))
    assert (accuracy.source.item(), accuracy.target.item()) == (0.0, 0.5)


def test_accuracy_counts_what_takes_part():
    logits = torch.tensor([1.0, math.nan, -1.0, -1.0])
    accuracy = domain_accuracy(
        logits,
        logits,
        source_weight=torch.tensor([0.1, 0.0, 7.0, 0.0]),
        target_weight=torch.tensor([False, False, True, True]),
    )
    assert (accuracy.source.item(), accuracy.target.item()) == (0.5, 1.0)
    nothing = domain_accuracy(logits, logits, source_weight=torch.zeros(4), target_weight=torch.zeros(4))
    assert math.isnan(nothing.source.item())
    assert math.isnan(nothing.target.item())


def test_class_domain_accuracy_adds_the_classes_up():
    # The largest output is a target class, but the source half holds more probability.
    logits = torch.log(torch.tensor([[0.3, 0.3, 0.4, 0.001]]))
    accuracy = class_domain_accuracy(logits, logits, target_weight=torch.tensor([True]))
    assert (accuracy.source.item(), accuracy.target.item()) == (1.0, 0.0)
    swapped = class_domain_accuracy(logits.roll(2, -1), logits.roll(2, -1), source_weight=torch.tensor([1.0]))
    assert (swapped.source.item(), swapped.target.item()) == (0.0, 1.0)


def test_gradient_norm_leaves_no_trace():
    features = torch.randn(3, 4, requires_grad=True)
    hidden = features * 2
    loss = (hidden * torch.arange(12.0).view(3, 4)).sum()
    assert gradient_norm(loss, hidden).item() == pytest.approx(torch.arange(12.0).norm().item())
    assert gradient_norm(loss, features).item() == pytest.approx(2 * torch.arange(12.0).norm().item())
    assert features.grad is None
    loss.backward()
    assert features.grad is not None


def test_gradient_norm_of_half_features_does_not_overflow():
    features = torch.zeros(10, dtype=torch.float16, requires_grad=True)
    assert gradient_norm((features.float() * 60_000).sum(), features).item() == pytest.approx(
        60_000 * 10**0.5, rel=1e-3
    )


def test_prototype_distance_against_a_loop():
    source, target = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    weight = torch.tensor([True, True, False, True, True])
    here = [0, 1, 3, 4]
    middle = (source + target) / 2
    between = [(middle[a] - middle[b]).norm() for a in here for b in here if a != b]
    unit = sum(between) / len(between)
    distance = prototype_distance(source, target, weight=weight)
    assert math.isnan(distance[2])
    for k in here:
        assert distance[k].item() == pytest.approx(((source[k] - target[k]).norm() / unit).item())
    # Features that shrink are not domains that meet.
    shrunk = prototype_distance(source / 1000, target / 1000, weight=weight)
    torch.testing.assert_close(shrunk, distance, equal_nan=True)
    assert prototype_distance(source, source)[0].item() == 0


def test_prototype_distance_needs_two_classes():
    means = torch.randn(3, 2)
    assert prototype_distance(means, means, weight=torch.tensor([1.0, 0.0, 0.0])).isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: domain_accuracy(torch.zeros(2), torch.zeros(2), source_weight=torch.zeros(3)),
            "expected source_weight [2], got [3]",
        ),
        (
            lambda: domain_accuracy(torch.zeros(2), torch.zeros(2, 1), target_weight=torch.zeros(2)),
            "expected target_weight [2, 1], got [2]",
        ),
        (
            lambda: class_domain_accuracy(torch.zeros(2, 4), torch.zeros(2, 3)),
            "expected target_logits [..., 2K], got [2, 3]",
        ),
        (
            lambda: gradient_norm(torch.zeros(2), torch.zeros(2, requires_grad=True)),
            "expected loss to be a scalar, got [2]",
        ),
        (
            lambda: gradient_norm(torch.zeros((), requires_grad=True) * 1, torch.zeros(2, requires_grad=True)),
            "expected loss to be a function of features, got no gradient between them",
        ),
        (
            lambda: gradient_norm(torch.zeros(()), torch.zeros(2)),
            "expected loss to be a function of features, got no gradient between them",
        ),
        (
            lambda: prototype_distance(torch.zeros(2, 3), torch.zeros(3, 3)),
            "expected source_means and target_means [K, C], got [2, 3] and [3, 3]",
        ),
        (
            lambda: prototype_distance(torch.zeros(2, 3), torch.zeros(2, 3), weight=torch.ones(3)),
            "expected weight [2], got [3]",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        call()
