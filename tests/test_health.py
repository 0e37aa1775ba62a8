"""Figures of the adversary's health: against counts and distances done by hand."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semshift.health import DomainAccuracy, class_domain_accuracy, domain_accuracy, gradient_norm, prototype_distance
from semshift.losses import confusion_loss

NAN = math.nan
LOGITS = st.floats(-3, 3, width=32) | st.sampled_from([0.0, -0.0, math.inf, -math.inf, NAN])


def share(right, weights):
    counted = [hit for hit, weight in zip(right, weights) if weight > 0]
    return torch.tensor(sum(counted)).float() / len(counted) if counted else torch.tensor(NAN)


def same(a, b):
    return torch.equal(a, b) or (a.isnan().all().item() and b.isnan().all().item())


@given(st.lists(st.tuples(LOGITS, st.sampled_from([0.0, 0.5, 2.0]))), st.lists(LOGITS), st.booleans())
def test_domain_accuracy_counts(source, target, as_bool):
    logits = torch.tensor([logit for logit, _ in source]).reshape(-1, 1)
    weights = torch.tensor([weight for _, weight in source]).reshape(-1, 1)
    accuracy = domain_accuracy(logits, torch.tensor(target), source_weight=weights > 0 if as_bool else weights)
    assert isinstance(accuracy, DomainAccuracy)
    assert accuracy.source.dtype == accuracy.target.dtype == torch.float32
    assert same(accuracy.source, share([logit > 0 for logit, _ in source], [weight for _, weight in source]))
    assert same(accuracy.target, share([logit < 0 for logit in target], [1] * len(target)))


def test_a_logit_of_zero_is_wrong_on_both_sides():
    assert domain_accuracy(torch.zeros(3), torch.zeros(3)) == (0.0, 0.0)


def test_domains_and_their_weights_are_kept_apart():
    here = torch.tensor([True, False, False])
    logits = torch.tensor([1.0, -1.0, 1.0])
    accuracy = domain_accuracy(logits, logits, source_weight=here, target_weight=~here)
    assert accuracy == (1.0, 0.5)
    accuracy = class_domain_accuracy(
        torch.stack([logits, -logits], -1), torch.stack([logits, -logits], -1), source_weight=here, target_weight=~here
    )
    assert accuracy == (1.0, 0.5)


@pytest.mark.parametrize("classes", [1, 3])
def test_accuracy_is_nan_where_nothing_takes_part(classes):
    logits, nothing = torch.randn(4, 2 * classes), torch.zeros(4)
    for accuracy in (
        domain_accuracy(logits[:, 0], logits[:, 0], source_weight=nothing, target_weight=nothing > 0),
        class_domain_accuracy(logits, logits, source_weight=nothing, target_weight=nothing > 0),
        domain_accuracy(logits[:0], logits[:0]),
        class_domain_accuracy(logits[:0], logits[:0]),
    ):
        assert accuracy.source.isnan()
        assert accuracy.target.isnan()


def test_class_domain_accuracy_weighs_halves_not_peaks():
    """The largest single output is of one domain, the larger half of the other."""
    logits = torch.tensor([1.2, 1.2, 1.2, 2.0, -9.0, -9.0])
    assert class_domain_accuracy(logits, logits) == (1.0, 0.0)
    large = 1000 * torch.tensor([[1.0, -1.0, 0.9, 0.9]])
    assert class_domain_accuracy(large, large) == (1.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_class_domain_accuracy_of_half_logits(dtype):
    """Both halves sum to log 2 in half precision, where one is larger."""
    logits = torch.tensor([[0.0, 0.0, 0.0, 1e-4]], dtype=dtype)
    assert class_domain_accuracy(logits, logits) == (0.0, 1.0)


def test_figures_hold_no_graph():
    logits = torch.randn(3, 4, requires_grad=True)
    figures = [
        *domain_accuracy(logits, logits),
        *class_domain_accuracy(logits, logits),
        gradient_norm(logits.sum(), logits),
        prototype_distance(logits, logits * 2),
    ]
    assert not any(figure.requires_grad for figure in figures)


INTEGERS, ELSEWHERE = torch.ones(2, dtype=torch.int64), torch.zeros(2, device="meta")
Z = torch.zeros


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: domain_accuracy([1.0], Z(1)), "source_logits to be a tensor, got list"),
        (lambda: domain_accuracy(Z(2), INTEGERS), "target_logits to be floating point, got torch.int64"),
        (lambda: domain_accuracy(Z(1), Z(1), source_weight=[1]), "source_weight to be a tensor or None, got list"),
        (lambda: class_domain_accuracy(Z(2, 2), None), "target_logits to be a tensor, got NoneType"),
        (
            lambda: class_domain_accuracy(Z(2, 2), Z(2, 2), target_weight=INTEGERS),
            "target_weight to be bool or floating point, got torch.int64",
        ),
        (lambda: gradient_norm(0.0, Z(1)), "loss to be a tensor, got float"),
        (lambda: gradient_norm(Z(()), None), "features to be a tensor, got NoneType"),
        (lambda: prototype_distance(None, Z(2, 2)), "source_means to be a tensor, got NoneType"),
        (lambda: prototype_distance(Z(2, 2), INTEGERS), "target_means to be floating point, got torch.int64"),
        (lambda: prototype_distance(Z(2, 2), Z(2, 2), weight=[1, 1]), "weight to be a tensor or None, got list"),
    ],
)
def test_type_errors(call, message):
    with pytest.raises(TypeError, match="^" + re.escape(f"expected {message}") + "$"):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: domain_accuracy(torch.ones(2), torch.ones(2), source_weight=torch.ones(1)),
            "source_weight [2], got [1]",
        ),
        (
            lambda: domain_accuracy(torch.ones(2), torch.ones(2, 3), target_weight=torch.ones(2)),
            "target_weight [2, 3], got [2]",
        ),
        (
            lambda: class_domain_accuracy(torch.ones(4, 2), torch.ones(4, 2), target_weight=torch.ones(4, 2)),
            "target_weight [4], got [4, 2]",
        ),
        (lambda: class_domain_accuracy(torch.ones(4, 3), torch.ones(4, 2)), "source_logits [..., 2K], got [4, 3]"),
        (lambda: class_domain_accuracy(torch.ones(4, 2), torch.ones(4, 0)), "target_logits [..., 2K], got [4, 0]"),
        (lambda: class_domain_accuracy(torch.ones(()), torch.ones(4, 2)), "source_logits [..., 2K], got []"),
        (lambda: gradient_norm(torch.ones(1), torch.ones(1)), "loss to be a scalar, got [1]"),
        (
            lambda: prototype_distance(torch.ones(2), torch.ones(2)),
            "source_means and target_means [K, C], got [2] and [2]",
        ),
        (
            lambda: prototype_distance(torch.ones(2, 1), torch.ones(3, 1)),
            "source_means and target_means [K, C], got [2, 1] and [3, 1]",
        ),
        (lambda: prototype_distance(torch.ones(2, 1), torch.ones(2, 1), weight=torch.ones(1)), "weight [2], got [1]"),
        (
            lambda: domain_accuracy(Z(2), Z(2), target_weight=ELSEWHERE),
            "target_weight and target_logits on one device, got meta and cpu",
        ),
        (
            lambda: prototype_distance(Z(2, 3), Z(2, 3, device="meta")),
            "target_means and source_means on one device, got meta and cpu",
        ),
    ],
)
def test_value_errors(call, message):
    with pytest.raises(ValueError, match="^" + re.escape(f"expected {message}") + "$"):
        call()


@pytest.mark.parametrize("scale", [1.0, 2.0**-60])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradient_norm(dtype, scale):
    """Of [3, 4] the norm is 5; scaled by 2 ** -60 the squares leave float32's range, and half cannot hold them."""
    if scale < 1 and dtype == torch.float16:
        scale = 2.0**-20
    features = torch.ones(2, dtype=dtype, requires_grad=True)
    weights = torch.tensor([3.0, 4.0], dtype=dtype) * scale
    norm = gradient_norm((features * weights).sum(), features)
    assert norm.dtype == torch.promote_types(dtype, torch.float32)
    assert norm.item() == 5 * scale
    assert not norm.requires_grad


