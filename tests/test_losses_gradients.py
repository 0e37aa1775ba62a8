"""Entropy, the R1 penalty and gradient reversal; all losses under transforms and compilation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import semshift
from tests.errors import refuses
from tests.test_losses import EPS, OBJECTIVES, confuse, tell


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_entropy_map_is_its_formula(column):
    found = semshift.entropy_map(torch.tensor(column, dtype=torch.float64).reshape(1, -1, 1, 1))
    assert found.shape == (1, len(column), 1, 1)
    for p, value in zip(column, found.flatten().tolist()):
        expected = -p * math.log(p) / math.log(len(column)) if p else 0.0
        # Next to 1 the logarithm is as small as its argument's rounding; next to 0 it is cut at the smallest normal.
        assert abs(value - expected) <= 8 * EPS * abs(expected) + torch.finfo(torch.float64).tiny * 800


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3), (2, 4, 3, 5), (0, 4, 3)])
def test_entropy_of_equal_shares_is_one(shape):
    entropy = semshift.entropy_map(torch.full(shape, 0.25, dtype=torch.float64)).sum(1)
    torch.testing.assert_close(entropy, torch.ones_like(entropy), rtol=8 * EPS, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_entropy_gradient(dtype):
    p = torch.tensor([[0.0, 1.0, torch.finfo(dtype).smallest_normal, 0.25]], dtype=dtype, requires_grad=True)
    entropy = semshift.entropy_map(p)
    assert entropy.dtype == dtype
    assert torch.equal(entropy[0, :2], torch.zeros(2, dtype=dtype))
    entropy.sum().backward()
    assert p.grad.isfinite().all()
    assert p.grad[0, 0] > 0
    expected = [-(math.log(x) + 1) / math.log(4) for x in p[0, 1:].tolist()]
    torch.testing.assert_close(
        p.grad[0, 1:].double(), torch.tensor(expected, dtype=torch.float64), rtol=16 * torch.finfo(dtype).eps, atol=0
    )


def test_entropy_map_takes_rounding_and_hands_on_nan():
    semshift.entropy_map(torch.tensor([[[1 + 2e-7], [0.0]]]))
    assert semshift.entropy_map(torch.tensor([[[math.nan], [0.5]]])).isnan().sum() == 1


# R1.


def quadratic(a, b, x):
    return (x @ a * x).sum(-1) / 2 + (x * b).sum(-1)


@pytest.mark.parametrize("weight", [None, torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]]), "bool", "none"])
def test_r1_per_row(weight):
    """The gradient of a quadratic is (A + A') / 2 x + b. Integers of few bits, so that the sums are exact."""
    a, b = torch.randint(-4, 5, (4, 4)).double(), torch.randint(-4, 5, (4,)).double()
    x = torch.randint(-4, 5, (2, 3, 4)).double().requires_grad_()
    if weight == "bool":
        weight = torch.tensor([[True, False, True], [False, False, True]])
    elif weight == "none":
        weight = torch.zeros(2, 3)
    found = semshift.r1_penalty(quadratic(a, b, x), x, sample_dims=2, weight=weight)
    norms = (x.detach() @ (a + a.T) / 2 + b).square().sum(-1)
    shares = torch.ones(2, 3) if weight is None else weight.double()
    expected = (norms * shares).sum() / shares.sum() / 2 if shares.any() else torch.zeros(()).double()
    assert torch.equal(found, expected)


def test_r1_per_map():
    x, a = torch.randn(2, 3, 4, 5, dtype=torch.float64).requires_grad_(), torch.randn(3, 4, 5, dtype=torch.float64)
    found = semshift.r1_penalty((a * x.square()).sum((1, 2, 3)) / 2, x)
    expected = (a * x.detach()).square().sum((1, 2, 3)).mean() / 2
    torch.testing.assert_close(found, expected, rtol=2 * 60 * EPS, atol=0)
    per_element = semshift.r1_penalty(a * x.square() / 2, x, sample_dims=4)
    torch.testing.assert_close(per_element * 60, expected, rtol=4 * 60 * EPS, atol=0)


def test_r1_of_no_samples():
    x = torch.zeros(0, 3, requires_grad=True)
    assert semshift.r1_penalty(x.square().sum(1), x).item() == 0


def test_r1_of_half_inputs_does_not_overflow():
    """The gradient of 2 x^2 at 100 is 400 in each of 4 channels."""
    x = torch.full((2, 4), 100.0, dtype=torch.float16, requires_grad=True)
    assert semshift.r1_penalty((2 * x * x).sum(1), x).item() == 4 * 400**2 / 2


def test_r1_goes_backward():
    a, b, x = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 2), (2,), (3, 2)))
    weight = torch.tensor([1.0, 0.0, 2.0])
    assert torch.autograd.gradcheck(
        lambda a, b, x: semshift.r1_penalty(quadratic(a, b, x), x, weight=weight), (a, b, x)
    )


def test_r1_skips_rows_without_weight():
    x = torch.tensor([[1.0, 2.0], [math.nan, math.inf]], requires_grad=True)
    assert semshift.r1_penalty(x.square().sum(1), x, weight=torch.tensor([True, False])).item() == 10


