"""Adversarial losses: values, weights that leave nothing behind, and gradients that confuse."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from semshift.discriminators import ClassPixelDiscriminator, FCDiscriminator, PrototypeDiscriminator, frozen
from semshift.losses import (
    class_confusion_loss,
    class_discriminator_loss,
    confusion_loss,
    discriminator_loss,
    entropy_map,
    r1_penalty,
    reverse_gradient,
)

OBJECTIVES = ("bce", "least-squares", "hinge", "wasserstein")

# Loss of one logit, for a discriminator that should say source, one that should say target, and the segmenter.
ONE = {
    "bce": (lambda x: math.log1p(math.exp(-x)), lambda x: math.log1p(math.exp(x)), lambda x: math.log1p(math.exp(-x))),
    "least-squares": (lambda x: (x - 1) ** 2, lambda x: (x + 1) ** 2, lambda x: (x - 1) ** 2),
    "hinge": (lambda x: max(0, 1 - x), lambda x: max(0, 1 + x), lambda x: -x),
    "wasserstein": (lambda x: -x, lambda x: x, lambda x: -x),
}
logits = st.lists(st.tuples(st.floats(-20, 20), st.floats(0, 5)), min_size=1, max_size=6)


def weighted(loss, elements):
    total = sum(weight for _, weight in elements)
    return sum(weight * loss(x) for x, weight in elements) / total if total > 0 else 0.0


@pytest.mark.parametrize("objective", OBJECTIVES)
@given(source=logits, target=logits)
def test_values(objective, source, target):
    (s, ws), (t, wt) = (torch.tensor(e, dtype=torch.float64).T for e in (source, target))
    as_source, as_target, confused = ONE[objective]
    value = discriminator_loss(s, t, objective=objective, source_weight=ws, target_weight=wt)
    expected = (weighted(as_source, source) + weighted(as_target, target)) / 2
    assert value.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    value = confusion_loss(t, objective=objective, weight=wt)
    assert value.item() == pytest.approx(weighted(confused, target), rel=1e-9, abs=1e-12)
    assert confusion_loss(t, objective=objective).item() == pytest.approx(
        weighted(confused, [(x, 1) for x, _ in target]), rel=1e-9, abs=1e-12
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_takes_no_part_leaves_no_trace(objective, bad):
    source = torch.tensor([1.0, bad], requires_grad=True)
    target = torch.tensor([bad, -2.0], requires_grad=True)
    ws, wt = torch.tensor([True, False]), torch.tensor([0.0, 3.0])
    loss = discriminator_loss(source, target, objective=objective, source_weight=ws, target_weight=wt)
    torch.testing.assert_close(loss, discriminator_loss(source[:1], target[1:], objective=objective))
    (loss + confusion_loss(target, objective=objective, weight=wt)).backward()
    assert source.grad[1] == 0
    assert target.grad[0] == 0
    assert target.grad.isfinite().all()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("empty", ["source", "target", "both"])
def test_nothing_taking_part_is_zero_with_zero_gradient(objective, empty):
    source, target = (torch.randn(3, requires_grad=True) for _ in range(2))
    ws, wt = (torch.full((3,), float(empty not in (domain, "both"))) for domain in ("source", "target"))
    loss = discriminator_loss(source, target, objective=objective, source_weight=ws, target_weight=wt)
    loss.backward()
    assert loss.isfinite()
    if empty == "both":
        assert loss == 0
    for domain, logit in (("source", source), ("target", target)):
        assert (logit.grad == 0).all() == (empty in (domain, "both"))
    target.grad = None
    loss = confusion_loss(target, objective=objective, weight=torch.zeros(3))
    loss.backward()
    assert loss == 0
    assert (target.grad == 0).all()


CRITICS = {
    "prototype, none": (lambda: PrototypeDiscriminator(6, 4, conditioning="none"), (4, 6)),
    "prototype, per class": (lambda: PrototypeDiscriminator(6, 4), (2, 4, 6)),
    "map": (lambda: FCDiscriminator(4, base_channels=8), (2, 4, 32, 32)),
    "map, spectral norm": (lambda: FCDiscriminator(4, base_channels=8, spectral_norm=True), (2, 4, 32, 32)),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", CRITICS)
def test_confusion_moves_the_score_towards_source(name, objective):
    make, shape = CRITICS[name]
    critic = make().eval()
    target = torch.randn(shape, requires_grad=True)
    confusion_loss(frozen(critic)(target), objective=objective).backward()
    assert target.grad.abs().sum() > 0
    with torch.no_grad():
        moved = target - 1e-2 * target.grad / target.grad.norm()
        # Least squares draws to 1, which fresh logits near 0 lie below.
        assert critic(moved).mean() > critic(target).mean()


@pytest.mark.parametrize("name", ["prototype", "pixel"])
def test_class_confusion_moves_the_score_towards_source(name):
    if name == "prototype":
        critic, target, classes = PrototypeDiscriminator(6, 4, conditioning="class-and-domain"), torch.randn(4, 6), None

        def judge(x):
            return frozen(critic)(x)
    else:
        critic, target = ClassPixelDiscriminator(6, 4, hidden_channels=(8,)), torch.randn(2, 6, 5, 7)
        classes = torch.rand(2, 5, 7, 4).softmax(-1)

        def judge(x):
            return frozen(critic)(x).movedim(1, -1)

    def source_score(x):
        half = judge(x).softmax(-1)[..., :4]
        return half.sum(-1).mean()

    target.requires_grad_()
    class_confusion_loss(judge(target), classes=classes).backward()
    assert target.grad.abs().sum() > 0
    with torch.no_grad():
        assert source_score(target - 1e-2 * target.grad / target.grad.norm()) > source_score(target)


def test_class_forms_against_a_loop():
    source, target = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    classes = torch.rand(5, 3, dtype=torch.float64).softmax(-1)
    ws, wt = torch.rand(2, 3, dtype=torch.float64), torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0], dtype=torch.float64)

    def entropy(row, k):
        return -(row[k] - row.exp().sum().log())

    left = sum(ws[b, k] * entropy(source[b, k], k) for b in range(2) for k in range(3)) / ws.sum()
    right = sum(wt[n] * classes[n, k] * entropy(target[n], 3 + k) for n in range(5) for k in range(3)) / wt.sum()
    confused = sum(wt[n] * classes[n, k] * entropy(target[n], k) for n in range(5) for k in range(3)) / wt.sum()
    poisoned = target.clone()
    poisoned[1] = math.nan
    loss = class_discriminator_loss(source, poisoned, target_classes=classes, source_weight=ws, target_weight=wt)
    torch.testing.assert_close(loss, (left + right) / 2)
    torch.testing.assert_close(class_confusion_loss(poisoned, classes=classes, weight=wt), confused)
    assert class_confusion_loss(poisoned, classes=classes, weight=torch.zeros(5, dtype=torch.float64)) == 0


def test_entropy_map():
    probabilities = torch.rand(2, 5, 3, 4, dtype=torch.float64).softmax(1)
    expected = -probabilities * probabilities.log() / math.log(5)
    torch.testing.assert_close(entropy_map(probabilities), expected)
    torch.testing.assert_close(entropy_map(torch.full((1, 5, 1), 0.2)).sum(), torch.tensor(1.0))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        certain = torch.tensor([[1.0], [0.0]], dtype=dtype).T[..., None].requires_grad_()
        entropy_map(certain).sum().backward()
        assert (entropy_map(certain) == 0).all()
        assert certain.grad.isfinite().all()


def test_r1_of_a_quadratic():
    # D(x) = x' A x / 2 has gradient A x for symmetric A.
    a = torch.randn(6, 6, dtype=torch.float64)
    a = (a + a.T).requires_grad_()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    judged = ((x @ a) * x).sum(-1) / 2
    weight = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    squared = (x @ a).square().sum(-1)
    penalty = r1_penalty(judged, x, sample_dims=2, weight=weight)
    torch.testing.assert_close(penalty, (squared * weight).sum() / weight.sum() / 2)
    torch.testing.assert_close(r1_penalty(judged, x), squared.sum(1).mean() / 2)
    (gradient,) = torch.autograd.grad(penalty, a)
    assert gradient.abs().sum() > 0


# Dynamo itself makes an instance of torch.autograd.Function when it traces one.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_reverse_gradient():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    y = reverse_gradient(x, scale=0.25)
    assert torch.equal(x, y)
    (gradient,) = torch.autograd.grad((y**3).sum(), x)
    torch.testing.assert_close(gradient, -0.25 * 3 * x.detach() ** 2)
    compiled = torch.compile(lambda v: (reverse_gradient(v, scale=0.5) ** 2).sum(), fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(gradient, -x.detach())
    # The backward can be gone through again: its factor is the same constant.
    (first,) = torch.autograd.grad((reverse_gradient(x) ** 3).sum(), x, create_graph=True)
    assert torch.autograd.grad(first.sum(), x)[0].isfinite().all()
    half = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    reverse_gradient(half).sum().backward()
    assert half.grad.dtype == torch.bfloat16


def test_reversal_is_confusion_in_one_pass():
    critic, features = PrototypeDiscriminator(5, 3, conditioning="none"), torch.randn(3, 5, requires_grad=True)
    loss = F.softplus(critic(reverse_gradient(features))).mean()
    loss.backward()
    with torch.no_grad():
        assert critic(features - 0.01 * features.grad / features.grad.norm()).mean() > critic(features).mean()


Z = torch.zeros


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: confusion_loss(Z(2), objective="gan"),
            ValueError,
            "expected objective to be one of bce, least-squares, hinge, wasserstein, got 'gan'",
        ),
        (
            lambda: discriminator_loss(Z(2), Z(2), objective=None),
            ValueError,
            "expected objective to be one of bce, least-squares, hinge, wasserstein, got None",
        ),
        (
            lambda: confusion_loss(Z(2, 1), weight=Z(2)),
            ValueError,
            "expected weight [2, 1] for logits [2, 1], got [2]",
        ),
        (
            lambda: discriminator_loss(Z(2), Z(3), target_weight=Z(2)),
            ValueError,
            "expected target_weight [3] for target_logits [3], got [2]",
        ),
        (
            lambda: discriminator_loss(Z(2), Z(3), source_weight=torch.ones(2, dtype=torch.int64)),
            TypeError,
            "expected source_weight to be bool or floating point, got torch.int64",
        ),
        (
            lambda: confusion_loss(torch.ones(2, dtype=torch.int64)),
            TypeError,
            "expected logits to be floating point, got torch.int64",
        ),
        (
            lambda: class_discriminator_loss(Z(3, 5), Z(3, 6)),
            ValueError,
            "expected source_logits [..., 2K], got [3, 5]",
        ),
        (
            lambda: class_discriminator_loss(Z(3, 6), Z(2, 6)),
            ValueError,
            "expected target_logits [..., K, 2K] of prototypes, or target_classes, got [2, 6]",
        ),
        (
            lambda: class_confusion_loss(Z(2, 6), classes=Z(2, 6)),
            ValueError,
            "expected classes [2, 3] for logits [2, 6], got [2, 6]",
        ),
        (
            lambda: class_confusion_loss(Z(3, 6), weight=Z(3, 6)),
            ValueError,
            "expected weight [3] for logits [3, 6], got [3, 6]",
        ),
        (
            lambda: entropy_map(Z(2, 1, 4)),
            ValueError,
            "expected probabilities [B, K, *S] with K of at least 2, got [2, 1, 4]",
        ),
        (
            lambda: entropy_map(torch.ones(2, 2, dtype=torch.int64)),
            TypeError,
            "expected probabilities to be floating point, got torch.int64",
        ),
        (
            lambda: r1_penalty(Z(2), Z(2, 3)),
            ValueError,
            "expected logits computed from inputs that require grad, got no gradient between them",
        ),
        (
            lambda: r1_penalty(Z(2, requires_grad=True) * 1, Z(2, 3, requires_grad=True)),
            ValueError,
            "expected logits computed from inputs that require grad, got no gradient between them",
        ),
        (
            lambda: r1_penalty(Z(2), Z(2, 3), sample_dims=3),
            ValueError,
            "expected sample_dims in 1 to 2 for inputs [2, 3], got 3",
        ),
        (
            lambda: r1_penalty(Z(2), Z(2, 3), weight=Z(3)),
            ValueError,
            "expected weight [2] for inputs [2, 3], got [3]",
        ),
        (
            lambda: reverse_gradient(Z(2), scale=-1.0),
            ValueError,
            "expected scale to be finite and not negative, got -1.0",
        ),
        (
            lambda: reverse_gradient(torch.ones(2, dtype=torch.int64)),
            TypeError,
            "expected features to be floating point, got torch.int64",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        call()