def test_gradient_norm_keeps_the_graph_and_writes_nothing():
    weight = torch.tensor([2.0, -1.0], requires_grad=True)
    features = weight * 3
    loss = features.square().sum()
    assert gradient_norm(loss, features).item() == gradient_norm(loss, features).item()
    gradient_norm(loss, weight)
    assert weight.grad is None
    loss.backward()
    assert torch.equal(weight.grad, 18 * weight.detach())


@pytest.mark.parametrize(
    ("loss", "features"),
    [
        (torch.ones(()), torch.ones(1, requires_grad=True)),
        (torch.ones((), requires_grad=True) * 2, torch.ones(1)),
        (torch.ones((), requires_grad=True) * 2, torch.ones(1, requires_grad=True)),
    ],
    ids=["constant loss", "constant features", "no way between"],
)
def test_gradient_norm_without_a_gradient(loss, features):
    message = "expected loss to be a function of features, got no gradient between them"
    with pytest.raises(ValueError, match=f"^{message}$"):
        gradient_norm(loss, features)


def test_gradient_norm_of_a_term_in_which_nothing_takes_part():
    features = torch.randn(3, requires_grad=True)
    assert gradient_norm(confusion_loss(features, weight=torch.zeros(3)), features).item() == 0


def distance(source, target, here):
    """The definition, in a loop."""
    middle = [[(a + b) / 2 for a, b in zip(s, t)] for s, t in zip(source, target)]
    pairs = [math.dist(middle[i], middle[j]) for i in here for j in here if i != j]
    unit = sum(pairs) / len(pairs) if pairs else NAN
    return [math.dist(s, t) / unit if k in here else NAN for k, (s, t) in enumerate(zip(source, target))]


