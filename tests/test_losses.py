"""Losses: values against formulas written by hand, weights that keep elements out, gradients of both orders."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import semshift
from tests.errors import refuses

EPS = torch.finfo(torch.float64).eps
NON_FINITE = torch.tensor([math.nan, math.inf, -math.inf])
# Of source, of target, of confusion.
FORMULAS = {
    "bce": (lambda x: log1p_exp(-x), lambda x: log1p_exp(x), lambda x: log1p_exp(-x)),
    "least-squares": (lambda x: (x - 1) ** 2, lambda x: (x + 1) ** 2, lambda x: (x - 1) ** 2),
    "hinge": (lambda x: max(0.0, 1 - x), lambda x: max(0.0, 1 + x), lambda x: -x),
    "wasserstein": (lambda x: -x, lambda x: x, lambda x: -x),
}
OBJECTIVES = tuple(FORMULAS)
KINDS = [*OBJECTIVES, "class-and-domain"]
CASES = st.lists(st.tuples(st.floats(-20, 20), st.sampled_from([0.0, 1.0]) | st.floats(0.01, 10.0)), max_size=6)


def log1p_exp(x):
    return math.log1p(math.exp(x))


def mean(formula, case):
    """The weighted mean and a bound of what it may be off by: each term by its rounding at 1 + |x|, sums by theirs."""
    total = sum(weight for _, weight in case)
    if not total:
        return 0.0, 0.0
    terms = [formula(x) * weight / total for x, weight in case]
    sizes = [(1 + abs(formula(x)) + abs(x)) * weight / total for x, weight in case]
    return math.fsum(terms), (2 * len(case) + 8) * EPS * sum(sizes)


def tensors(case):
    return torch.tensor(case, dtype=torch.float64).reshape(-1, 2).unbind(1)


def eye_like(logits):
    return torch.eye(logits.shape[-1] // 2, dtype=logits.dtype).expand(*logits.shape[:-1], -1)


def tell(objective, source, target, source_weight=None, target_weight=None):
    more = {"source_weight": source_weight, "target_weight": target_weight}
    if objective == "class-and-domain":
        classes = {"source_classes": eye_like(source), "target_classes": eye_like(target)}
        return semshift.class_discriminator_loss(source, target, **classes, **more)
    return semshift.discriminator_loss(source, target, objective=objective, **more)


def confuse(objective, logits, weight=None):
    if objective == "class-and-domain":
        return semshift.class_confusion_loss(logits, classes=eye_like(logits), weight=weight)
    return semshift.confusion_loss(logits, objective=objective, weight=weight)


def drawn(objective, rows=3):
    return torch.randn(rows, *([2] if objective == "class-and-domain" else []), dtype=torch.float64)


# Values.


@pytest.mark.parametrize("objective", OBJECTIVES)
@given(CASES, CASES)
def test_plain_losses_are_their_formulas(objective, source, target):
    of_source, of_target, of_confusion = FORMULAS[objective]
    logits_s, weight_s = tensors(source)
    logits_t, weight_t = tensors(target)
    found = semshift.discriminator_loss(
        logits_s, logits_t, objective=objective, source_weight=weight_s, target_weight=weight_t
    )
    parts = mean(of_source, source), mean(of_target, target)
    assert found.shape == ()
    assert abs(found.item() - (parts[0][0] + parts[1][0]) / 2) <= parts[0][1] + parts[1][1]
    for case, weight in ((target, weight_t), ([(x, 1.0) for x, _ in target], None)):
        value, bound = mean(of_confusion, case)
        assert abs(semshift.confusion_loss(logits_t, objective=objective, weight=weight).item() - value) <= bound


def class_mean(logits, classes, weight, first):
    """`-sum_k c_k log softmax(logits)[first + k]` in a loop over rows, and their weighted mean."""
    total, result = 0.0, 0.0
    for row, probabilities, share in zip(logits.tolist(), classes.tolist(), weight.tolist()):
        log_sum = math.log(math.fsum(math.exp(x) for x in row))
        result += share * math.fsum(p * (log_sum - row[first + k]) for k, p in enumerate(probabilities))
        total += share
    return result / total if total else 0.0


@given(st.integers(0, 4), st.integers(1, 4), st.integers(0, 999), st.booleans())
def test_class_losses_are_a_loop(rows, num_classes, seed, masked):
    generator = torch.Generator().manual_seed(seed)
    source, target = 3 * torch.randn(2, rows, num_classes, 2 * num_classes, generator=generator, dtype=torch.float64)
    classes = torch.randn(2, rows, num_classes, num_classes, generator=generator, dtype=torch.float64).softmax(-1)
    weight = torch.rand(2, rows, num_classes, generator=generator, dtype=torch.float64)
    if masked:
        weight = (weight > 0.5).double()
    n = rows * num_classes
    size = max([1.0, *(2 * x.abs().max().item() + math.log(2 * num_classes) for x in (source, target) if n)])
    bound = (2 * n + 4 * num_classes + 8) * EPS * num_classes * size

    def slow(x, c, w, first):
        return class_mean(x.flatten(0, 1), c.flatten(0, 1), w.flatten(), first)

    eyes = torch.stack([eye_like(source), eye_like(target)])
    # Rows that are classes need not say so.
    for c, (told_s, told_t) in ((classes, classes), (eyes, (None, None))):
        expected = (slow(source, c[0], weight[0], 0) + slow(target, c[1], weight[1], num_classes)) / 2
        more = {"source_weight": weight[0], "target_weight": weight[1]}
        found = semshift.class_discriminator_loss(source, target, source_classes=told_s, target_classes=told_t, **more)
        assert abs(found.item() - expected) <= bound
        for w, told_w in ((weight[1], weight[1]), (torch.ones_like(weight[1]), None)):
            found = semshift.class_confusion_loss(target, classes=told_t, weight=told_w)
            assert abs(found.item() - slow(target, c[1], w, 0)) <= bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_counts_beyond_its_range(dtype):
    """100,000 elements: float16 ends at 65504, bfloat16 cannot count past 256."""
    logits, rows = torch.zeros(100_000, dtype=dtype), torch.zeros(100_000, 2, dtype=dtype)
    for loss in (
        semshift.confusion_loss(logits),
        semshift.discriminator_loss(logits, logits, source_weight=logits == 0),
        semshift.class_confusion_loss(rows, classes=torch.ones(100_000, 1, dtype=dtype)),
    ):
        # Of 100,000 equal terms in any order.
        torch.testing.assert_close(
            loss, torch.tensor(math.log(2)), rtol=100_000 * torch.finfo(torch.float32).eps, atol=0
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("objective", KINDS)
def test_losses_are_wide(objective, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    source, target = (drawn(objective).to(dtype) for _ in range(2))
    assert tell(objective, source, target).dtype == confuse(objective, target).dtype == wide
    assert tell(objective, source.float(), target).dtype == wide
    weight = torch.ones(3, dtype=torch.float64)
    assert tell(objective, source, target, weight, weight).dtype == confuse(objective, target, weight).dtype == wide


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.*")
@pytest.mark.parametrize("objective", KINDS)
def test_a_gradient_scaler_skips_no_step(objective):
    """A discriminator of one's own in float16: times 65536 a loss in its dtype would be infinite."""
    # Without a bias, whose gradient is a sum over all logits: near 65536 for a squared error, torch's own included.
    judge = torch.nn.Linear(4, 6 if objective == "class-and-domain" else 1, bias=False)
    segmenter = torch.nn.Linear(4, 4)
    optimiser = torch.optim.SGD([*judge.parameters(), *segmenter.parameters()], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    before = [parameter.detach().clone() for parameter in (*judge.parameters(), *segmenter.parameters())]
    with torch.autocast("cpu", dtype=torch.float16):
        source, target = torch.randn(64, 3, 4), segmenter(torch.randn(64, 3, 4))
        confused, logits = semshift.frozen(judge)(target), [judge(each) for each in (source, target.detach())]
        assert confused.dtype == torch.float16
        loss = tell(objective, *logits) + confuse(objective, confused)
    scaler.scale(loss).backward()
    scaler.step(optimiser)
    scaler.update()
    assert scaler.get_scale() == 65536
    after = (*judge.parameters(), *segmenter.parameters())
    assert all(parameter.grad.isfinite().all() for parameter in after)
    assert all(not torch.equal(parameter, old) for parameter, old in zip(after, before))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_half_logits_are_widened_before_they_are_squared(objective):
    """The square of -300 is beyond float16, and so is the sum of these weights; the mean of the others is not."""
    logits = torch.tensor([-300.0, 2.0], dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([1e-3, 1e6])
    loss = semshift.confusion_loss(logits, objective=objective, weight=weight)
    wide = semshift.confusion_loss(logits.detach().float(), objective=objective, weight=weight)
    assert torch.equal(loss, wide)
    loss.backward()
    assert logits.grad.isfinite().all()


def test_wasserstein_sets_no_boundary():
    offset = torch.zeros((), requires_grad=True)
    semshift.discriminator_loss(torch.randn(4) + offset, torch.randn(7) + offset, objective="wasserstein").backward()
    # Means of 4 ones and of 7 ones.
    assert abs(offset.grad.item()) <= 11 * torch.finfo(torch.float32).eps


# Weights.


@pytest.mark.parametrize("as_bool", [True, False])
@pytest.mark.parametrize("here", [(False, True), (True, False), (False, False)])
@pytest.mark.parametrize("objective", KINDS)
def test_a_domain_without_elements_gives_nothing(objective, here, as_bool):
    logits = [drawn(objective).requires_grad_() for _ in range(2)]
    weights = [torch.full((3,), h, dtype=torch.bool if as_bool else torch.float32) for h in here]
    loss = tell(objective, *logits, *weights)
    loss.backward()
    halves = [tell(objective, logits[0], logits[1][:0]), tell(objective, logits[0][:0], logits[1])]
    assert loss.item() == sum(half.item() for half, h in zip(halves, here) if h)
    for x, h in zip(logits, here):
        assert x.grad.any() if h else torch.equal(x.grad, torch.zeros_like(x))
    nothing = drawn(objective).requires_grad_()
    loss = confuse(objective, nothing, torch.zeros(3, dtype=weights[0].dtype))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(nothing.grad, torch.zeros_like(nothing))


@pytest.mark.parametrize("as_bool", [True, False])
@pytest.mark.parametrize("objective", KINDS)
def test_what_takes_no_part_may_hold_anything(objective, as_bool):
    weight = torch.tensor([1, 0, 1, 0, 0])
    weight = weight.bool() if as_bool else weight.float()
    here = weight > 0
    for function, count in ((tell, 2), (confuse, 1)):
        logits = [drawn(objective, 5) for _ in range(count)]
        for x in logits:
            x[~here] = NON_FINITE.double().reshape(-1, *[1] * (x.dim() - 1))
            x.requires_grad_()
        chosen = [x.detach()[here].requires_grad_() for x in logits]
        loss, expected = function(objective, *logits, *[weight] * count), function(objective, *chosen)
        assert loss.item() == pytest.approx(expected.item(), rel=16 * EPS, abs=16 * EPS)
        loss.backward()
        expected.backward()
        for x, part in zip(logits, chosen):
            torch.testing.assert_close(x.grad[here], part.grad, rtol=16 * EPS, atol=16 * EPS)
            assert torch.equal(x.grad[~here], torch.zeros_like(x.grad[~here]))


def test_weights_that_their_cast_takes_to_zero_take_no_part():
    weight = torch.tensor([1e-60, 2.0], dtype=torch.float64)
    loss = semshift.confusion_loss(torch.tensor([math.nan, 2.0]), weight=weight)
    assert torch.equal(loss, semshift.confusion_loss(torch.tensor([2.0])))


def test_classes_of_what_takes_no_part_may_be_anything():
    logits, weight = torch.randn(2, 6), torch.tensor([0.0, 1.0])
    classes = torch.tensor([[math.nan, math.inf, 0.0], [0.2, 0.3, 0.5]])
    loss = semshift.class_confusion_loss(logits, classes=classes, weight=weight)
    torch.testing.assert_close(loss, semshift.class_confusion_loss(logits[1:], classes=classes[1:]))


@pytest.mark.parametrize("objective", KINDS)
def test_weights_have_no_scale(objective):
    source, target, weight = drawn(objective), drawn(objective), torch.rand(3, dtype=torch.float64)
    # A power of two rounds nothing.
    assert torch.equal(
        tell(objective, source, target, weight, weight), tell(objective, source, target, weight / 1024, weight * 8)
    )
    assert torch.equal(confuse(objective, target, weight), confuse(objective, target, weight / 1024))


@pytest.mark.parametrize("objective", KINDS)
def test_gradients(objective):
    source, target, weight = drawn(objective, 4), drawn(objective, 3), torch.tensor([0.5, 0.0, 2.0]).double()
    inputs = (source.requires_grad_(), target.requires_grad_())
    assert torch.autograd.gradcheck(lambda s, t: tell(objective, s, t, None, weight), inputs)
    assert torch.autograd.gradgradcheck(lambda s, t: tell(objective, s, t, None, weight).exp(), inputs)
    assert torch.autograd.gradcheck(lambda t: confuse(objective, t, weight), (target,))


# Errors. `meta` stands for another device.

INTEGERS, ELSEWHERE = torch.ones(2, dtype=torch.int64), torch.zeros(2, device="meta")
FOREIGN = ("meta", "cpu")


def ones(*shape):
    return torch.ones(shape)


def leaf(*shape):
    return ones(*shape).requires_grad_()


def learn(source=None, target=None, **options):
    return semshift.discriminator_loss(
        ones(2) if source is None else source, ones(2) if target is None else target, **options
    )


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: learn(INTEGERS), ("source_logits", torch.int64)),
        (lambda: semshift.discriminator_loss(ones(2), None), ("target_logits", "NoneType")),
        (lambda: learn(source_weight=INTEGERS), ("source_weight", torch.int64)),
        (lambda: learn(target_weight=INTEGERS), ("target_weight", torch.int64)),
        (lambda: semshift.confusion_loss(INTEGERS), ("logits", torch.int64)),
        (lambda: semshift.confusion_loss([0.0]), ("logits", "list")),
        (lambda: semshift.confusion_loss(ones(2), weight=[1, 1]), ("weight", "list")),
        (lambda: semshift.class_discriminator_loss(ones(1, 2), INTEGERS), ("target_logits", torch.int64)),
        (lambda: semshift.class_confusion_loss(ones(2, 4), weight=INTEGERS), ("weight", torch.int64)),
        (lambda: semshift.class_confusion_loss(ones(1, 4), classes=INTEGERS), ("classes", torch.int64)),
        (lambda: semshift.entropy_map(INTEGERS), ("probabilities", torch.int64)),
        (lambda: semshift.entropy_map(None), ("probabilities", "NoneType")),
        (lambda: semshift.r1_penalty(ones(2), INTEGERS), ("inputs", torch.int64)),
        (lambda: semshift.r1_penalty(1.0, ones(2)), ("logits", "float")),
        (lambda: semshift.r1_penalty(ones(2), ones(2), sample_dims=1.0), ("sample_dims", 1.0)),
        (lambda: semshift.reverse_gradient(INTEGERS), ("features", torch.int64)),
        (lambda: semshift.reverse_gradient(ones(2), scale="1"), ("scale", "'1'")),
    ],
)
def test_type_errors(call, says):
    with refuses(TypeError, *says):
        call()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: learn(objective="lsgan"), ("objective", *OBJECTIVES, "'lsgan'")),
        (lambda: semshift.confusion_loss(ones(2), objective=["bce"]), ("objective", *OBJECTIVES, "['bce']")),
        (lambda: learn(source_weight=ones(1)), ("source_weight", "source_logits", [2], [1])),
        (lambda: learn(target_weight=ones(1)), ("target_weight", "target_logits", [2], [1])),
        (lambda: learn(target_weight=torch.tensor([math.inf, 1.0])), ("target_weight", "inf")),
        (lambda: learn(ones(2), ELSEWHERE), ("source_logits", "target_logits", *FOREIGN)),
        (lambda: semshift.confusion_loss(ones(2), weight=ones(1)), ("weight", "logits", [2], [1])),
        (lambda: semshift.confusion_loss(ones(2), weight=torch.tensor([1.0, -2.0])), ("weight", -2.0)),
        (lambda: semshift.confusion_loss(ones(2), weight=ELSEWHERE), ("weight", "logits", *FOREIGN)),
        (lambda: semshift.class_discriminator_loss(ones(1, 2), ones(1)), ("target_logits", "[..., 2K]", [1])),
        (
            lambda: semshift.class_discriminator_loss(ones(2), ones(2)),
            ("source_logits", "[..., K, 2K]", "source_classes", [2]),
        ),
        (
            lambda: semshift.class_discriminator_loss(ones(2, 4), ones(2, 4).to("meta")),
            ("source_logits", "target_logits", *FOREIGN),
        ),
        (lambda: semshift.class_confusion_loss(ones(1)), ("logits", "[..., 2K]", [1])),
        (lambda: semshift.class_confusion_loss(ones()), ("logits", "[..., 2K]", [])),
        (lambda: semshift.class_confusion_loss(ones(3, 0)), ("logits", "[..., 2K]", [3, 0])),
        (lambda: semshift.class_confusion_loss(ones(3, 4)), ("logits", "[..., K, 2K]", "classes", [3, 4])),
        (lambda: semshift.class_confusion_loss(ones(3, 4), classes=ones(1)), ("classes", [3, 2], [3, 4], [1])),
        (
            lambda: semshift.class_confusion_loss(ones(5, 4), classes=ones(5, 2).to("meta")),
            ("classes", "logits", *FOREIGN),
        ),
        (lambda: semshift.class_confusion_loss(ones(2, 4), weight=ones(1)), ("weight", [2], [2, 4], [1])),
        (lambda: semshift.class_confusion_loss(ones(2, 4), weight=torch.tensor([1.0, math.nan])), ("weight", "nan")),
        (lambda: semshift.entropy_map(ones(1)), ("probabilities", 2, [1])),
        (lambda: semshift.entropy_map(ones(2, 1, 3)), ("probabilities", 2, [2, 1, 3])),
        (lambda: semshift.entropy_map(ones(2, 2) - 3), ("probabilities", "[0, 1]", -2.0)),
        (lambda: semshift.entropy_map(ones(2, 2) + 0.5), ("probabilities", "[0, 1]", 1.5)),
        (lambda: semshift.r1_penalty(leaf(2).sum(), ones(2)), ("logits", "inputs")),
        (lambda: semshift.r1_penalty(ones(2), leaf(2)), ("logits", "inputs")),
        (lambda: semshift.r1_penalty(leaf(2).sum(), leaf(2)), ("logits", "inputs")),
        (lambda: semshift.r1_penalty(ones(2), leaf(2), sample_dims=0), ("sample_dims", 1, [2], 0)),
        (lambda: semshift.r1_penalty(ones(2), leaf(2, 3), sample_dims=3), ("sample_dims", 1, 2, [2, 3], 3)),
        (lambda: semshift.r1_penalty(ones(2), leaf(2, 3), weight=ones(1)), ("weight", [2], [2, 3], [1])),
        (lambda: semshift.reverse_gradient(ones(2), scale=-1), ("scale", -1)),
        (lambda: semshift.reverse_gradient(ones(2), scale=math.inf), ("scale", "inf")),
        (lambda: semshift.reverse_gradient(ones(2), scale=10**400), ("scale", 10**400)),
        (lambda: semshift.reverse_gradient(ones(2), scale=math.nan), ("scale", "nan")),
    ],
)
def test_value_errors(call, says):
    with refuses(ValueError, *says):
        call()