# Gradient reversal.


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 0.25, 1, 3.0, np.uint8(2), np.float32(0.5)])
def test_reverse_gradient(scale, dtype):
    x = torch.randn(2, 3).to(dtype).requires_grad_()
    result = semshift.reverse_gradient(x, scale=scale)
    assert torch.equal(result, x)
    assert result.dtype == dtype
    sent = torch.randn(2, 3).to(dtype)
    result.backward(sent)
    # An unsigned integer has no negative.
    assert torch.equal(x.grad, -float(scale) * sent)


def test_reverse_gradient_default_and_second_order():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(semshift.reverse_gradient(x).pow(3).sum(), x, create_graph=True)
    assert torch.equal(first, -3 * x.square())
    assert torch.autograd.gradgradcheck(lambda x: semshift.reverse_gradient(x, scale=0.5) * 2, (x,))


def test_reverse_gradient_under_transforms():
    per_row = torch.func.vmap(torch.func.grad(lambda v: semshift.reverse_gradient(v, scale=2).sum()))(torch.ones(2, 3))
    assert torch.equal(per_row, torch.full((2, 3), -2.0))


# Of what torch loads for its forward mode.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated")
def test_reverse_gradient_refuses_forward_mode():
    """A formula for it would be silently 0 in `jacfwd(jacfwd(...))`."""
    x = torch.ones(2)
    for call in (
        lambda: torch.func.jvp(semshift.reverse_gradient, (x,), (x,)),
        lambda: torch.func.jacfwd(torch.func.jacrev(lambda x: semshift.reverse_gradient(x.pow(3)).sum()))(x),
    ):
        with refuses(NotImplementedError, "reverse_gradient", "jacrev"):
            call()


TRANSFORMED = {
    **{f"discriminator {o}": lambda x, w, o=o: tell(o, x[0], x[1], w, w) for o in OBJECTIVES},
    **{f"confusion {o}": lambda x, w, o=o: confuse(o, x[1], w) for o in OBJECTIVES},
    "class-and-domain": lambda x, w: (
        semshift.class_discriminator_loss(x, 2 * x, source_weight=w[:2], target_weight=w[:2])
        + semshift.class_confusion_loss(x, weight=w[1:3])
    ),
    "frozen": lambda x, w: semshift.frozen(HEAD)(x).square().mean(),
}
HEAD = torch.nn.Linear(4, 2).double()


# Of what torch loads for its forward mode.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated")
@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_transforms(name, dtype):
    """Forward mode against differences, once and nested; a batch against a loop."""
    x, direction = torch.randn(2, 2, 4, dtype=torch.float64)
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0]).to(dtype)

    def loss(x):
        return TRANSFORMED[name](x, weight)

    value, tangent = torch.func.jvp(loss, (x,), (direction,))
    assert torch.equal(value, loss(x))
    step = 2.0**-20
    expected = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    # Differences of values of size 10 are off by their rounding over the step, and by the step squared.
    torch.testing.assert_close(tangent, expected, rtol=0, atol=100 * EPS / step)
    forward, reverse = torch.func.jacfwd(torch.func.jacfwd(loss))(x), torch.func.jacrev(torch.func.jacrev(loss))(x)
    torch.testing.assert_close(forward, reverse, rtol=1e-12, atol=1e-12)
    batch = torch.stack([x, 2 * x, -x])
    rows = torch.stack([loss(each) for each in batch])
    torch.testing.assert_close(torch.func.vmap(loss)(batch), rows, rtol=1e-12, atol=1e-12)


# Torch warns of what its own tracer does with any autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_full_graph():
    """Everything in one compiled graph, values and gradients as in eager mode."""

    def everything(x, weight):
        turned = semshift.reverse_gradient(x, scale=0.5)
        plain = [
            semshift.discriminator_loss(turned[..., 0], x[..., 1], objective=o, target_weight=weight)
            for o in OBJECTIVES
        ]
        confused = [semshift.confusion_loss(turned[..., 0], objective=o, weight=weight) for o in OBJECTIVES]
        classes = (
            semshift.class_discriminator_loss(turned, x, source_weight=weight),
            semshift.class_confusion_loss(x, weight=weight),
        )
        return turned, torch.stack([*plain, *confused, *classes, semshift.entropy_map(x.softmax(1)).sum()])

    torch._dynamo.reset()
    inputs, weight = torch.randn(4, 2, 4, dtype=torch.float64), torch.rand(4, 2).round().double()
    results = []
    for function in (everything, torch.compile(everything, fullgraph=True, backend="aot_eager")):
        x = inputs.clone().requires_grad_()
        turned, values = function(x, weight)
        (values.sum() + turned.square().sum()).backward()
        results.append((turned, values, x.grad))
    assert torch.equal(results[0][0], results[1][0])
    # Sums of at most 32 terms of a size of at most 100, in any order.
    for eager, compiled in zip(results[0][1:], results[1][1:]):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=32 * 100 * EPS)