@given(st.integers(0, 5), st.integers(1, 4), st.integers(0, 99), st.data())
def test_prototype_distance_is_its_definition(classes, channels, seed, data):
    generator = torch.Generator().manual_seed(seed)
    source, target = torch.randn(2, classes, channels, generator=generator, dtype=torch.float64)
    here = [data.draw(st.booleans()) for _ in range(classes)]
    taking_part = torch.tensor(here, dtype=torch.bool)
    expected = torch.tensor(
        distance(source.tolist(), target.tolist(), [k for k in range(classes) if here[k]]), dtype=torch.float64
    )
    # What takes no part may hold anything.
    source[~taking_part] = NAN
    for weight in (taking_part, taking_part.float() / 2):
        found = prototype_distance(source, target, weight=weight)
        assert found.dtype == torch.float64
        # Two norms and a mean of K (K - 1) terms, none of which cancel after the first difference.
        bound = (classes**2 + 2 * channels + 8) * torch.finfo(torch.float64).eps
        # The middles' difference may cancel: normal draws lie within 6.
        torch.testing.assert_close(found, expected, rtol=100 * bound, atol=100 * bound, equal_nan=True)


@given(st.integers(-20, 20), st.integers(0, 99))
def test_prototype_distance_has_no_scale(exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    source, target = torch.randn(2, 4, 3, generator=generator)
    # Powers of two round nothing.
    scaled = prototype_distance(source * 2.0**exponent, target * 2.0**exponent)
    assert torch.equal(scaled, prototype_distance(source, target))


@pytest.mark.parametrize("weight", [None, torch.zeros(3), torch.tensor([False, True, False])])
def test_prototype_distance_needs_two_classes(weight):
    classes = 1 if weight is None else 3
    assert prototype_distance(torch.zeros(classes, 2), torch.ones(classes, 2), weight=weight).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_prototype_distance_of_half_means_does_not_overflow(dtype):
    """An overflowing unit would make every distance 0: the look of perfect alignment."""
    source, target = ((1000 * torch.rand(3, 6000)).to(dtype) for _ in range(2))
    assert torch.equal(prototype_distance(source, target), prototype_distance(source.float(), target.float()))


def test_prototype_distance_of_collapsed_features_is_not_alignment():
    assert prototype_distance(torch.ones(3, 4), torch.ones(3, 4)).isnan().all()
